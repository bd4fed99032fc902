"""A guard finds out which way a model's code goes for an input, without running the model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import guardnets
from layertap.extraction.guards import MAX_LEAVES, GuardTree, Look, Tape, is_fraction, why_not
from layertap.extraction.looks import watch_looks
from layertap.models import Batch

ITEM = (3, 6, 6)


def looks_of(net: nn.Module, x: torch.Tensor) -> list[Look]:
    """Run a net on a batch and return its looks."""
    given = {"x": x.clone()}
    tape = Tape(net, given)
    with torch.inference_mode(), watch_looks(net, given, tape):
        net(given["x"])
    assert all(not why_not(look, tape.elements) for look in tape.looks)
    return tape.looks


def outcome_of(net: nn.Module, x: torch.Tensor) -> tuple[str, ...]:
    return tuple(look.outcome for look in looks_of(net, x))


def tree_of(net: nn.Module, *batches: torch.Tensor) -> GuardTree:
    tree = GuardTree()
    for x in batches:
        assert tree.add(looks_of(net, x))
    return tree


def floats(seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((2, *ITEM), generator=generator) * scale + shift


def ids(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


IMAGES = [floats(seed, scale, shift) for seed, (scale, shift) in enumerate(
    [(0.1, 0.5), (0.1, -0.5), (1.0, 0.0), (3.0, 0.0), (3.0, 1.0), (0.01, 0.3), (0.01, 0.2)]
)]  # fmt: skip
TEXTS = [
    ids([1, 2, 3, 4], [5, 6, 7, 8]),
    ids([1, 2, 3, 0], [5, 6, 7, 8]),
    ids([0, 2, 3, 1], [5, 6, 0, 0]),
    ids([9, 9, 9, 9], [9, 9, 9, 9]),
    ids([0, 0, 0, 0], [0, 3, 0, 0]),
]


@pytest.mark.parametrize(
    ("build", "batches"),
    [
        (guardnets.sign, IMAGES),
        (guardnets.nested, IMAGES),
        (guardnets.threshold, IMAGES),
        (guardnets.written, IMAGES),
        (guardnets.own_input, IMAGES),
        (guardnets.words, TEXTS),
        (guardnets.longest, TEXTS),
    ],
)
def test_a_guard_finds_the_outcome_that_the_model_has(
    build: Callable[[], nn.Module], batches: list[torch.Tensor]
) -> None:
    """For each batch the guard made of all finds what a pass of the model itself looked at."""
    net = build()
    tree = tree_of(net, *batches)
    expected = [outcome_of(net, x) for x in batches]
    assert len(set(expected)) > 1
    for x, outcome in zip(batches, expected, strict=True):
        before = x.clone()
        assert tree.outcome(Batch({"x": x})) == outcome
        assert torch.equal(x, before)


def test_a_guard_does_not_guess_outcomes_that_it_has_not_seen() -> None:
    """A batch that goes another way than those it was made of has no outcome yet."""
    positive, negative = IMAGES[:2]
    tree = tree_of(guardnets.sign(), positive)
    assert tree.outcome(Batch({"x": positive})) == ("True",)
    assert tree.outcome(Batch({"x": negative})) is None


def test_a_guard_reads_a_parameter_as_it_is() -> None:
    """The parameter is held by reference: it is not a constant of the time when it was recorded."""
    net = guardnets.threshold()
    low, high = IMAGES[6], IMAGES[5]
    tree = tree_of(net, low, high)
    assert tree.outcome(Batch({"x": high})) == ("True",)
    net.limit.data.fill_(9)
    assert tree.outcome(Batch({"x": high})) == ("False",)


def test_a_batch_need_not_be_contiguous() -> None:
    """Views with another layout than the recorded batch's give the same outcome."""
    net = guardnets.written()
    tree = tree_of(net, *IMAGES)
    for x in IMAGES:
        strided = torch.stack([x, -x], -1)[..., 0]
        assert not strided.is_contiguous()
        assert tree.outcome(Batch({"x": strided})) == outcome_of(net, x)


def test_an_unbounded_number_of_outcomes_does_not_make_an_unbounded_guard() -> None:
    """A tree keeps so many outcomes; further ones are not known to it."""
    net = guardnets.scaled()
    batches = [floats(seed) for seed in range(MAX_LEAVES + 5)]
    tree = tree_of(net, *batches)
    known = [tree.outcome(Batch({"x": x})) for x in batches]
    assert known.count(None) == 5
    assert tree.full


def reason(net: nn.Module, x: torch.Tensor) -> str:
    given = {"x": x.clone()}
    tape = Tape(net, given)
    with torch.inference_mode(), watch_looks(net, given, tape):
        net(given["x"])
    return next(filter(None, (why_not(look, tape.elements) for look in tape.looks)), "")


def module_of(forward: Callable[[torch.Tensor], object]) -> nn.Module:
    net = nn.Identity()
    net.forward = forward  # type: ignore[assignment,method-assign]
    return net


def drawn(x: torch.Tensor) -> bool:
    return bool((torch.rand_like(x) > x).any())


TABLE = torch.zeros(3)


def counted(x: torch.Tensor) -> bool:
    TABLE[0] += x.sum()
    return bool(TABLE[0] > 3)


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (guardnets.computed(), "much faster than the pass"),
        (guardnets.in_numpy(), "NumPy"),
        (module_of(drawn), "random numbers"),
        (module_of(counted), "not computed from the input"),
    ],
)
def test_what_can_not_be_repeated_cheaply_has_no_guard(net: nn.Module, words: str) -> None:
    """Convolutions on the way, NumPy, random numbers and state are refused, with the reason."""
    assert words in reason(net, IMAGES[0])


def test_a_guard_must_be_small_against_the_pass() -> None:
    """A look that takes as much work as the whole pass is refused once that is much."""
    net = module_of(lambda x: bool(x.cumsum(0).cumsum(1).sum() > 0))
    assert not reason(net, torch.ones(10, 10))
    assert "of the pass" in reason(net, torch.ones(1000, 1000))


def test_fractions_are_told_from_numbers_that_inputs_have_in_common() -> None:
    """Floating-point numbers, alone or in a list, in every way that Python writes them."""
    fractions = [0.5, -3.0, 1e-7, 1e22, float("nan"), -float("inf"), [1, [0.25]]]
    assert all(is_fraction(repr(value)) for value in fractions)
    assert not any(is_fraction(repr(value)) for value in (True, False, 3, -7, (2, 5), [1, [2]]))
