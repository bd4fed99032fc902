"""Samples reach hidden code: ids of a whole table, magnitudes, NaN, and different items."""

from __future__ import annotations

import pytest
import torch

from layertap.extraction import PlanBuilder, Taps, measure
from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.samples import ordinary_batch, reaching_batches, unlike_batch
from layertap.extraction.trial import tried
from layertap.models import IdRange, LoadedModel, ModelSpec, load_model
from layertap.selection import Capture, Extractor
from tinynets import ITEM


def loaded(net: str, item_shape: tuple[int, ...] = ITEM) -> LoadedModel:
    return tried(load_model(ModelSpec(f"proofnets:{net}", item_shape=item_shape)))


@pytest.mark.parametrize(
    ("net", "item_shape", "expected"),
    [
        ("remaps_ids", (6,), IdRange(100)),
        ("largest_id", (6,), IdRange(1000, padding=3)),
        ("two_tables", (2,), IdRange(7)),
        ("picks", ITEM, None),
    ],
)
def test_ids_reach_over_the_table_that_they_are_looked_up_in(net, item_shape, expected) -> None:
    """The largest range with which the model runs is used; floating-point input has none."""
    model = loaded(net, item_shape)
    assert model.signature.main.values == expected
    if expected:
        most = max(int(ordinary_batch(model, 64).only.max()), 0)
        assert expected.rows // 2 < most < expected.rows


def test_ids_repeat_and_are_padded() -> None:
    """One item has low ids, one repeats the highest, and one ends with padding."""
    low, high, padded = unlike_batch(loaded("largest_id", (8,)), 3).only
    assert low.max() < 100
    assert (high[:4] == 999).all()
    assert (padded[4:] == 3).all()


def test_numbers_reach_over_magnitudes_and_beyond() -> None:
    """There are items of thousandths, of bytes and of thousands, and NaN and both infinities."""
    model = loaded("picks")
    unlike, odd = (batch.only for batch in reaching_batches(model))
    sizes = [float(item.abs().max()) for item in unlike_batch(model, 4).only]
    assert sizes[0] < 0.01
    assert 1 < sizes[1] < 20 < sizes[2] < 256 < sizes[3]
    assert unlike.isfinite().all()
    assert odd[0].isfinite().all()
    assert odd[1].isnan().any()
    assert odd.isposinf().any()
    assert odd.isneginf().any()


@pytest.mark.parametrize(
    ("net", "item_shape", "shares"),
    [
        ("largest_id", (8,), False),
        ("largest_number", ITEM, False),
        ("one_nan", ITEM, False),
        ("picks", ITEM, False),
        ("remaps_ids", (8,), True),
        ("plain_norm", ITEM, True),
    ],
)
def test_passes_are_shared_only_where_unlike_items_keep_apart(net, item_shape, shares) -> None:
    """A maximum over the batch, a NaN in one item, a near tie: only different items show them."""
    model = loaded(net, item_shape)
    catalogue = measure(model)
    builder = PlanBuilder(model, Taps(model.module), catalogue)
    last = [entry for entry in catalogue if entry.serves(Extractor.HOOK, Capture.OUTPUT)][-1]
    point = last.points[Capture.OUTPUT]
    plan = builder.build(Extractor.HOOK, PassSpec((point,)), model.signature.key)
    assert builder.prover.prove_shared(plan, 3) is shares


@pytest.mark.parametrize("extractor", [Extractor.CHILDREN, Extractor.LAYER_GETTER])
@pytest.mark.parametrize(
    ("net", "item_shape", "served"),
    [
        ("remaps_ids", (6,), set()),
        ("hides_from_symbols", ITEM, {"first"}),
        ("optional_arguments", ITEM, {"conv"}),
        ("catches", (4,), {"embed", "head"}),
    ],
)
def test_a_walk_is_claimed_only_up_to_the_first_other_operation(
    net, item_shape, served, extractor
) -> None:
    """Both the symbolic graph and a real pass must contain nothing but calls of the children."""
    catalogue = measure(loaded(net, item_shape))
    claimed = {entry.name for entry in catalogue if entry.serves(extractor, Capture.OUTPUT)}
    assert claimed == served


def test_the_range_is_kept_out_of_the_models_state() -> None:
    """Finding the range runs the model; the state that it writes is restored."""
    model = loaded("remaps_ids", (6,))
    fresh = load_model(ModelSpec("proofnets:remaps_ids", item_shape=(6,)))
    assert vars(model.module).keys() == vars(fresh.module).keys()
    assert not any(m._forward_hooks for m in model.module.modules())
    assert torch.equal(model.module.embed.weight, fresh.module.embed.weight)
