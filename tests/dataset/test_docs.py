"""The examples of docs/datasets.md work as they are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from layertap.cli.main import main

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "datasets.md").read_text("utf-8")


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture(autouse=True)
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with two photos, below the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for name in ("a.png", "b.png"):
        Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "photos" / name)


def test_the_command(tmp_path: Path) -> None:
    """It writes a row for each photo, with the layers' own reductions and dtypes."""
    _, *arguments = shlex.split(block("sh").replace("\\\n", " "))
    # Measured at a small size, which takes most of the time; photos keep their size.
    small = ["--item-shape", "3,64,64", "--image-resize", "256", "--image-crop", "224"]
    done = CliRunner().invoke(main, [*arguments, "--weights", "random", *small])
    assert done.exit_code == 0, done.output
    table = pq.read_table(tmp_path / "features.parquet")
    assert table.column_names == ["ids", "layer2", "pooled"]
    assert table["ids"].to_pylist() == ["photos/a.png", "photos/b.png"]
    assert str(table["pooled"].type) == "fixed_size_list<element: halffloat>[256]"


def test_the_function(tmp_path: Path) -> None:
    """It returns what it did."""
    names: dict[str, object] = {}
    exec(block("python"), names)  # noqa: S102 - our own example
    assert names["outcome"].rows == 2
    with np.load(tmp_path / "features.npz") as stored:
        assert stored["layer4"].shape == (2, 512)
