"""Expressions of sizes: those that are found agree with torch's own shapes at sizes not used."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from layertap.extraction.dimensions import Count, Expression, Sizes, Solver, Term

Measure = Callable[[Sizes], Mapping[str, int]]

PASSES = 24


def solve(
    measure: Measure, least: Sizes, most: Sizes, steps: Mapping[str, int] | None = None
) -> dict[str, Expression]:
    """Measure at sizes that the solver asks for, as running a model would."""
    steps = steps or dict.fromkeys(least, 1)
    generator = random.Random(0)

    def points(up_to: int) -> list[Sizes]:
        return [
            {
                symbol: steps[symbol]
                * generator.randint(-(-low // steps[symbol]), up_to * most[symbol] // steps[symbol])
                for symbol, low in least.items()
            }
            for _ in range(200)
        ]

    def every() -> list[Sizes]:
        columns = [
            range(-(-least[s] // step) * step, most[s] + 1, step) for s, step in steps.items()
        ]
        return [
            dict(
                zip(
                    steps,
                    (
                        column[(index * (1 + place)) % len(column)]
                        for place, column in enumerate(columns)
                    ),
                    strict=True,
                )
            )
            for index in range(max(map(len, columns)))
        ]

    solver, choice = Solver(steps), points(1)
    for sizes in choice[:6]:
        solver.add(sizes, measure(sizes))
    for _ in range(PASSES - 6):
        sizes = solver.telling(choice) or solver.telling(every())
        if sizes is None:
            break
        solver.add(sizes, measure(sizes))
    return solver.expressions(choice + points(4))


LAYERS = st.tuples(
    st.sampled_from(["conv", "pool", "ceil_pool"]),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 2),
)


def chain(layers: list[tuple[str, int, int, int]]) -> list[nn.Module]:
    """Return convolutions and pooling layers of given kernels, strides and paddings."""
    modules: list[nn.Module] = []
    for kind, kernel, stride, padding in layers:
        if kind == "conv":
            modules.append(nn.Conv1d(1, 1, kernel, stride, padding, device="meta"))
        else:
            most = min(padding, kernel // 2)
            modules.append(nn.MaxPool1d(kernel, stride, most, ceil_mode=kind == "ceil_pool"))
    return modules


@settings(deadline=None, max_examples=60)
@given(st.lists(LAYERS, min_size=1, max_size=4))
def test_chains_of_convolutions_and_pooling(layers) -> None:
    """What is found for each layer of a chain is torch's own shape at a hundred other lengths."""
    modules = chain(layers)

    def measure(sizes: Sizes) -> dict[str, int]:
        x, lengths = torch.empty(1, 1, sizes["T"], device="meta"), {}
        for index, module in enumerate(modules):
            x = module(x)
            lengths[str(index)] = x.shape[-1]
        return lengths

    found = solve(measure, {"T": 500}, {"T": 2000})
    assert set(found) == {str(index) for index in range(len(modules))}
    for length in range(500, 4000, 37):
        expected = measure({"T": length})
        assert {name: each.at({"T": length}) for name, each in found.items()} == expected


GRID = {"H": 56, "W": 56}, {"H": 280, "W": 280}


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (lambda h, w: 768, "768"),
        (lambda h, w: -(-h // 4), "ceil(H/4)"),
        (lambda h, w: w // 32, "floor(W/32)"),
        (lambda h, w: (h // 16) * (w // 16) + 1, "floor(H/16)*floor(W/16) + 1"),
        (lambda h, w: 64 * h, "64*H"),
        (lambda h, w: 7 * -(-h // 28), "7*ceil(H/28)"),
        (lambda h, w: -(-h // 28) * -(-w // 28), "ceil(H/28)*ceil(W/28)"),
        (lambda h, w: 2 * h - 1, "2*H - 1"),
        (lambda h, w: h + w, "H + W"),
        (lambda h, w: h * h, "H*H"),
        (lambda h, w: (h - 80) // 48, "floor((H - 80)/48)"),
    ],
)
def test_expressions_and_their_text(size, text) -> None:
    """Constants, rounded parts, multiples, products, sums: each is found and written plainly."""
    # The parts of a product of three are looked for among what other dimensions are.
    others = {"h": lambda h, w: h // 16, "w": lambda h, w: w // 16}

    def measure(sizes: Sizes) -> dict[str, int]:
        h, w = sizes["H"], sizes["W"]
        return {"it": size(h, w)} | {name: each(h, w) for name, each in others.items()}

    found = solve(measure, *GRID)["it"]
    assert str(found) == text
    assert all(
        found.at({"H": h, "W": w}) == size(h, w)
        for h in range(60, 900, 7)
        for w in range(50, 700, 13)
    )


@pytest.mark.parametrize(
    "size",
    [
        lambda h, w: max(h, 150),
        lambda h, w: h % 7,
        lambda h, w: math.isqrt(h * w),
        lambda h, w: h * h * h * w,
        lambda h, w: 300 - h,
        lambda h, w: random.Random(h).randint(0, 99),
    ],
)
def test_nothing_is_claimed_of_what_has_no_such_expression(size) -> None:
    """A size that follows no form of the family gets no expression, rather than a close one."""
    assert solve(lambda sizes: {"it": size(sizes["H"], sizes["W"])}, *GRID) == {}


def test_a_candidate_that_can_not_be_told_from_another_is_not_claimed() -> None:
    """Where only one jump of a count lies within reach, its stride is not known."""
    found = solve(lambda sizes: {"it": -(-sizes["L"] // 64)}, {"L": 40}, {"L": 100})
    assert found == {}


def test_divisions_without_a_remainder() -> None:
    """Of a model that takes multiples of 32 only, a part is written without rounding."""
    steps = {"H": 32, "W": 32}

    def measure(sizes: Sizes) -> dict[str, int]:
        return {"part": sizes["H"] // 8, "more": -(-sizes["W"] // 64), "odd": -(-sizes["W"] // 7)}

    found = solve(measure, *GRID, steps=steps)
    assert {name: str(each) for name, each in found.items()} == {
        "part": "H/8",
        "more": "ceil(W/64)",
    }


def test_a_value_that_some_size_does_not_have_is_given_up() -> None:
    """A call that is made at some lengths only has no expression, whatever the others say."""
    solver = Solver({"L": 1})
    for length in (16, 9, 12, 7, 21, 33):
        values = {"always": 2 * length}
        solver.add({"L": length}, values | ({"sometimes": length} if length > 8 else {}))
    assert set(solver.expressions([{"L": length} for length in range(1, 99)])) == {"always"}


COUNTS = st.builds(
    Count,
    symbol=st.sampled_from(["H", "W", "sequence"]),
    shift=st.integers(-40, 40),
    stride=st.integers(1, 40),
)
TERMS = st.builds(
    Term, factor=st.integers(1, 9), counts=st.lists(COUNTS, min_size=1, max_size=3).map(tuple)
)


@given(
    st.builds(
        Expression,
        constant=st.integers(-9, 9),
        terms=st.lists(TERMS, max_size=3).map(tuple),
    ),
    st.fixed_dictionaries({symbol: st.integers(1, 5000) for symbol in ("H", "W", "sequence")}),
)
def test_the_text_says_what_is_computed(expression, sizes) -> None:
    """Read as arithmetic with floor and ceil, the text of an expression gives its value."""
    names = {"floor": math.floor, "ceil": math.ceil}
    value = eval(str(expression), names, dict(sizes))  # noqa: S307 - the test made the text itself
    assert value == expression.at(sizes)
