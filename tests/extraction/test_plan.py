"""What compute threads learn about a plan is recorded once; a finding against it is final."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from layertap.extraction.kinds.hook import KIND, HookExtractor
from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.plan import Findings, Plan


def test_a_refused_size_stays_refused() -> None:
    """If two threads test one size, the one that saw it fail counts, in either order."""
    for first, second in (("", "it failed"), ("it failed", "")):
        findings = Findings()
        assert findings.refusal(4) is None
        findings.found_size(4, first)
        assert findings.found_size(4, second) == "it failed"
        assert findings.refusal(4) == "it failed"


def test_passes_are_shared_only_where_no_trial_failed() -> None:
    """One failed test of a total counts; a plan that needs separate passes shares none."""
    findings = Findings(proven=[1, 2])
    assert findings.refusal(2) == ""
    assert findings.shares(3) is None
    findings.found_shares(3, shares=True)
    findings.found_shares(5, shares=False)
    findings.found_shares(5, shares=True)
    assert (findings.shares(3), findings.shares(5)) == (True, False)
    findings.found_alone(alone=True)
    findings.found_alone(alone=False)
    assert findings.alone
    assert findings.shares(3) is False


def test_findings_of_many_threads_are_all_kept() -> None:
    """Eight threads record a thousand sizes each while all of them read."""
    findings, start = Findings(), Barrier(8)

    def learn(thread: int) -> None:
        start.wait(60)
        for size in range(thread, 8000, 8):
            findings.found_size(size, "odd" if size % 2 else "")
            assert findings.refusal(size) == ("odd" if size % 2 else "")
            findings.found_shares(size, shares=not size % 3)

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(learn, thread) for thread in range(8)]:
            done.result(60)
    assert [findings.refusal(size) for size in range(4)] == ["", "odd", "", "odd"]
    assert [bool(findings.shares(size)) for size in range(8000)] == [
        not size % 3 for size in range(8000)
    ]


def test_only_the_findings_of_a_plan_change() -> None:
    """The plan itself is immutable, so threads share it without a lock."""
    plan = Plan(KIND, PassSpec(()), (3, 8, 8), (), object.__new__(HookExtractor), Findings())
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.built = None  # type: ignore[misc]
    assert not plan.dynamic
    plan.findings.found_dynamic()
    assert plan.dynamic
