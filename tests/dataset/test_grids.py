"""Grids, concatenations and projections of data sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import layertap
from layertap.cli.main import main
from layertap.dataset import extract
from layertap.errors import InvalidInputError
from tinynets import ITEM


@pytest.fixture
def items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Seven items in items.npy, and a projection in pca.npz, in the current folder."""
    monkeypatch.chdir(tmp_path)
    array = np.random.default_rng(0).random((7, *ITEM), np.float32)
    np.save("items.npy", array)
    np.savez(
        "pca.npz",
        components_=np.random.default_rng(1).random((3, 24), np.float32),
        mean_=np.random.default_rng(2).random(24, np.float32),
    )
    return array


LAYERS = ["layer1+layer2:around=3=patches", "layer2:pool=1x2", "bn1"]


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_rows_are_those_of_one_call(items: np.ndarray, suffix: str) -> None:
    """Each item's row is its part of the tensor that a single call returns."""
    command = [
        "extract",
        "tinynets:residual",
        "items.npy",
        "-o",
        f"out.{suffix}",
        "--item-shape",
        "3,16,16",
        "--extractor",
        "hook",
        "--batch-size",
        "3",
        "--device",
        "cpu",
    ]
    layers = [*LAYERS, "layer1+layer2:reduce=global_average_pool:project=@pca.npz=codes"]
    done = CliRunner().invoke(main, [*command, *(f"-l{layer}" for layer in layers)])
    assert done.exit_code == 0, done.output
    codes = layertap.LayerSelection.parse(layers[-1], layertap.Projection.load)
    with layertap.load("tinynets:residual", item_shape=ITEM, device="cpu") as model:
        expected = model.extract(items, [*LAYERS, codes], extractor="hook").numpy()
    if suffix == "npz":
        with np.load("out.npz") as stored:
            found = {name: stored[name] for name in stored.files}
    else:
        import pyarrow.parquet as pq

        table = pq.read_table("out.parquet")
        found = {
            name: np.stack(table[name].to_numpy()).reshape(expected[name].shape)
            for name in expected
        }
    assert expected["codes"].shape == (7, 3)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-6, err_msg=name)


def test_another_matrix_is_another_run(items: np.ndarray) -> None:
    """A run with a changed matrix does not continue the former one, and the message says why."""
    del items
    with np.load("pca.npz") as stored:
        matrix = stored["components_"]
    selection = layertap.LayerSelection.parse("layer1+layer2:pool=1x1")
    with layertap.load("tinynets:residual", item_shape=ITEM, device="cpu") as model:
        for factor in (1, 1, 2):
            projection = layertap.Projection(factor * matrix)
            asked = [
                layertap.LayerSelection(
                    "layer1", concat=("layer2",), regrid=selection.regrid, projection=projection
                )
            ]
            if factor == 2:
                with pytest.raises(InvalidInputError, match=r"projection\.matrix\.sha256"):
                    extract(model, ["items.npy"], asked, "out.npz")
            else:
                assert extract(model, ["items.npy"], asked, "out.npz").rows == 7
