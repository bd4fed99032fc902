"""Which layers may be padded is found by running items alone and padded, for every kind of model.

The nets of ``lengthnets`` leak in ways that mean a wrong value for a caller, so none may pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import hfnets
from layertap import Extractor, LayerSelection
from layertap.engine import Call
from layertap.extraction.padding import TokenAxis
from layertap.extraction.padding_proof import PADDING_TOLERANCE, PaddingFindings
from layertap.local import LocalModel, load
from layertap.models import Batch

TOKENS = 128


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalModel]:
    """A small BERT with its tokenizer, whose items may be padded."""
    folder = hfnets.wordpiece(hfnets.bert(tmp_path_factory.mktemp("nets") / "bert"))
    with loaded(f"hf:{folder}") as model:
        yield model


@contextmanager
def loaded(source: str, **settings: Any) -> Iterator[LocalModel]:
    """Load a model whose items may be padded."""
    if source.startswith("lengthnets:"):
        settings["item_shape"] = (16,)
    with load(source, max_tokens_per_pass=TOKENS, threads=1, **settings) as model:
        yield model


def layers(model: LocalModel) -> set[str]:
    """Return the layers that passed, for requests that give all inputs."""
    return {name for name in model.layers if name in passed(model)}


def findings(model: LocalModel) -> PaddingFindings:
    """Return what the test at load found."""
    lengths = model.host.lengths
    assert lengths is not None
    (found,) = lengths._found.values()
    return found


def passed(model: LocalModel) -> set[str]:
    """Return the names of the points that passed."""
    names = model.host.catalogue.names
    return {names[point] for point in findings(model).axes}


def test_a_mean_under_the_mask_passes() -> None:
    """A model that uses its mask keeps its values, in every layer."""
    with loaded("lengthnets:MaskedMean") as model:
        assert {"embed", "each", "head"} <= layers(model)
        assert "share passes" in " ".join(model.describe().notes)


@pytest.mark.parametrize(
    ("net", "layer"),
    [
        ("PlainMean", "head"),
        ("OverTime", "conv"),
        ("OverTime", "head"),
        ("NormalizedOverTime", "norm"),
        ("NormalizedOverTime", "head"),
        ("FromTheEnd", "head"),
        ("LongIsDifferent", "head"),
        ("ManyAreDifferent", "head"),
        ("Recurrent", "head"),
    ],
)
def test_a_model_whose_padding_leaks_is_never_shared(net: str, layer: str) -> None:
    """The layers behind a leak are refused with the size of the change; those before it pass."""
    with loaded(f"lengthnets:{net}") as model:
        assert layer not in layers(model)
        assert "embed" in layers(model)
        assert f"{layer!r} (padding changes its values by" in " ".join(model.describe().notes)


def test_code_that_looks_at_ids_is_never_shared() -> None:
    """A neighbour's ids could choose the branch, even if the difference is too small to see."""
    with loaded("lengthnets:LooksAtIds") as model:
        assert not layers(model)
        assert "branches on values of input_ids" in " ".join(model.describe().notes)


def test_a_causal_model_without_a_mask_passes() -> None:
    """Padding on the right is behind all tokens, so a running sum never sees it."""
    with loaded("lengthnets:Causal") as model:
        assert {"embed", "head"} <= layers(model)


def test_bert_with_its_mask_passes(bert: LocalModel) -> None:
    """An encoder keeps the states of every layer."""
    assert {"embeddings", "encoder.layer.0"} <= layers(bert)


@pytest.mark.parametrize(
    ("name", "settings", "layer"),
    [
        (
            "GPT2Model",
            {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 40},
            "h.0",
        ),
        ("LlamaModel", {**hfnets.TEXT, "num_key_value_heads": 2}, "layers.0"),
    ],
)
def test_causal_decoders_pass(
    tmp_path: Path, name: str, settings: dict[str, Any], layer: str
) -> None:
    """Decoders of transformers keep the states of every layer, too."""
    folder = hfnets.wordpiece(hfnets.saved(tmp_path / "net", name, **settings))
    with loaded(f"hf:{folder}") as model:
        assert layer in layers(model)


def test_bert_without_its_mask_is_never_shared(bert: LocalModel) -> None:
    """The findings hold for the inputs that are given: without a mask, padding is attended to."""
    lengths = bert.host.lengths
    assert lengths is not None
    chosen = (LayerSelection("encoder.layer.0"),)
    pass_spec = bert.host.resolve(chosen, Extractor.HOOK).pass_spec
    ids = torch.ones(1, 5, dtype=torch.int64)
    masked = Batch({"input_ids": ids, "attention_mask": ids})
    assert lengths.padding(pass_spec, masked, Call()) is not None
    assert lengths.padding(pass_spec, Batch({"input_ids": ids}), Call()) is None


@pytest.mark.parametrize("rows", [[0, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 0]])
def test_a_mask_with_padding_before_a_token_is_not_padded(
    bert: LocalModel, rows: list[int]
) -> None:
    """Looks at masks were only tested with padding on the right."""
    axis = TokenAxis.of(bert.host.model)
    assert axis is not None
    ids = torch.ones(2, 4, dtype=torch.int64)
    assert axis.pads_on_the_right(Batch({"input_ids": ids, "attention_mask": ids}))
    mask = torch.tensor([[1, 1, 1, 0], rows])
    assert not axis.pads_on_the_right(Batch({"input_ids": ids, "attention_mask": mask}))


def test_inputs_are_padded_with_what_stands_for_padding(bert: LocalModel) -> None:
    """Ids get the tokenizer's padding id, masks the number for padding, token types 0."""
    axis = TokenAxis.of(bert.host.model)
    assert axis is not None
    three = torch.full((1, 3), 7)
    x = {"input_ids": three, "attention_mask": three // 7, "token_type_ids": three // 7}
    padded = axis.padded(Batch(x), 5)
    assert padded["input_ids"].tolist() == [[7, 7, 7, 0, 0]]
    assert padded["attention_mask"].tolist() == [[1, 1, 1, 0, 0]]
    assert padded["token_type_ids"].tolist() == [[1, 1, 1, 0, 0]]


def test_without_the_setting_nothing_is_tested_and_nothing_padded() -> None:
    """By default each request has the values of its own pass, bit for bit."""
    with load("lengthnets:MaskedMean", item_shape=(16,), threads=1) as model:
        assert model.host.lengths is None


def test_an_image_model_has_no_tokens() -> None:
    """The setting changes nothing for models that take no token ids."""
    with loaded("tinynets:residual", item_shape=(3, 32, 32)) as model:
        assert model.host.lengths is None


def test_the_tolerance_is_the_one_that_the_docs_state() -> None:
    """In float32, padding may change a value by 1e-5 of the item's largest magnitude."""
    assert PADDING_TOLERANCE[torch.float32] == 1e-5
