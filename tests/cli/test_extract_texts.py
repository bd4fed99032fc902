"""``layertap extract`` writes layers of texts, given as arguments or in a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

import hfnets
from layertap import Texts, load
from layertap.cli.main import main

TEXTS = ["the cat sat", "a bird flew on", "it was happy ."]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of a small BERT with its tokenizer."""
    return f"hf:{hfnets.wordpiece(hfnets.bert(tmp_path_factory.mktemp('m') / 'bert'))}"


def extract(*args: object) -> Result:
    return CliRunner().invoke(main, ["extract", *map(str, args)])


@pytest.mark.parametrize("reduction", ["global_average_pool", "tokens"])
def test_texts_of_a_file_and_of_arguments(model: str, tmp_path: Path, reduction: str) -> None:
    """They are joined over several passes, in their order, with the values of one pass."""
    (tmp_path / "texts.txt").write_text("\n".join(["", *TEXTS[1:], "  "]), "utf-8")
    out = tmp_path / "out.npz"
    done = extract(model, "--text", TEXTS[0], "--texts", tmp_path / "texts.txt", "-o", out,
                   "-l", "encoder.layer.0", "--reduce", reduction, "--batch-size", 2)  # fmt: skip
    assert done.exit_code == 0, done.output
    with load(model) as loaded:
        whole = loaded.extract(Texts(TEXTS, return_tokens=True), "encoder.layer.0")
        mask = whole["tokens.mask"].bool()
    states = whole["encoder.layer.0"]
    pooled = [row[counts].mean(0).numpy() for row, counts in zip(states, mask, strict=True)]
    expected = states[mask].numpy() if reduction == "tokens" else np.stack(pooled)
    with np.load(out) as stored:
        assert np.allclose(stored["encoder.layer.0"], expected, atol=1e-5)
        assert stored["ids"].tolist() == [
            "--text:1",
            *(f"{tmp_path}/texts.txt:{n}" for n in (2, 3)),
        ]
        if reduction == "tokens":
            ends = np.cumsum([0, *mask.sum(1)])
            assert stored["encoder.layer.0.offsets"].tolist() == ends.tolist()


def test_what_can_not_be_read_is_refused(model: str, tmp_path: Path) -> None:
    """Texts or images must be given, not both, and the file must be there and be UTF-8."""
    out = ("-o", tmp_path / "out.npz", "-l", "pooler")
    assert "give one of: INPUTs, texts" in extract(model, *out).output
    assert "give one of: INPUTs, texts" in extract(model, "a.png", "--text", "a", *out).output
    assert "No such file" in extract(model, "--texts", tmp_path / "none.txt", *out).output
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert "it is not UTF-8" in extract(model, "--texts", tmp_path / "latin.txt", *out).output
