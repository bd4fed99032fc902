"""``make mutants`` changes what it says, leaves the checkout alone, and judges by the tests."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
try:
    import mutants
finally:
    sys.path.remove(str(ROOT / "tools"))

PARTS = '''"""Says what it does."""

import logging

_log = logging.getLogger(__name__)


def grown(size: int = 3, *, limit: "int | None" = None) -> int:
    """Return the size, grown."""
    if limit is not None and size >= limit:
        raise ValueError(f"{size + 1} are too many")
    _log.info("%d", 7)
    return size + 1
'''
TEST = '''"""Tests of parts."""

from layertap.wire.parts import grown


def test_grown() -> None:
    """It grows by one."""
    assert grown(3) == 4


def test_limit() -> None:
    """A size below the limit is grown."""
    assert grown(3, limit=5) == 4
'''


def changes(source: str) -> set[tuple[str, str]]:
    return {(each.before, each.after) for each in mutants.mutants_of(source, Path("x.py"))}


@pytest.mark.parametrize(
    ("source", "before", "after"),
    [
        ("x = a < b", "a < b", "(a <= b)"),
        ("x = a is None", "a is None", "(a is not None)"),
        ("x = a not in b", "a not in b", "(a in b)"),
        ("x = a and b", "a and b", "(a or b)"),
        ("x = not a", "not a", "(a)"),
        ("x = a * b", "a * b", "(a // b)"),
        ("x = f(3)", "3", "(4)"),
        ("x = f(on=True)", "True", "False"),
        ("x = a if b else c", "a if b else c", "(c if b else a)"),
        ("def f():\n    return a", "return a", "return None"),
        ("if a.b:\n    pass", "a.b", "(not (a.b))"),
        ("a.close()", "a.close()", "pass"),
        ("x = 'é', a < (\n  b)", "a < ( b)", "(a <= b)"),
    ],
)
def test_each_kind_of_change_is_made(source: str, before: str, after: str) -> None:
    """A mutant replaces the text of one node, and its file is still Python."""
    assert (before, after) in changes(source)
    for mutant in mutants.mutants_of(source, Path("x.py")):
        compile(mutant.apply(source.encode()), "x.py", "exec")


def test_what_people_read_is_left_alone() -> None:
    """Docstrings, messages, annotations, log records and declarations are not mutated."""
    assert changes(PARTS) == {
        ("3", "(4)"),
        ("limit is not None and size >= limit", "(limit is not None or size >= limit)"),
        ("limit is not None", "(limit is None)"),
        ("size >= limit", "(size > limit)"),
        ("return size + 1", "return None"),
        ("size + 1", "(size - 1)"),
        ("1", "(2)"),
    }


@pytest.mark.long
def test_a_seed_draws_the_same_mutants_from_every_package() -> None:
    """Two draws are alike, another seed's is not, and each package gives its share."""
    packages = list(mutants.TESTS)
    drawn = mutants.sample(ROOT, packages, 10, 1)
    assert drawn == mutants.sample(ROOT, packages, 10, 1)
    assert drawn != mutants.sample(ROOT, packages, 10, 2)
    shares = [sum(each.file.parts[2] == package for each in drawn) for package in packages]
    assert sorted(shares) == [2, 2, 3, 3]


def test_every_package_has_tests_and_its_own_come_first() -> None:
    """The table names what is there; the test file of a module's name runs before the others."""
    for places in mutants.TESTS.values():
        assert all((ROOT / place).exists() for place in places)
    (mutant, *_) = mutants.mutants_of("x = 1", Path("server/layertap/wire/dtypes.py"))
    first, *others = mutants.ordered_tests(ROOT, mutant)
    assert first == "tests/wire/test_dtypes.py"
    assert {"tests/wire/test_tensors.py", "tests/fuzz/test_differential.py"} < set(others)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout of a package of one module, with tests that miss what its limit does."""
    home = tmp_path / "home"
    files = {
        "server/layertap/__init__.py": "",
        "server/layertap/wire/__init__.py": "",
        "server/layertap/wire/parts.py": PARTS,
        "tests/wire/test_parts.py": TEST,
    }
    for name, text in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text, "utf-8")
    subprocess.run(["git", "init", "-q"], cwd=home, check=True)  # noqa: S607 - git is git
    return home


def outcomes(home: Path, *changes: str) -> dict[str, str]:
    """Try the mutants of a checkout that replace these texts; return what came of each."""
    found = [each for each in mutants.all_mutants(home, "wire") if each.before in changes]
    deadline = time.monotonic() + 3600
    seen = mutants.tried(home, found, 1, 60, deadline)
    return {mutant.before: outcome.verdict for mutant, outcome in seen}


@pytest.mark.long
def test_tests_kill_what_they_check_and_nothing_else(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value that a test checks kills its mutant, an unchecked boundary survives."""
    monkeypatch.setattr(mutants, "TESTS", {"wire": ["tests/wire"]})
    assert outcomes(checkout, "size >= limit", "return size + 1") == {
        "size >= limit": "survived",
        "return size + 1": "killed",
    }
    assert (checkout / "server/layertap/wire/parts.py").read_text("utf-8") == PARTS


@pytest.mark.long
def test_a_test_that_fails_anyway_kills_nothing(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mutant is "unclear" if the only test that fails on it fails without it too."""
    monkeypatch.setattr(mutants, "TESTS", {"wire": ["tests/wire"]})
    broken = checkout / "tests" / "wire" / "test_broken.py"
    broken.write_text("def test_broken():\n    assert not 'green'\n", "utf-8")
    assert outcomes(checkout, "size >= limit") == {"size >= limit": "unclear"}
