"""The tool behind ``make perf-analyzer`` succeeds only if something was measured."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
MEASURED = """\
Inferences/Second vs. Client Average Batch Latency
Concurrency: 1, throughput: 9.00195 infer/sec, latency 110092 usec
Concurrency: 4, throughput: 12 infer/sec, latency 313461 usec
"""


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """Load the tool, with a test's folder instead of what it downloads."""
    spec = importlib.util.spec_from_file_location("perf_tool", ROOT / "tools" / "perf_analyzer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "BUILD", tmp_path)
    (tmp_path / "root").mkdir()
    for name in ("libcudart.so.12", "libb64.so.0d"):
        (tmp_path / "root" / name).touch()
    return module


def pretend(tool: ModuleType, output: str, code: int) -> None:
    """Put a program in perf_analyzer's place that prints something."""
    program = tool.BUILD / "root" / "perf_analyzer"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{output}END\nexit {code}\n", "utf-8")
    program.chmod(0o755)


def test_what_was_measured_is_shown(tool: ModuleType) -> None:
    """The output of a run with throughputs is returned completely."""
    pretend(tool, MEASURED, 0)
    assert tool.measure("127.0.0.1:1", [], 1) == MEASURED


@pytest.mark.parametrize(
    ("output", "code"),
    [
        ("", 0),
        (MEASURED, 1),
        (MEASURED.replace("9.00195", "0"), 0),
        ("error: failed to create perf analyzer\n", 99),
    ],
)
def test_a_run_that_measured_nothing_fails(tool: ModuleType, output: str, code: int) -> None:
    """Another exit code, no throughput or a throughput of zero ends the tool with the output."""
    pretend(tool, output, code)
    with pytest.raises(SystemExit, match="perf_analyzer failed"):
        tool.measure("127.0.0.1:1", [], 1)


def test_versions_are_pinned(tool: ModuleType) -> None:
    """What it downloads is named with its version."""
    lines = [
        line
        for name in ("perf", "triton")
        for line in (ROOT / "tools" / f"{name}-requirements.txt").read_text("utf-8").splitlines()
        if not line.startswith("#")
    ]
    assert len(lines) > 5
    assert all(line.count("==") == 1 and "/" not in line and " " not in line for line in lines)
