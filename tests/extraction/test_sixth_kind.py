"""A new extractor is one file and one value of the enum, as CONTRIBUTING says.

A copy of the package gets a sixth kind that way: ``torch_export_kind.py`` beside the other kinds,
and its value in both enums. Nothing else of the copy is changed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
GENERATOR = ROOT / ".venv-gen" / "bin" / "python"


def insert(file: Path, behind: str, line: str) -> None:
    text = file.read_text("utf-8")
    assert text.count(behind) == 1
    file.write_text(text.replace(behind, behind + line), "utf-8")


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a package with the sixth kind did; see ``drive_sixth_kind.py``."""
    tree = tmp_path_factory.mktemp("tree")
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("proto", "server"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignored)
    package = tree / "server" / "layertap"
    # The recipe.
    shutil.copy(HERE / "torch_export_kind.py", package / "extraction" / "kinds" / "torch_export.py")
    insert(
        package / "selection.py",
        '    AUTO = "auto"\n',
        '    TORCH_EXPORT = "torch_export", "X"\n',
    )
    insert(
        tree / "proto" / "layertap" / "v1" / "catalogue.proto",
        "  EXTRACTOR_EXPORT = 7;\n",
        "  // An exported program.\n  EXTRACTOR_TORCH_EXPORT = 8;\n",
    )
    generator = ROOT / "tools" / "gen_proto.py"
    subprocess.run([GENERATOR, generator, "--root", tree], check=True, capture_output=True)
    # The package as it is now, served by a process of its own.
    done = subprocess.run(
        [sys.executable, HERE / "drive_sixth_kind.py", tmp_path_factory.mktemp("plans")],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (tree / "server", HERE.parent, HERE))),
        },
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_new_kind_serves_what_it_claims(facts) -> None:
    """Its values equal plain PyTorch's, bit for bit, at a batch size that no proof has tried."""
    assert facts["asked"]["by"] == "TORCH_EXPORT"
    assert facts["asked"]["right"] == [True, True]


def test_a_new_kind_is_in_the_catalogue(facts) -> None:
    """It is in AUTO's order, in messages with a reason for each side, and has a letter."""
    asked = facts["asked"]
    assert asked["catalogue"][:2] == ["TORCH_EXPORT", "TORCHSCRIPT"]
    assert asked["wire"]["EXTRACTOR_TORCH_EXPORT"] == [
        ["CAPTURE_OUTPUT", True, ""],
        ["CAPTURE_INPUT", False, "it takes outputs only"],
    ]
    assert asked["letters"] == "CLFHETX"


def test_a_new_kind_refuses_what_it_does_not_claim(facts) -> None:
    """An input, a graph node, and a layer after a branch on values."""
    asked = facts["asked"]
    assert "TORCH_EXPORT can't serve the input of layer 'layer2'" in asked["input"]
    assert "it takes outputs only; extractors that can: TORCHSCRIPT, EXPORT, HOOK" in asked["input"]
    assert "a node of the symbolic graph, not a module; extractors that can: FX" in asked["node"]
    assert "branches on tensor values" in facts["refused"]["raises"]


def test_what_a_new_kind_claims_wrongly_is_found_out(facts) -> None:
    """A program with a constant batch size is refused, by the proof or by export."""
    assert "TORCH_EXPORT can't serve" in facts["refused"]["bakes_batch"]


def test_a_new_compiled_kind_is_promoted_by_auto(facts) -> None:
    """AUTO uses HOOK at once, and the kind that it prefers once its plan is ready."""
    assert facts["promoted"] == ["HOOK", "TORCH_EXPORT"]


def test_auto_promotes_the_next_compiled_kind_where_the_first_can_not_compile(facts) -> None:
    """If the preferred kind refuses, only its own plan is missing."""
    assert facts["not_compiled"] == ["HOOK", "TORCHSCRIPT"]


def test_a_new_compiled_kinds_programs_are_stored(facts) -> None:
    """A declared layer's program is compiled at the first start, and loaded at the second."""
    first, second = facts["stored"]["starts"]
    assert first[:2] == second[:2] == ["TORCH_EXPORT", True]
    assert first[2] == second[2] > 0
    assert facts["stored"]["files"] == 1
