"""Warnings are ignored inside certain blocks, and nowhere else."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path

import pytest

import layertap
from layertap.silence import warnings_ignored


def test_blocks_that_overlap_in_two_threads_leave_the_filters_as_they_were() -> None:
    """The block that began first ends first; the second one must not restore its filters."""
    before = list(warnings.filters)
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()

    def first() -> None:
        with warnings_ignored():
            first_in.set()
            assert second_in.wait(60)
        first_out.set()

    def second() -> None:
        assert first_in.wait(60)
        with warnings_ignored():
            second_in.set()
            assert first_out.wait(60)
            warnings.warn("still ignored", UserWarning, stacklevel=1)

    threads = [threading.Thread(target=block) for block in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert list(warnings.filters) == before
    with pytest.warns(UserWarning, match="heard again"):
        warnings.warn("heard again", UserWarning, stacklevel=1)


def test_filters_that_others_set_meanwhile_stay() -> None:
    """Only the block's own filter is removed, even if the program has an equal one."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with warnings_ignored():
            warnings.warn("ignored", UserWarning, stacklevel=1)
            warnings.filterwarnings("error", message="theirs")
        assert warnings.filters[0][0] == "error"
        assert any(entry[1] is not None and entry[1].match("theirs") for entry in warnings.filters)
        with pytest.raises(UserWarning, match="not ignored"):
            warnings.warn("not ignored", UserWarning, stacklevel=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = list(warnings.filters)
        with warnings_ignored():
            pass
        assert list(warnings.filters) == before


def test_a_block_ends_inside_filters_that_began_during_it() -> None:
    """A copy of the list that other code made meanwhile does not keep the block's filter."""
    before = list(warnings.filters)
    block, theirs = warnings_ignored(), warnings.catch_warnings()
    block.__enter__()
    theirs.__enter__()
    block.__exit__(None, None, None)
    assert list(warnings.filters) == before
    theirs.__exit__(None, None, None)
    assert list(warnings.filters) == before


def test_no_other_code_changes_the_filters() -> None:
    """Every module of layertap ignores warnings through ``warnings_ignored``."""
    package = Path(layertap.__file__).parent
    changing = ("catch_warnings", "simplefilter", "filterwarnings", "warnings.filters")
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if any(word in path.read_text() for word in changing)
    }
    assert found == {"silence.py"}
