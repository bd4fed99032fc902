"""Mutation testing of the core: change one expression at a time and see whether a test fails.

Run it by ``make mutants``. A mutant is a copy of the checkout in which one comparison, condition,
calculation, constant, returned value or call of one file differs. The tests of that file's package
run on it until one fails. A mutant that survives shows behaviour that no test checks, unless it
behaves as the original does, which a reader has to decide. The working tree is never changed.

A test that fails without the mutant too kills nothing: it runs once more on an unchanged copy
before it counts.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
SOURCE = Path("server") / "layertap"

TESTS = {
    "batching": ["tests/batching", "tests/engine/test_compute.py", "tests/engine/test_work.py"],
    "engine": ["tests/engine", "tests/local", "tests/services"],
    "extraction": ["tests/extraction", "tests/engine", "tests/coverage"],
    "wire": ["tests/wire", "tests/fuzz", "tests/client", "tests/services"],
}
"""The tests of each package. Within it, test files that name the changed module run first."""

TEST_SECONDS = 120
"""The time limit for one test: some mutants make a loop endless."""

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
CALCULATIONS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult, ast.Mod: ast.Add, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
# What only people read, and declarations of types.
SILENT_CALLS = re.compile(r"^(_log|logging|log|warnings)\.")


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Attributes:
        file: The file, relative to the checkout.
        line: The line on which the change starts, from 1.
        start: Where the replaced text starts in the file's bytes.
        end: Where it ends.
        before: The text that is replaced, on one line.
        after: The text that replaces it.
    """

    file: Path
    line: int
    start: int
    end: int
    before: str
    after: str

    def apply(self, source: bytes) -> bytes:
        """Return the file's bytes with the change."""
        return source[: self.start] + self.after.encode() + source[self.end :]

    def __str__(self) -> str:
        """Return the place and the change."""
        return f"{self.file}:{self.line}: {self.before}  ->  {self.after}"


@dataclass(frozen=True)
class Outcome:
    """What the tests said to a mutant.

    Attributes:
        verdict: ``"killed"``, ``"survived"``, ``"out of time"``, or ``"unclear"`` where a test
            failed that fails without the mutant too.
        reason: The test that failed, or what happened.
        seconds: How long the tests ran.
    """

    verdict: str
    reason: str
    seconds: float


class _Finder(ast.NodeVisitor):
    """Collects the changes of one file as pairs of a node and the text that replaces it."""

    def __init__(self) -> None:
        self.found: list[tuple[ast.AST, str]] = []

    def _expression(self, node: ast.AST, changed: ast.AST) -> None:
        self.found.append((node, f"({ast.unparse(changed)})"))

    def visit_Compare(self, node: ast.Compare) -> None:
        if type(node.ops[0]) in COMPARISONS:
            ops = [COMPARISONS[type(node.ops[0])](), *node.ops[1:]]
            self._expression(node, ast.Compare(node.left, ops, node.comparators))
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        self._expression(node, ast.BoolOp(other, node.values))
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            self._expression(node, node.operand)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if type(node.op) in CALCULATIONS and not _is_text(node.left) and not _is_text(node.right):
            changed = CALCULATIONS[type(node.op)]()
            self._expression(node, ast.BinOp(node.left, changed, node.right))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self.found.append((node, str(not node.value)))
        elif isinstance(node.value, int):
            self.found.append((node, f"({node.value + 1})"))

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._expression(node, ast.IfExp(node.test, node.orelse, node.body))
        self.generic_visit(node)

    def visit_keyword(self, node: ast.keyword) -> None:
        # ``zip(strict=True)`` states what holds anyway.
        if node.arg != "strict":
            self.generic_visit(node)

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is not None and not _is_none(node.value):
            self.found.append((node, "return None"))
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        # Other conditions are changed where they stand.
        plain = isinstance(node.test, (ast.Name, ast.Attribute, ast.Call, ast.NamedExpr))
        if plain and ast.unparse(node.test) != "TYPE_CHECKING":
            self.found.append((node.test, f"(not ({ast.unparse(node.test)}))"))
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call) and not SILENT_CALLS.match(ast.unparse(node.value)):
            self.found.append((node, "pass"))
            self.generic_visit(node)
        elif not isinstance(node.value, (ast.Constant, ast.Call)):
            self.generic_visit(node)

    # Messages, annotations and declarations are not behaviour.
    def visit_Raise(self, node: ast.Raise) -> None:
        """Leave messages alone."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Leave messages alone."""

    def visit_Assert(self, node: ast.Assert) -> None:
        """Leave alone what only narrows types."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for default in (*node.args.defaults, *filter(None, node.args.kw_defaults)):
            self.visit(default)
        for statement in node.body:
            self.visit(statement)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for statement in node.body:
            self.visit(statement)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes))
    )


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def mutants_of(source: str, file: Path) -> list[Mutant]:
    """Return every mutant of a file, in the order of their places."""
    finder = _Finder()
    finder.visit(ast.parse(source))
    data = source.encode()
    lines = [0]
    for line in data.splitlines(keepends=True):
        lines.append(lines[-1] + len(line))
    mutants = []
    for node, after in finder.found:
        start = lines[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
        end = lines[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]
        before = " ".join(data[start:end].decode().split())
        mutants.append(Mutant(file, node.lineno, start, end, before, after))  # type: ignore[attr-defined]
    return sorted(mutants, key=lambda mutant: (mutant.start, mutant.end, mutant.after))


def all_mutants(home: Path, package: str) -> list[Mutant]:
    """Return every mutant of a package of the core."""
    files = sorted((home / SOURCE / package).rglob("*.py"))
    return [
        mutant
        for file in files
        for mutant in mutants_of(file.read_text("utf-8"), file.relative_to(home))
    ]


def sample(home: Path, packages: Sequence[str], count: int, seed: int) -> list[Mutant]:
    """Draw mutants, the same number from each package, in the order in which to try them."""
    chance = random.Random(seed)
    drawn = []
    for position, package in enumerate(packages):
        share = count // len(packages) + (position < count % len(packages))
        mutants = all_mutants(home, package)
        drawn.append(chance.sample(mutants, min(share, len(mutants))))
    # One of each in turn: a run that is cut short has seen all packages.
    longest = max(map(len, drawn), default=0)
    return [each[i] for i in range(longest) for each in drawn if i < len(each)]


class Checkout:
    """A copy of the checkout, without what git ignores but with the extension module.

    Args:
        home: The checkout.
        folder: Where the copy goes.
    """

    def __init__(self, home: Path, folder: Path) -> None:
        self.home = folder
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],  # noqa: S607
            cwd=home,
            capture_output=True,
            check=True,
        ).stdout
        extension = (home / SOURCE).glob("_core*.so")
        names = [Path(os.fsdecode(name)) for name in listed.split(b"\0") if name]
        for name in (*names, *(path.relative_to(home) for path in extension)):
            if (home / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(home / name, folder / name)
        # Some tests start the tools that are installed there.
        for environment in home.glob(".venv*"):
            if not (folder / environment.name).exists():
                (folder / environment.name).symlink_to(environment.resolve())

    def pytest(self, arguments: Sequence[str], seconds: float) -> tuple[int | None, str]:
        """Run tests; return the exit code, None after a time-out, and what they printed."""
        environment = {
            **os.environ,
            "PYTHONPATH": str(self.home / "server"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = [
            *(sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "--tb=no"),
            *("-p", "no:cacheprovider", "--timeout", str(TEST_SECONDS), *arguments),
        ]  # fmt: skip
        with subprocess.Popen(
            command,
            cwd=self.home,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process:
            try:
                printed, _ = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                # The servers that a test has started are in its session.
                os.killpg(process.pid, signal.SIGKILL)
                printed, _ = process.communicate()
                return None, printed
        return process.returncode, printed


def ordered_tests(home: Path, mutant: Mutant) -> list[str]:
    """Return the test files for a mutant: those that name its module first."""
    parts = mutant.file.relative_to(SOURCE).with_suffix("").parts
    module = ".".join(("layertap", *parts))
    files: list[Path] = []
    for place in TESTS[parts[0]]:
        path = home / place
        files += [path] if path.is_file() else sorted(path.rglob("test_*.py"))
    named = re.compile(rf"\b{re.escape(module)}\b")
    own = f"test_{parts[-1]}.py"

    def rank(file: Path) -> int:
        if file.name == own and parts[0] in file.parts:
            return 0
        return 1 if named.search(file.read_text("utf-8")) else 2

    return [str(file.relative_to(home)) for file in sorted(files, key=rank)]


class Trial:
    """Runs mutants and remembers which tests pass without them.

    Args:
        home: The checkout.
        folder: Where its copies go.
        seconds: The time limit for the tests of one mutant.
    """

    def __init__(self, home: Path, folder: Path, seconds: float) -> None:
        self._home = home
        self._folder = folder
        self._seconds = seconds
        self._local = threading.local()
        self._unchanged = Checkout(home, folder / "unchanged")
        self._sound: dict[str, bool] = {}
        self._lock = threading.Lock()

    def outcome(self, mutant: Mutant) -> Outcome:
        """Run the tests of a mutant."""
        if not hasattr(self._local, "checkout"):
            place = Path(tempfile.mkdtemp(dir=self._folder))
            self._local.checkout = Checkout(self._home, place)
        checkout: Checkout = self._local.checkout
        file = checkout.home / mutant.file
        source = file.read_bytes()
        file.write_bytes(mutant.apply(source))
        begun = time.monotonic()
        try:
            code, printed = checkout.pytest(ordered_tests(checkout.home, mutant), self._seconds)
        finally:
            file.write_bytes(source)
        return Outcome(*self._verdict(code, printed), time.monotonic() - begun)

    def _verdict(self, code: int | None, printed: str) -> tuple[str, str]:
        if code is None:
            return "out of time", f"no test had failed after {self._seconds:.0f} s"
        if code == 0:
            return "survived", printed.strip().splitlines()[-1]
        # A nodeid may have spaces in its parameters; a message follows after a dash.
        failed = re.search(r"^(?:FAILED|ERROR) (\S+?(?:\[.*\])?)(?: - .*)?$", printed, re.MULTILINE)
        if failed is None:
            # It ended without a summary: a crash, or a mutant on which pytest itself fails.
            last = (printed.strip().splitlines() or ["nothing"])[-1]
            return "killed", f"the tests ended with code {code}: {last}"
        test = failed[1]
        return ("killed" if self._passes(test) else "unclear"), test

    def _passes(self, test: str) -> bool:
        """Whether a test passes on the unchanged checkout."""
        with self._lock:
            if test not in self._sound:
                self._sound[test] = self._unchanged.pytest([test], self._seconds)[0] == 0
            return self._sound[test]


def tried(
    home: Path, mutants: Sequence[Mutant], jobs: int, seconds: float, deadline: float
) -> Iterator[tuple[Mutant, Outcome]]:
    """Run mutants, several at once; stop to begin new ones at the deadline."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as threads:
        trial = Trial(home, Path(folder), seconds)

        def outcome(mutant: Mutant) -> Outcome | None:
            return trial.outcome(mutant) if time.monotonic() < deadline else None

        for mutant, seen in zip(mutants, threads.map(outcome, mutants), strict=True):
            if seen is not None:
                yield mutant, seen


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sample of mutants and print the score; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=40, help="mutants to draw (default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="which ones (default: 0)")
    parser.add_argument("--minutes", type=float, default=60, help="begin no mutant after that")
    parser.add_argument("--mutant-seconds", type=float, default=600, help="limit for each mutant")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="mutants at once")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    parser.add_argument("--only", help="of the drawn mutants those with this text, such as x.py:7:")
    parser.add_argument("packages", nargs="*", help=f"default: {', '.join(TESTS)}")
    options = parser.parse_args(arguments)
    packages = options.packages or list(TESTS)
    if unknown := set(packages) - set(TESTS):
        parser.error(f"unknown packages {', '.join(sorted(unknown))}; there are {', '.join(TESTS)}")
    mutants = sample(HOME, packages, options.count, options.seed)
    mutants = [mutant for mutant in mutants if (options.only or "") in str(mutant)]
    if options.list:
        print(*mutants, sep="\n")
        return 0
    deadline = time.monotonic() + options.minutes * 60
    seen = []
    for mutant, outcome in tried(HOME, mutants, options.jobs, options.mutant_seconds, deadline):
        seen.append((mutant, outcome))
        print(
            f"{outcome.verdict}  {mutant}\n    {outcome.seconds:.0f} s, {outcome.reason}",
            flush=True,
        )
    counts = {
        verdict: sum(outcome.verdict == verdict for _, outcome in seen)
        for verdict in ("killed", "survived", "out of time", "unclear")
    }
    judged = counts["killed"] + counts["survived"]
    print(f"\nseed {options.seed}: {len(seen)} of {len(mutants)} mutants tried")
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    print(
        f"score: {counts['killed']} of {judged}"
        + (f", {counts['killed'] / judged:.0%}" if judged else "")
    )
    for mutant, outcome in seen:
        if outcome.verdict == "survived":
            print(f"survived  {mutant}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
