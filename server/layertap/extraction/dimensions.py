"""The size of an activation's dimension as an expression in the inputs' named free dimensions.

Note [Which expressions there are]
    A convolution or a pooling layer gives ``floor((s + shift) / stride)`` elements for an input of
    size ``s``, and a chain of them does too, with another shift and the product of the strides, as
    nested floors of whole numbers are one floor. So one *count*, ``floor((s + shift) / stride)``,
    describes every such dimension; ``ceil(s / stride)`` is the count with the shift ``stride - 1``.
    Upsampling, flattening and padding to a multiple give a multiple of a count, tokens in front add
    a constant, a grid in one row is a product of two counts, and a concatenation is a sum:

        constant + factor * count * count + ...

Note [Found by elimination]
    A dimension is measured at several sizes of the inputs. All expressions of one form that agree
    with every measurement are candidates. Where they disagree with each other at some size, the
    size at which they disagree most is measured next. A dimension has an expression once all of
    its candidates give the same size for every input that the model takes. If no candidate is left,
    it has none. Simpler forms come first: a constant, one count, a
    product, a sum. Of a model that takes multiples of a number only, such as 32, the strides are
    taken to be divisors or multiples of it, as no size that it takes shows more.

Everything here is arithmetic; ``layertap.extraction.sizes`` runs the model.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement, pairwise, product
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

__all__ = ["Count", "Expression", "Sizes", "Solver", "Term"]

Sizes = Mapping[str, int]
"""The size of each named free dimension of the inputs."""

K = TypeVar("K", bound=Hashable)
"""What identifies a dimension."""

Column = tuple[int, ...]
"""What one dimension measured, for each of the sizes that were tried."""

Numbers = npt.NDArray[np.int64]

_MAX_STRIDE = 2048
"""The largest stride that is looked for; Mimi's encoder of speech has 1920."""

_MAX_PATCH = 64
"""The largest stride of a factor of a product that no other dimension shows."""

_MAX_WINDOW = 16
"""The largest window of patches, one side of it, that no other dimension shows."""

_SCORED = 300_000
"""Values that are compared with each other, for each dimension, to choose the next size."""


@dataclass(frozen=True, slots=True)
class Count:
    """How often something fits into a free dimension: ``floor((symbol + shift) / stride)``.

    Attributes:
        symbol: The name of the free dimension.
        shift: What is added to its size first.
        stride: What that is divided by.
        exact: Whether the division has no remainder at any size that the model takes.
    """

    symbol: str
    shift: int = 0
    stride: int = 1
    exact: bool = False

    def at(self, sizes: Sizes) -> int:
        """Return the count for some sizes."""
        return (sizes[self.symbol] + self.shift) // self.stride

    def __str__(self) -> str:
        """Return such as ``H``, ``H + 1``, ``H/32``, ``ceil(H/4)``, ``floor((H - 1)/2)``."""
        if self.exact and not self.shift:
            return f"{self.symbol}/{self.stride}"
        if 0 < self.shift == self.stride - 1:
            return f"ceil({self.symbol}/{self.stride})"
        shifted = _plus(self.symbol, self.shift)
        if self.stride == 1:
            return shifted
        return f"floor({f'({shifted})' if self.shift else shifted}/{self.stride})"


@dataclass(frozen=True, slots=True)
class Term:
    """A product of counts, times a whole number.

    Attributes:
        factor: That number, not 0.
        counts: At least one.
    """

    factor: int
    counts: tuple[Count, ...]

    def at(self, sizes: Sizes) -> int:
        """Return the product for some sizes."""
        return self.factor * math.prod(count.at(sizes) for count in self.counts)

    def __str__(self) -> str:
        """Return such as ``2*H*ceil(W/4)``."""
        alone = self.factor == 1 and len(self.counts) == 1
        texts = [
            f"({count})" if count.stride == 1 and count.shift and not alone else str(count)
            for count in self.counts
        ]
        return "*".join(([str(self.factor)] if self.factor != 1 else []) + texts)


@dataclass(frozen=True, slots=True)
class Expression:
    """The elements along a dimension for one item: a constant and a sum of terms.

    See Note [Which expressions there are].

    Attributes:
        constant: What is added to the terms; all there is of a dimension of fixed size.
        terms: The terms; none for a dimension of fixed size.
    """

    constant: int
    terms: tuple[Term, ...] = ()

    def at(self, sizes: Sizes) -> int:
        """Return the elements for some sizes of the free dimensions."""
        return self.constant + sum(term.at(sizes) for term in self.terms)

    @property
    def symbols(self) -> tuple[str, ...]:
        """The free dimensions that it depends on, each once."""
        found = (count.symbol for term in self.terms for count in term.counts)
        return tuple(dict.fromkeys(found))

    def __str__(self) -> str:
        """Return such as ``768``, ``sequence``, ``ceil(H/4)`` or ``H/16*W/16 + 1``."""
        if not self.terms:
            return str(self.constant)
        return _plus(" + ".join(map(str, self.terms)), self.constant)


def _plus(text: str, number: int) -> str:
    if not number:
        return text
    return f"{text} {'+' if number > 0 else '-'} {abs(number)}"


@dataclass(frozen=True)
class _Candidates:
    """Expressions of one form: which symbols are counted, and rows of numbers.

    Attributes:
        form: The symbol of each count, for each term.
        constant: ``[n]``, of each candidate.
        factor: ``[n, terms]``.
        shift: ``[n, counts]``.
        stride: ``[n, counts]``.
    """

    form: tuple[tuple[str, ...], ...]
    constant: Numbers
    factor: Numbers
    shift: Numbers
    stride: Numbers

    def __len__(self) -> int:
        return len(self.constant)

    def at(self, sizes: Mapping[str, Numbers]) -> Numbers:
        """Return what each candidate gives ``[n, points]`` for sizes ``[points]`` by symbol."""
        points = len(next(iter(sizes.values()))) if sizes else 1
        total = np.repeat(self.constant[:, None], points, axis=1)
        index = 0
        for term, symbols in enumerate(self.form):
            value = np.repeat(self.factor[:, term, None], points, axis=1)
            for symbol in symbols:
                shifted = sizes[symbol][None, :] + self.shift[:, index, None]
                value = value * (shifted // self.stride[:, index, None])
                index += 1
            total = total + value
        return total

    def only(self, keep: npt.NDArray[np.bool_] | Numbers) -> _Candidates:
        """Return some of the candidates."""
        return replace(
            self,
            constant=self.constant[keep],
            factor=self.factor[keep],
            shift=self.shift[keep],
            stride=self.stride[keep],
        )

    def expression(self, index: int, steps: Mapping[str, int]) -> Expression:
        """Return one candidate, for sizes that are multiples of steps."""
        constant = int(self.constant[index])
        terms = []
        place = 0
        for term, symbols in enumerate(self.form):
            factor, counts = int(self.factor[index, term]), []
            for symbol in symbols:
                shift, stride = int(self.shift[index, place]), int(self.stride[index, place])
                counts.append(_plain_count(Count(symbol, shift, stride), steps.get(symbol, 1)))
                place += 1
            terms.append(Term(factor, tuple(counts)))
        if len(terms) == 1 and terms[0].factor == 1 and len(terms[0].counts) == 1:
            (count,) = terms[0].counts
            if count.shift not in (0, count.stride - 1) and not count.exact:
                # One shift says it all: floor((s + 240)/320) - 1 is floor((s - 80)/320).
                moved = replace(count, shift=count.shift + constant * count.stride)
                return Expression(0, (Term(1, (moved,)),))
        return Expression(constant, tuple(terms))

    def simplest(self) -> int:
        """Return the index of the candidate that reads most simply."""
        plain = np.where(self.shift == 0, 0, np.where(self.shift == self.stride - 1, 1, 2)).sum(
            axis=1
        )
        keys = (
            self.stride.sum(axis=1),
            np.abs(self.constant),
            np.abs(self.factor).sum(axis=1),
            plain,
        )
        return int(np.lexsort(keys)[0])


def _plain_count(count: Count, step: int) -> Count:
    """Return a count as it reads most simply where sizes are multiples of a step."""
    if count.stride > 1 and step % count.stride == 0 and 0 <= count.shift < count.stride:
        return replace(count, shift=0, exact=True)
    if step > 1 and count.stride % step == 0 and count.shift == count.stride - step:
        return replace(count, shift=count.stride - 1)  # Rounded up, as any shift in between does.
    return count


class Solver(Generic[K]):
    """Finds the expressions of many dimensions at once; see Note [Found by elimination].

    Args:
        steps: For each free dimension, a number of which nearly all sizes that the model takes are
            multiples.
    """

    def __init__(self, steps: Mapping[str, int]) -> None:
        self._steps = steps
        self._tried: list[Sizes] = []
        self._columns: dict[K, Column] = {}
        self._found: dict[Column, list[_Candidates]] = {}
        # With what was known of other dimensions when nothing was found.
        self._none: dict[Column, dict[str, set[tuple[int, int]]]] = {}

    def add(self, sizes: Sizes, values: Mapping[K, int]) -> None:
        """Take the measurements at one size of the inputs.

        Args:
            sizes: The size of each free dimension.
            values: The elements along each dimension that was measured. A dimension that is missing
                here or was missing before is given up.
        """
        before: Mapping[K, Column] = self._columns if self._tried else dict.fromkeys(values, ())
        columns = {key: (*column, values[key]) for key, column in before.items() if key in values}
        self._tried.append(dict(sizes))
        kept = {
            column: _agreeing(self._found[column[:-1]], sizes, column[-1])
            for column in set(columns.values())
            if column[:-1] in self._found
        }
        none = {
            column: self._none[column[:-1]]
            for column in columns.values()
            if column[:-1] in self._none
        }
        self._columns, self._none = columns, none
        self._found = {column: found for column, found in kept.items() if found}

    def telling(self, points: Sequence[Sizes]) -> Sizes | None:
        """Return the point that rules out most candidates; None if none rules out any.

        Args:
            points: Sizes that may be measured, those that take least time first.
        """
        self._search()
        if not points:
            return None
        sizes = _by_symbol(points)
        scores = np.zeros(len(points))
        for candidates in self._found.values():
            scores += _score(candidates, sizes)
        best = float(scores.max())
        if best <= 0:
            return None
        return points[int(np.argmax(scores >= 0.9 * best))]

    def expressions(self, domain: Sequence[Sizes]) -> dict[K, Expression]:
        """Return the expression of each dimension that has one.

        Args:
            domain: Sizes that the model may be given: candidates that agree at all of these are
                taken for the same function.
        """
        self._search()
        sizes, tried = _by_symbol(domain), _by_symbol(self._tried)
        exact = {s: 1 if (tried[s] % step).any() else step for s, step in self._steps.items()}
        solved: dict[Column, Expression] = {}
        for column, candidates in self._found.items():
            if _agree(candidates, sizes):
                simplest = min(candidates, key=lambda each: sum(map(len, each.form)))
                solved[column] = simplest.expression(simplest.simplest(), exact)
        return {key: solved[column] for key, column in self._columns.items() if column in solved}

    def _search(self) -> None:
        """Look for candidates for each column that has none."""
        tried = _by_symbol(self._tried)
        missing = set(self._columns.values()) - self._found.keys()
        for column in missing - self._none.keys():
            found = _constant(column) or _counts(tried, column, self._steps)
            if found:
                self._found[column] = found
        counts = self._counts_found()
        for column in missing - self._found.keys():
            if self._none.get(column) == counts:
                continue
            found = _products(tried, column, counts) or _sums(tried, column, counts)
            if found:
                self._found[column] = found
            else:
                self._none[column] = counts

    def _counts_found(self) -> dict[str, set[tuple[int, int]]]:
        """Return (shift, stride) of the counts that other dimensions were found to be, by symbol.

        A column need not be settled: its simplest candidate is worth a try.
        """
        counts: dict[str, set[tuple[int, int]]] = {}
        for candidates in self._found.values():
            for each in candidates:
                if len(each.form) != 1 or len(each.form[0]) != 1:
                    continue
                index = each.simplest()
                shift, stride = int(each.shift[index, 0]), int(each.stride[index, 0])
                if each.factor[index, 0] == 1:
                    shift += int(each.constant[index]) * stride
                counts.setdefault(each.form[0][0], set()).add((shift, stride))
        return counts


def _by_symbol(points: Sequence[Sizes]) -> dict[str, Numbers]:
    symbols = points[0] if points else ()
    return {s: np.array([point[s] for point in points], dtype=np.int64) for s in symbols}


def _agreeing(candidates: Iterable[_Candidates], sizes: Sizes, value: int) -> list[_Candidates]:
    """Return the candidates that give a value at some sizes."""
    at = _by_symbol([sizes])
    kept = [each.only(each.at(at)[:, 0] == value) for each in candidates]
    return [each for each in kept if len(each)]


def _agree(candidates: Sequence[_Candidates], sizes: Mapping[str, Numbers]) -> bool:
    """Return whether candidates give the same values at all of the points."""
    expected = candidates[0].only(np.array([0])).at(sizes)
    return all(bool((each.at(sizes) == expected).all()) for each in candidates)


def _score(
    candidates: Sequence[_Candidates], sizes: Mapping[str, Numbers]
) -> npt.NDArray[np.float64]:
    """Return for each point how much measuring there narrows the candidates down at least."""
    points = len(next(iter(sizes.values())))
    most = max(_SCORED // (points * len(candidates)), 8)
    values = np.concatenate([_sampled(each, most).at(sizes) for each in candidates])
    if len(values) < 2:
        return np.zeros(values.shape[1])
    ordered = np.sort(values, axis=0)
    return np.log(len(values) / _longest_runs(ordered))


def _sampled(candidates: _Candidates, most: int) -> _Candidates:
    """Return so many of some candidates, evenly."""
    if len(candidates) <= most:
        return candidates
    return candidates.only(np.linspace(0, len(candidates) - 1, most).astype(np.int64))


def _longest_runs(ordered: Numbers) -> Numbers:
    """Return the length of the longest run of equal values in each column."""
    run = longest = np.ones(ordered.shape[1], dtype=np.int64)
    for before, after in pairwise(ordered):
        run = np.where(before == after, run + 1, 1)
        longest = np.maximum(longest, run)
    return longest


def _constant(column: Column) -> list[_Candidates]:
    if len(set(column)) > 1:
        return []
    none = np.zeros((1, 0), dtype=np.int64)
    return [_Candidates((), np.array(column[:1], dtype=np.int64), none, none, none)]


def _counts(
    tried: Mapping[str, Numbers], column: Column, steps: Mapping[str, int]
) -> list[_Candidates]:
    """Return every ``constant + factor * floor((s + shift) / stride)`` of a column."""
    values = np.array(column, dtype=np.int64)
    found = [_counts_of(s, sizes, values, steps.get(s, 1)) for s, sizes in tried.items()]
    return [each for each in found if each is not None]


def _counts_of(symbol: str, sizes: Numbers, values: Numbers, step: int) -> _Candidates | None:
    low, high = int(sizes.argmin()), int(sizes.argmax())
    span, rise = int(sizes[high] - sizes[low]), int(values[high] - values[low])
    if span <= 0 or rise <= 0:
        return None
    uneven = bool((sizes % step).any())
    rows: list[Numbers] = []
    for factor in _divisors(math.gcd(*map(int, values - values[0]))):
        for stride in _strides(span, rise, factor, int(sizes[high])):
            if step % stride and stride % step:
                continue
            # Where all sizes are multiples of the step, shifts of less make no difference.
            shift = np.arange(0, stride, 1 if uneven else min(step, stride), dtype=np.int64)
            counts = (sizes[:, None] + shift) // stride
            constant = values[0] - factor * counts[0]
            right = (values[:, None] - factor * counts == constant).all(axis=0)
            if right.any():
                n = int(right.sum())
                rows.append(
                    np.stack(
                        [constant[right], np.full(n, factor), shift[right], np.full(n, stride)]
                    )
                )
    if not rows:
        return None
    constant, factor, shift, stride = np.concatenate(rows, axis=1)
    return _Candidates(((symbol,),), constant, factor[:, None], shift[:, None], stride[:, None])


def _strides(span: int, rise: int, factor: int, largest: int) -> range:
    """Return the strides with which sizes that far apart may give values that far apart.

    The count rises by ``span / stride``, rounded up or down.
    """
    least = factor * span // (rise + factor)
    most = -(-factor * span // (rise - factor)) if rise > factor else _MAX_STRIDE
    return range(max(1, least), min(most, _MAX_STRIDE, 2 * largest) + 1)


def _divisors(number: int) -> list[int]:
    small = [each for each in range(1, math.isqrt(number) + 1) if number % each == 0]
    return sorted({*small, *(number // each for each in small)})


def _products(
    tried: Mapping[str, Numbers], column: Column, found: Mapping[str, Iterable[tuple[int, int]]]
) -> list[_Candidates]:
    """Return every ``constant + factor * count * count`` of a column, else products of three.

    The counts are those of other dimensions and rounded parts of those, such as windows of patches,
    whole sizes, and rounded patches of any usual size; for three of them those of other dimensions
    only.
    """
    plain = [(s - 1 if up else 0, s) for s in range(1, _MAX_PATCH + 1) for up in (0, 1) if s > up]
    some = {symbol: sorted({*plain, *_parts(found.get(symbol, ()))}) for symbol in tried}
    two = [
        each
        for form in combinations_with_replacement(tried, 2)
        if (each := _product_of(form, tried, column, some))
    ]
    if two:
        return two
    few = {symbol: sorted({(0, 1), *found.get(symbol, ())}) for symbol in tried}
    three = [_product_of(form, tried, column, few)
             for form in combinations_with_replacement(tried, 3)]  # fmt: skip
    return [each for each in three if each]


def _parts(counts: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield (shift, stride) of counts, and of their parts of usual sizes, rounded down and up."""
    for shift, stride in counts:
        for part in range(1, _MAX_WINDOW + 1):
            yield shift, stride * part
            yield shift + stride * (part - 1), stride * part


def _product_of(
    form: tuple[str, ...],
    tried: Mapping[str, Numbers],
    column: Column,
    counts: Mapping[str, Sequence[tuple[int, int]]],
) -> _Candidates | None:
    """Return the products of one count for each symbol that fit a column, up to a factor."""
    values = np.array(column, dtype=np.int64)
    last = np.array(counts[form[-1]], dtype=np.int64)
    lasts = (tried[form[-1]][None, :] + last[:, :1]) // last[:, 1:]
    rows = []
    for chosen in product(*(counts[symbol] for symbol in form[:-1])):
        before = np.ones(len(values), dtype=np.int64)
        for symbol, (shift, stride) in zip(form[:-1], chosen, strict=True):
            before = before * ((tried[symbol] + shift) // stride)
        for index, constant, factor in _fitting(before * lasts, values):
            counted = [*chosen, (int(last[index, 0]), int(last[index, 1]))]
            # Each product of a symbol with itself would come in both orders.
            if list(form) != sorted(set(form)) and counted != sorted(counted):
                continue
            rows.append((constant, factor, counted))
    if not rows:
        return None
    return _Candidates(
        (form,),
        np.array([constant for constant, _, _ in rows], dtype=np.int64),
        np.array([[factor] for _, factor, _ in rows], dtype=np.int64),
        np.array([[shift for shift, _ in counted] for *_, counted in rows], dtype=np.int64),
        np.array([[stride for _, stride in counted] for *_, counted in rows], dtype=np.int64),
    )


def _fitting(counted: Numbers, values: Numbers) -> Iterator[tuple[int, int, int]]:
    """Yield (row, constant, factor) where ``constant + factor * counted[row]`` are the values."""
    rise, counts = values - values[0], counted - counted[:, :1]
    at = int(np.abs(rise).argmax())
    pivot = counts[:, at]
    # Compared crosswise, without a division.
    right = (counts * rise[at] == pivot[:, None] * rise).all(axis=1) & (pivot != 0)
    for row in np.flatnonzero(right):
        factor, rest = divmod(int(rise[at]), int(pivot[row]))
        if not rest and factor > 0:
            yield int(row), int(values[0] - factor * counted[row, 0]), factor


def _sums(
    tried: Mapping[str, Numbers], column: Column, found: Mapping[str, Iterable[tuple[int, int]]]
) -> list[_Candidates]:
    """Return what fits a column: a count or a product of two, plus a count of another symbol."""
    counts = {symbol: sorted({(0, 1), *found.get(symbol, ())}) for symbol in tried}
    values = np.array(column, dtype=np.int64)
    candidates = []
    for first in (*((s,) for s in tried), *combinations_with_replacement(tried, 2)):
        for second in tried:
            if second in first or (len(first) == 1 and second < first[0]):
                continue
            form = (first, (second,))
            symbols = [*first, second]
            rows = [
                (*solved, chosen)
                for chosen in product(*(counts[symbol] for symbol in symbols))
                if (solved := _solved(tried, symbols, chosen, values))
            ]
            if rows:
                candidates.append(
                    _Candidates(
                        form,
                        np.array([row[0] for row in rows], dtype=np.int64),
                        np.array([row[1:3] for row in rows], dtype=np.int64),
                        np.array([[shift for shift, _ in row[3]] for row in rows], dtype=np.int64),
                        np.array([[s for _, s in row[3]] for row in rows], dtype=np.int64),
                    )
                )
    return candidates


def _solved(
    tried: Mapping[str, Numbers],
    symbols: Sequence[str],
    chosen: Sequence[tuple[int, int]],
    values: Numbers,
) -> tuple[int, int, int] | None:
    """Return (constant, factor, factor) of the sum of a product and a last count; None for none."""
    *before, last = [
        (tried[symbol] + shift) // stride
        for symbol, (shift, stride) in zip(symbols, chosen, strict=True)
    ]
    parts = np.stack([np.ones_like(values), np.prod(before, axis=0), last], axis=1)
    solution, _, rank, _ = np.linalg.lstsq(parts.astype(float), values.astype(float), rcond=None)
    whole = np.rint(solution).astype(np.int64)
    if rank < 3 or (parts @ whole != values).any() or min(whole[1:]) <= 0:
        return None
    return int(whole[0]), int(whole[1]), int(whole[2])
