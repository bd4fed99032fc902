"""The proof of models of public packages starts and finds what is right.

The whole of it is ``make test-packages``, which takes an hour.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROVE = Path(__file__).resolve().parent / "packages" / "prove_packages.py"


def test_a_model_is_proven(tmp_path: Path) -> None:
    """One model of the group whose package the tests have."""
    file = tmp_path / "rows.json"
    command = [sys.executable, "-W", "ignore", PROVE, "huggingface", "mamba", "--write", file]
    subprocess.run(command, check=True, capture_output=True)
    (row,) = json.loads(file.read_text("utf-8"))
    assert not row["wrong"]
    assert not row["failed"]
    assert row["answers"] > 100
    assert row["right"]["HOOK"] > 10
