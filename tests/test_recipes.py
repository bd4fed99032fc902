"""The recipes of docs/recipes.md run as they are, and give the right results."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch.nn import functional

import layertap
from layertap.cli.main import main
from layertap.local import LocalModel
from recipe_pictures import LABELS, draw_parts, draw_patterns, draw_photos

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "recipes.md").read_text("utf-8")
PICTURE = ROOT / "docs" / "recipes_patchcore.png"
WRITE = "LAYERTAP_WRITE_PICTURES"
"""Set to 1 to write the page's picture again."""
SMALL: dict[str, Any] = {"item_shape": (3, 64, 64), "image_resize": (256,), "image_crop": (224,)}
"""Measures a model at a small size and gives it photos of the usual size."""


def blocks(recipe: str) -> list[tuple[str, str]]:
    """Return the language and the text of each block of a recipe."""
    section = re.search(
        rf"^## {re.escape(recipe)}\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE
    )
    assert section is not None
    return re.findall(r"```(\w+)\n(.*?)```", section[1], re.DOTALL)


@pytest.fixture(autouse=True)
def random_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty current folder, and random weights for all models, as none can be downloaded.

    Each model is loaded once for a test, and measured at a small size, as that takes most of the
    time. Photos keep the size that the model's preprocessing gives them.
    """
    monkeypatch.chdir(tmp_path)
    models: dict[str, LocalModel] = {}
    load = layertap.load

    def once(source: str) -> AbstractContextManager[LocalModel]:
        if source not in models:
            models[source] = load(source, weights="random", device="cpu", **SMALL)
        return nullcontext(models[source])

    monkeypatch.setattr(layertap, "load", once)
    yield
    for model in models.values():
        model.close()


def run(recipe: str, failed: int = 0) -> dict[str, Any]:
    """Run the blocks of a recipe in order; return the names that its Python defines.

    Args:
        recipe: The recipe's heading.
        failed: The number of items that can't be read.
    """
    names: dict[str, Any] = {}
    for language, code in blocks(recipe):
        if language == "python":
            exec(code, names)  # noqa: S102 - our own page
            continue
        assert language == "sh"
        _, *arguments = shlex.split(code.replace("\\\n", " "))
        for name, value in {"weights": "random", "device": "cpu", **SMALL}.items():
            sizes = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            arguments += [f"--{name.replace('_', '-')}", sizes]
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == (3 if failed else 0), done.output
        assert f"{failed} of" in done.output or not failed
    return names


@pytest.mark.long
def test_similar_photos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The nearest photos are those of a search by hand, and the codes are the PCA's."""
    draw_photos(tmp_path / "photos", 36)
    (tmp_path / "query.jpg").write_bytes((tmp_path / "photos" / "005.jpg").read_bytes())
    names = run("Find similar photos", failed=1)
    ids, places = names["ids"], names["places"]
    assert len(ids) == 38
    assert ids[places[0][0]] == "photos/005.jpg"
    vectors = np.load("photos.npy/vectors.npy").astype(np.float64)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = unit @ unit[list(ids).index("photos/005.jpg")]
    assert places[0].tolist() == np.argsort(-cosines)[:3].tolist()
    printed = capsys.readouterr().out
    assert "1.000 photos/005.jpg" in printed
    codes, expected = np.load("codes.npy/codes.npy"), names["pca"].transform(vectors)
    assert codes.dtype == np.float16
    np.testing.assert_allclose(codes, expected, atol=2e-3 * np.abs(expected).max())


def test_near_duplicates(tmp_path: Path) -> None:
    """The copies are found, and no other pair."""
    pairs = draw_photos(tmp_path / "photos", 12)
    names = run("Find near-duplicates", failed=1)
    assert sorted(names["duplicates"]) == sorted(pairs)


def test_a_linear_probe(tmp_path: Path) -> None:
    """Each stage is far better than chance even with random weights, and none sees the labels."""
    draw_patterns(tmp_path / "patterns", 16)
    names = run("Which layer knows it? A linear probe")
    assert set(names["labels"]) == set(LABELS)
    assert list(names["accuracy"]) == ["layer1", "layer2", "layer3", "layer4"]
    assert min(names["accuracy"].values()) > 0.5 > 1 / len(LABELS)
    assert max(names["accuracy"].values()) > 0.75


@pytest.mark.long
def test_patchcore(tmp_path: Path) -> None:
    """Both defects are found, at their places; patches, memory, maps and scores are as written."""
    defects = draw_parts(tmp_path / "good", tmp_path / "parts", 8)
    names = run("Find defects: PatchCore")
    scores, maps = names["scores"], names["maps"]
    good = max(value for name, value in scores.items() if name not in defects)
    for name, (x, y) in defects.items():
        assert scores[name] > 1.15 * good
        row, column = np.unravel_index(int(maps[name].argmax()), (28, 28))
        assert abs(8 * column + 4 - x) < 32
        assert abs(8 * row + 4 - y) < 32
    check_patches(list(names["names"]))
    check_memory(names)
    check_scores(names)
    if os.environ.get(WRITE) == "1":
        PICTURE.write_bytes(Path("worst.png").read_bytes())
    made = np.asarray(Image.open("worst.png"), np.float64)
    shown = np.asarray(Image.open(PICTURE), np.float64)
    assert np.abs(made - shown).mean() < 2


def check_patches(names: list[str]) -> None:
    """Compare the patches with those that plain PyTorch makes of the same layers."""
    with layertap.load("wide_resnet50_2") as model:
        found = model.extract(names[0], ["layer2", "layer3"], extractor="hook")
    near = [functional.avg_pool2d(found[each].cpu(), 3, 1, 1) for each in ("layer2", "layer3")]
    near[1] = functional.interpolate(near[1], (28, 28), mode="bilinear", align_corners=False)
    expected = torch.cat(near, 1)[0].numpy()
    patches = np.load("parts.npy/patches.npy")[0]
    assert patches.shape == (1536, 28, 28)
    np.testing.assert_allclose(patches, expected, atol=1e-4 * np.abs(expected).max())


def check_memory(names: dict[str, Any]) -> None:
    """Compare the memory with a greedy choice by numpy, from all distances."""
    rows = names["rows"](np.load("good.npy/patches.npy"))[::40]
    draw = torch.Generator().manual_seed(0)
    small = (rows @ torch.randn(rows.shape[1], 128, generator=draw)).double().numpy()
    distances = np.linalg.norm(small[:, None] - small[None], axis=2)
    chosen = [0]
    while len(chosen) < 0.1 * len(rows):
        chosen.append(int(distances[chosen].min(0).argmax()))
    assert torch.equal(names["coreset"](rows, 0.1), rows[chosen])
    assert len(names["memory"]) == -(-8 * 28 * 28 // 20)


def check_scores(names: dict[str, Any]) -> None:
    """Compare maps and scores with the formulas of the paper, in numpy and float64."""
    memory = names["memory"].double().numpy()
    for name, patches in zip(names["names"], np.load("parts.npy/patches.npy"), strict=True):
        rows = patches.reshape(1536, -1).T.astype(np.float64)
        squares = (rows**2).sum(1)[:, None] + (memory**2).sum(1) - 2 * rows @ memory.T
        distances = np.sqrt(squares.clip(0))
        nearest = distances.min(1)
        np.testing.assert_allclose(
            names["maps"][name].flatten(), nearest, rtol=1e-3, atol=5e-3 * nearest.max()
        )
        worst = nearest.argmax()
        best = distances[worst].argmin()
        around = np.argsort(np.linalg.norm(memory - memory[best], axis=1))[:9]
        # Equation 7 of the paper: m* itself is the first of its neighbours.
        e = np.exp(distances[worst, around] - distances[worst, around].max())
        assert names["scores"][name] == pytest.approx(
            (1 - e[0] / e.sum()) * nearest[worst], rel=2e-3
        )
