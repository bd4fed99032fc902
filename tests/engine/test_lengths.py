"""Items of different lengths share passes, and every answer is that of its item alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hfnets
from asking import ask
from kept import kept
from layertap import Client, Extractor, LayerSelection, Projection, Texts
from layertap.batching import BatchPolicy
from layertap.engine import Engine, HostOptions
from layertap.engine.lengths import Padding
from layertap.extraction.padding_proof import PADDING_TOLERANCE
from layertap.extraction.verify import difference
from layertap.local import LocalModel, load
from layertap.models import ModelSpec
from serving import running_server
from together import Together, asking

POLICY = BatchPolicy(max_size=16, max_tokens=128)
TOLERANCE = PADDING_TOLERANCE[torch.float32]
LAYER = "encoder.layer.0"
TWO_INPUTS: dict[str, dict[str, Any]] = {
    "T5Model": {"decoder_start_token_id": 0, "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 37,
                "num_layers": 2, "num_heads": 4},
    "CLIPModel": {"text_config": {**hfnets.TEXT, "eos_token_id": 3, "projection_dim": 16},
                  "vision_config": {**hfnets.VISION, "projection_dim": 16}, "projection_dim": 16},
}  # fmt: skip
"""Settings of models that take texts and something else."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT with its tokenizer."""
    return hfnets.wordpiece(hfnets.bert(tmp_path_factory.mktemp("models") / "bert"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    """An engine with one compute thread, which tests can block."""
    engine = Engine(plan_cache=kept())
    engine.load(ModelSpec(f"hf:{folder}"), options=HostOptions(batching=POLICY))
    engine.load(
        ModelSpec("lengthnets:PlainMean", item_shape=(16,)), options=HostOptions(batching=POLICY)
    )
    engine.load(
        ModelSpec("lengthnets:MaskedMean", item_shape=(16,)), options=HostOptions(batching=POLICY)
    )
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def divided(folder: Path) -> Iterator[LocalModel]:
    """The BERT in this process; requests are divided into passes of at most 64 tokens."""
    with load(f"hf:{folder}", max_tokens_per_pass=64, threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def whole(folder: Path) -> Iterator[LocalModel]:
    """The same BERT without the setting."""
    with load(f"hf:{folder}", threads=1) as model:
        yield model


def texts(count: int, longest: int = 26) -> list[str]:
    """Return texts of 1 to ``longest`` words."""
    chosen = random.Random(count)
    words = [word for word in hfnets.WORDS if not word.startswith("##")]
    return [
        " ".join(chosen.choices(words, k=1 + index * (longest - 1) // max(1, count - 1)))
        for index in chosen.sample(range(count), count)
    ]


def ids(length: int, seed: int, mask: bool = True) -> dict[str, torch.Tensor]:
    """Return one item of random ids."""
    drawn = torch.randint(1, 50, (1, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": drawn, "attention_mask": torch.ones_like(drawn)}


def assert_close(value: torch.Tensor | np.ndarray, alone: torch.Tensor | np.ndarray) -> None:
    """Compare a value with that of its item alone, within the stated tolerance."""
    assert difference(torch.as_tensor(value), torch.as_tensor(alone)) <= 2 * TOLERANCE


def test_requests_of_different_lengths_share_a_pass(engine: Engine) -> None:
    """Each gets its own shape and its own values; neighbours and padding don't show."""
    asked = [ids(length, length) for length in (10, 11, 12, 11)]
    alone = [ask(engine, "bert", LAYER, x, Extractor.HOOK)[LAYER] for x in asked]
    together = Together(engine, asking(engine, "bert", LAYER, asked))
    assert together.shared == [4, 4, 4, 4]
    for x, mine, expected in zip(asked, together.values(), alone, strict=True):
        assert tuple(mine[LAYER].shape) == (1, x["input_ids"].shape[1], 32)
        assert_close(mine[LAYER], expected)


def test_a_net_whose_padding_leaks_never_shares_a_pass(engine: Engine) -> None:
    """The mean over all positions would be wrong; each request of its length runs alone."""
    asked = [ids(length, length) for length in (10, 11, 12, 11)]
    alone = [ask(engine, "PlainMean", "head", x)["head"] for x in asked]
    together = Together(engine, asking(engine, "PlainMean", "head", asked))
    lengths = [x["input_ids"].shape[1] for x in asked]
    for length, shared in zip(lengths, together.shared, strict=True):
        assert shared <= lengths.count(length)
    for mine, expected in zip(together.values(), alone, strict=True):
        assert_close(mine["head"], expected)


def test_a_request_for_a_compiled_extractor_is_not_padded(engine: Engine) -> None:
    """A program stands for one length, so a request that names its kind has its own pass."""
    asked = [ids(length, length) for length in (10, 11)]
    done = Together(engine, asking(engine, "MaskedMean", "head", asked, Extractor.TORCHSCRIPT))
    assert done.shared == [1, 1]


@pytest.mark.parametrize(
    "reduction",
    ["none", "global_average_pool", "token_max", "class_token", "last_token", "tokens", "words"],
)
def test_a_divided_request_has_the_values_of_each_text(
    divided: LocalModel, whole: LocalModel, reduction: str
) -> None:
    """The order is that of the request, in every form of reply, whatever passes they ran in."""
    given = texts(24)
    selection = LayerSelection(LAYER, reduction=reduction)
    found = divided.extract(Texts(given, return_tokens=True), [selection])
    plain = whole.extract(Texts(given, return_tokens=True), [selection])
    assert found[LAYER].shape == plain[LAYER].shape
    assert torch.equal(found["tokens.ids"], plain["tokens.ids"])
    mask = plain["tokens.mask"].bool()
    if reduction == "none":
        assert not found[LAYER][~mask].any()  # Padding is zero where a request is divided.
        assert_close(found[LAYER][mask], plain[LAYER][mask])
    else:
        assert_close(found[LAYER], plain[LAYER])


@pytest.mark.parametrize("reduction", ["none", "global_average_pool", "tokens", "words"])
def test_a_divided_request_may_have_a_projection(divided: LocalModel, reduction: str) -> None:
    """The projection of each pass is that of the values without one."""
    given = texts(12)
    plain = LayerSelection(LAYER, reduction=reduction)
    value = divided.extract(Texts(given, return_tokens=True), [plain])
    mask = value["tokens.mask"].numpy().astype(bool)
    channels = value[LAYER].shape[-1]
    rng = np.random.default_rng(0)
    projection = Projection(rng.standard_normal((3, channels)), rng.standard_normal(channels))
    expected = (value[LAYER].double().numpy() - projection.mean) @ projection.matrix.T
    asked = LayerSelection(LAYER, reduction=reduction, projection=projection)
    found = divided.extract(Texts(given), [asked])[LAYER].numpy()
    assert found.shape == expected.shape
    there = mask if reduction == "none" else slice(None)
    np.testing.assert_allclose(found[there], expected[there], atol=1e-4)


@pytest.mark.parametrize("reduction", ["global_average_pool", "class_token", "tokens"])
def test_layers_of_texts_become_one_tensor(divided: LocalModel, reduction: str) -> None:
    """A concatenation of reduced states has the channels of both layers."""
    given = Texts(texts(12))
    names = ("embeddings", LAYER)
    apart = divided.extract(given, [LayerSelection(name, reduction=reduction) for name in names])
    one = LayerSelection(names[0], concat=names[1:], reduction=reduction, alias="both")
    found = divided.extract(given, [one])["both"]
    expected = torch.cat([apart[name] for name in names], 1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_each_text_of_a_divided_request_equals_the_text_alone(divided: LocalModel) -> None:
    """Sent one by one, the texts have the same values."""
    given = texts(12)
    found = divided.extract(Texts(given), LAYER)[LAYER]
    for row, text in zip(found, given, strict=True):
        alone = divided.extract(Texts(text), LAYER)[LAYER][0]
        assert_close(row[: len(alone)], alone)


def test_a_divided_request_computes_little_padding(divided: LocalModel) -> None:
    """One long text among short ones doesn't make the passes of the others longer."""
    shapes: list[tuple[int, int]] = []
    module = divided.host.model.module

    def see(_: object, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        x = args[0] if args else kwargs["input_ids"]
        shapes.append((x.shape[0], x.shape[1]))

    handle = module.register_forward_pre_hook(see, with_kwargs=True)
    try:
        divided.extract(Texts(["a cat"] * 12 + ["the dog ran " * 8]), LAYER)
    finally:
        handle.remove()
    assert sorted(shapes) == [(1, 26), (12, 4)]


def test_attention_maps_are_cut_in_both_dimensions(folder: Path) -> None:
    """Rows and columns of padding are zero in the reply, and the rest is right."""
    layer = "encoder.layer.0.attention.self.1"
    with load(
        f"hf:{folder}", attn_implementation="eager", max_tokens_per_pass=64, threads=1
    ) as model:
        given = ["the cat", "a bird flew under the tree and then it sat"]
        found = model.extract(Texts(given), layer)[layer]
        for row, text in zip(found, given, strict=True):
            alone = model.extract(Texts(text), layer)[layer][0]
            length = alone.shape[-1]
            assert_close(row[:, :length, :length], alone)
            assert not row[:, length:].any()
            assert not row[:, :, length:].any()


@pytest.mark.parametrize("name", [pytest.param("T5Model", marks=pytest.mark.long), "CLIPModel"])
def test_texts_beside_another_input_are_divided_right(tmp_path: Path, name: str) -> None:
    """A decoder's ids or an image go into the pass of their own text, whatever the order."""
    count = 12
    folder = hfnets.wordpiece(hfnets.saved(tmp_path / name, name, **TWO_INPUTS[name]))
    generator = torch.Generator().manual_seed(0)
    other, layers = {
        "T5Model": (
            {"decoder_input_ids": torch.randint(1, 60, (count, 3), generator=generator)},
            ["encoder.block.1.0", "decoder.block.1.0", "output.last_hidden_state"],
        ),
        "CLIPModel": (
            {"pixel_values": torch.rand(count, 3, 32, 32, generator=generator)},
            ["text_model.encoder.layers.0", "output.text_embeds", "output.image_embeds"],
        ),
    }[name]
    given = {"input_ids": Texts(texts(count), return_tokens=True), **other}
    with load(f"hf:{folder}", max_tokens_per_pass=64, threads=1) as model:
        found = model.extract(given, layers)
    with load(f"hf:{folder}", threads=1) as model:
        plain = model.extract(given, layers)
    mask = plain["tokens.mask"].bool()
    first, *rest = layers
    assert_close(found[first][mask], plain[first][mask])
    for layer in rest:
        assert_close(found[layer], plain[layer])


@pytest.mark.long
@pytest.mark.timeout(120)
def test_mixed_callers_under_load_get_the_answers_of_their_own_texts(
    folder: Path,
) -> None:
    """Eight callers of a server in throughput mode, single texts and lists, at the same time."""
    engine = Engine(instances=2, plan_cache=kept())
    engine.load(ModelSpec(f"hf:{folder}"), options=HostOptions(batching=POLICY))
    given = texts(40)
    try:
        with running_server(engine) as address, Client(address) as client:
            alone = [client.extract("bert", Texts(text), LAYER)[LAYER][0] for text in given]

            def call(caller: int) -> None:
                chosen = random.Random(caller)
                for _ in range(12):
                    picked = chosen.sample(range(len(given)), chosen.choice([1, 1, 1, 5]))
                    features = client.extract("bert", Texts([given[i] for i in picked]), LAYER)
                    for row, index in zip(features[LAYER], picked, strict=True):
                        assert_close(row[: len(alone[index])], alone[index])

            with ThreadPoolExecutor(8) as pool:
                for done in [pool.submit(call, caller) for caller in range(8)]:
                    done.result(100)
    finally:
        engine.close()


def parts(lengths: list[int], **changes: int) -> list[list[int]]:
    """Return the lengths of each pass of a request."""
    limits = {"max_length": 64, "items": 32, **changes}
    padding = Padding("k", None, max(lengths), [], **limits)  # type: ignore[arg-type]
    array = np.array(lengths)
    return [array[part].tolist() for part in padding.parts(array, BatchPolicy(max_tokens=64))]


def test_passes_are_sorted_by_length_and_within_the_budget() -> None:
    """The longest items come first, and padding counts."""
    assert parts([5, 30, 6, 31, 5, 6]) == [[31, 30], [6, 6, 5, 5]]
    assert parts([16] * 5) == [[16] * 4, [16]]


def test_a_pass_has_no_more_items_and_no_longer_ones_than_were_tested() -> None:
    """A text above the tested length runs alone, and many short texts take several passes."""
    assert parts([3] * 5, items=2) == [[3, 3], [3, 3], [3]]
    assert parts([30, 30], max_length=20) == [[30], [30]]


def test_every_item_is_in_one_pass() -> None:
    """None is lost or run twice, whatever the lengths are."""
    drawn = np.random.default_rng(0).integers(1, 70, 200)
    padding = Padding("k", None, 70, [], 64, 32)  # type: ignore[arg-type]
    found = np.concatenate(padding.parts(drawn, BatchPolicy(max_tokens=64)))
    assert sorted(found.tolist()) == list(range(200))
