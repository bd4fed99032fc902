"""The catalogue's claims are tested when a model is loaded, not by the first request."""

from __future__ import annotations

import gc

import pytest
import torch

from layertap.extraction import Catalogue, PlanBuilder, Taps
from layertap.extraction.claims import kept_claims
from layertap.extraction.digest import MAX_SAMPLED, Digest, digest_pass, sample_step
from layertap.extraction.kinds.registry import KINDS
from layertap.extraction.measure import measure_with_graph
from layertap.extraction.own_words import compiler_words
from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.points import CapturePoint, Dim, PointKind, ValueSpec
from layertap.extraction.samples import ordinary_batch
from layertap.extraction.trial import tried
from layertap.models import Batch, LoadedModel, ModelSpec, load_model
from layertap.selection import Capture, Extractor
from layertap.silence import warnings_ignored
from quick import QUICK
from tinynets import ITEM

OUTPUT, INPUT = Capture.OUTPUT, Capture.INPUT
TORCHSCRIPT, FX, HOOK = Extractor.TORCHSCRIPT, Extractor.FX, Extractor.HOOK


def loaded(net: str, item: tuple[int, ...] = ITEM) -> LoadedModel:
    return tried(load_model(ModelSpec(net if ":" in net else f"claimnets:{net}", item_shape=item)))


def claims(model: LoadedModel) -> Catalogue:
    with torch.inference_mode():
        *_, catalogue = kept_claims(model, *measure_with_graph(model))
    assert catalogue is not None
    return catalogue


def refusals(catalogue: Catalogue, extractor: Extractor = TORCHSCRIPT) -> dict[str, str]:
    """Return why an extractor can't serve the layers' outputs; empty if it can."""
    return {entry.name: entry.refusal(extractor) for entry in catalogue}


def test_layers_before_a_fault_are_served() -> None:
    """A loop over the items of a batch fails at another number of items; earlier layers do not."""
    catalogue = claims(loaded("proofnets:per_item"))
    refused = refusals(catalogue)
    assert refused["encoder"] == ""
    assert refused["decoder"].startswith("a compiled program fails at batch size 3 (RuntimeError:")
    assert refused["out"]
    assert refused["output"]
    assert catalogue.entry("out").serves(HOOK, OUTPUT)


def test_one_odd_layer_does_not_cost_the_others() -> None:
    """A layer that a program can't return is refused, and later layers are served."""
    refused = refusals(claims(loaded("forked")))
    assert "the model can't be compiled" in refused["forked"]
    assert (refused["first"], refused["middle"], refused["last"]) == ("", "", "")


def test_a_way_that_cannot_be_compiled_is_refused_before_a_request_takes_it() -> None:
    """A layer that no program of the other branch can return is refused, and others aren't."""
    refused = refusals(claims(loaded("forked_sometimes")))
    assert refused["forked"].startswith(
        "for input that takes another branch, the model can't be compiled"
    )
    assert (refused["first"], refused["middle"], refused["last"]) == ("", "", "")


@pytest.mark.parametrize(
    "net",
    ["guardnets:sign", "guardnets:nested", "guardnets:threshold",
     "claimnets:constant_items_sometimes"],
)  # fmt: skip
def test_layers_after_a_branch_are_claimed_if_every_way_can_be_compiled(net: str) -> None:
    """Layers after a branch are served where programs of both ways are right."""
    assert not any(refusals(claims(loaded(net))).values())


@pytest.mark.parametrize("net", ["one_or_many", "constant_items"])
def test_programs_are_recorded_from_the_number_of_items_that_works(net: str) -> None:
    """The program of two items holds for all sizes in one net, that of one item in the other."""
    assert not any(refusals(claims(loaded(net))).values())


def test_only_the_layers_whose_values_differ_are_refused() -> None:
    """The reason has the batch size and the difference."""
    catalogue = claims(loaded("repeats"))
    refused = refusals(catalogue)
    assert refused["conv"] == ""
    assert refused["pooled"] == (
        "at batch size 3 a compiled program differs from the model: its shape is [2, 4], the "
        "model's is [3, 4]"
    )
    assert not catalogue.entry("prompt").serves(TORCHSCRIPT, INPUT)


def test_large_layers_are_compared_too() -> None:
    """A layer of which only some elements are compared is refused if these differ."""
    model = loaded("large_mean", (3, 16, 16))
    catalogue = claims(model)
    point = CapturePoint(PointKind.MODULE, "shared")
    assert sample_step(catalogue.specs[point]) > 1
    assert refusals(catalogue)["conv"] == ""
    assert "at batch size 3" in refusals(catalogue)["shared"]


def test_optimising_is_tried_as_well() -> None:
    """A program that torch can't optimise, or can't run afterwards, is refused."""
    refused = refusals(claims(loaded("clamps_below")))
    assert refused["first"] == ""
    assert "RuntimeError" in refused["last"]


@pytest.mark.long
def test_programs_that_may_end_the_process_run_in_another() -> None:
    """A state for a batch of one is refused; an ordinary recurrent model is served."""
    wrong = refusals(claims(loaded("proofnets:fixed_state", (12,))))
    assert wrong["rnn.0"]
    assert wrong["output"]
    right = refusals(claims(loaded("proofnets:recurrent", (12,))))
    assert right["head"] == ""


@pytest.mark.parametrize(
    ("net", "layer", "reason"),
    [
        ("own_call", "first", "__call__"),
        ("own_hook", "first", "hooks of its own"),
        ("clips", "last", "differs from the model"),
        ("dead_clamp", "first", "dead-code elimination"),
        ("dead_chain", "first", "differs from the model"),
    ],
)
def test_fx_is_refused_what_its_graph_lacks(net: str, layer: str, reason: str) -> None:
    """Code around ``forward``, unused in-place statements, and differences for large numbers."""
    assert reason in refusals(claims(loaded(net)), FX)[layer]


def test_a_value_that_is_there_for_some_inputs_only_is_left_to_hook() -> None:
    """No other extractor claims a member that some inputs don't have."""
    model = loaded("sometimes_tuple")
    entry = claims(model).entry("maybe")
    assert entry.served_by(OUTPUT) == [HOOK]
    assert "only for some inputs" in entry.refusal(Extractor.CHILDREN)


@pytest.mark.parametrize(
    "net",
    ["forked", "repeats", "clamps_below", "dead_clamp", "dead_chain", "clips", "sometimes_tuple",
     "depth", "proofnets:per_item", "proofnets:plain_norm", "tinynets:block",
     "one_or_many", "constant_items"],
)  # fmt: skip
def test_what_is_claimed_is_what_a_request_gets(net: str) -> None:
    """Every claim can be built as a plan: alone, and all of one extractor together."""
    model = loaded(net)
    catalogue = claims(model)
    builder = PlanBuilder(model, Taps(model.module), catalogue)
    for extractor in QUICK:
        served = [
            point
            for entry in catalogue
            for side, point in entry.points.items()
            if entry.serves(extractor, side)
        ]
        points = dict.fromkeys(served)
        for some in ([*points], *([point] for point in points)):
            if some:
                pass_spec, x = PassSpec(tuple(some)), ordinary_batch(model, 1)
                # Of code that branches on values, the plan is that of the example's way.
                outcome = (
                    builder.outcomes.observe(pass_spec, x) if KINDS[extractor].compiled else ()
                )
                builder.build(extractor, pass_spec, x.key, outcome, example=x)


def test_a_trial_leaves_nothing_on_the_model() -> None:
    """Neither hooks nor parts of a program remain after the trial."""
    model = loaded("proofnets:per_item")
    claims(model)
    gc.collect()
    for module in model.module.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_without_the_memory_for_a_trial_the_claims_stay(monkeypatch, caplog) -> None:
    """The log says that the claims are tested at the first request."""

    def fails(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(type(KINDS[TORCHSCRIPT]), "compile", fails)
    assert refusals(claims(loaded("repeats")))["pooled"] == ""
    assert "not enough memory to test" in caplog.text


def test_a_digest_tells_what_differs() -> None:
    """Shape, dtype, values and the places of NaN are compared, within a tolerance."""
    value = torch.rand(2, 3, 64, 64)
    value[0, 0, 0, 0] = float("nan")
    step = sample_step(ValueSpec(value.dtype, tuple(Dim(size) for size in value.shape)))
    assert step > 1
    kept = Digest.of(value, step)
    assert kept.elements.numel() <= 2 * MAX_SAMPLED
    assert not kept.finite
    assert kept.fault(value, 0.0) == ""
    assert "shape" in kept.fault(value[:1], 0.0)
    assert "type" in kept.fault(value.double(), 0.0)
    assert kept.fault(value + 1e-6, 1e-4) == ""
    assert "differs" in kept.fault(value + 1e-6, 0.0)
    assert "differs" in kept.fault(torch.roll(value, 1, 2), 1e-4)
    assert "NaN" in kept.fault(value.nan_to_num(), 1e-4)


def test_of_very_many_values_fewer_elements_are_compared() -> None:
    """Of one value 4096, of 2,800 about 1,500 each, of any number at least 512."""
    spec = ValueSpec(torch.float32, (Dim(64), Dim(100), Dim(100)))
    elements = 64 * 100 * 100
    for values, least, most in ((1, 4000, 4096), (2800, 1400, 1500), (1 << 20, 500, 512)):
        assert least <= elements / sample_step(spec, values) <= most


def test_an_error_is_a_share_of_the_largest_magnitude_of_all_elements() -> None:
    """This holds even if that magnitude is between the sampled elements."""
    value = torch.ones(3, 64, 64)
    step = sample_step(ValueSpec(value.dtype, tuple(Dim(size) for size in value.shape)))
    value.view(-1)[1] = 1000.0
    assert Digest.of(value, step).fault(value + 1e-2, 1e-4) == ""


def test_an_input_that_another_module_returned_is_its_twin() -> None:
    """The same tensor is kept once; a tensor that was computed in between is separate."""
    model = loaded("repeats")
    conv, prompt, pooled = (
        CapturePoint(PointKind.MODULE, name, side)
        for name, side in (("conv", OUTPUT), ("prompt", OUTPUT), ("pooled", INPUT))
    )
    x = ordinary_batch(model, 1)
    assert digest_pass(model, x, dict.fromkeys((conv, prompt, pooled), 1)).twins == {}
    given = CapturePoint(PointKind.MODULE, "middle", INPUT)
    before = CapturePoint(PointKind.MODULE, "forked")
    model = loaded("forked")
    assert digest_pass(model, x, {given: 1, before: 1}).twins == {given: before}


def test_a_compilers_words_hold_no_code_and_no_paths() -> None:
    """The first line of its message is passed on, without the file that it names."""
    error = RuntimeError('bad name: File "/home/me/model.py", line 3\n x = secret')
    assert compiler_words(error) == "RuntimeError: bad name"
    assert compiler_words(ValueError()) == "ValueError"


def test_a_pass_that_ends_early_leaves_no_context_variable() -> None:
    """A ContextVar that a pass sets is unset when the pass ends, wherever that is."""
    model = loaded("depth")
    taps, point = Taps(model.module), CapturePoint(PointKind.MODULE, "last", INPUT)
    x, values = ordinary_batch(model, 1), []
    with torch.inference_mode():
        for _ in range(3):
            taps.run(model.forward, x, [point], lambda _, value: values.append(value.clone()))
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])


def test_attention_weights_of_packed_tokens_are_served() -> None:
    """They equal those of the unpacked tokens; after an item's end they are 0."""
    with warnings_ignored():  # torch warns that nested tensors are a prototype.
        model = loaded("packs", (5,))
    ids = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 1, 0, 0]])
    layer = "encoder.layers.0.self_attn"
    point = CapturePoint(PointKind.MODULE, layer, member=("attention_weights",))
    found: list[torch.Tensor] = []
    with torch.inference_mode(), warnings_ignored():
        Taps(model.module).run(
            model.forward,
            Batch({"ids": ids}),
            [point],
            lambda _, value: found.append(value.clone()),
        )
        attention, tokens = model.module.get_submodule(layer), model.module.embed(ids)
        _, expected = attention(
            tokens, tokens, tokens, key_padding_mask=ids == 0, average_attn_weights=False
        )
    expected[1, :, 3:] = 0
    assert torch.allclose(found[0], expected, atol=1e-6)


def test_half_precision_in_the_first_layer_does_not_decide_the_input() -> None:
    """A model that converts its input takes float32; one that does not takes its own dtype."""
    assert loaded("half_first").signature.main.dtype is torch.float32
    assert loaded("all_half").signature.main.dtype is torch.bfloat16
