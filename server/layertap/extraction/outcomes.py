"""The outcomes of one model's passes: recorded by watched passes, then found by guards.

See ``guards`` for what an outcome and a guard are.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass

import torch

from layertap.errors import ExtractorUnsupportedError, ModelRunError, OverloadedError
from layertap.extraction.guards import GuardTree, Look, Outcome, Tape, in_words, why_not
from layertap.extraction.kinds.base import BuildContext
from layertap.extraction.looks import watch_looks
from layertap.extraction.obstacles import no_guard
from layertap.extraction.out_of_memory import is_out_of_memory
from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.plan import quoted
from layertap.extraction.points import CapturePoint
from layertap.models import Batch, BatchKey

__all__ = ["Outcomes", "Recorded"]

MAX_TREES = 256
"""Maximum number of guards per model: one for each pass spec and batch shape."""

MAX_KNOWN = 1024
"""Maximum number of pass specs for which we remember whether passes look at values."""


@dataclass(frozen=True)
class Recorded:
    """What one watched pass showed, up to its last capture.

    Attributes:
        looks: Its looks.
        python: What it ran in Python, as a clause; empty for nothing. See Note [Code in Python].
        step: A discontinuous operation on which a captured value depends; empty for none.
        unguarded: Why there is no guard for one of the looks; empty if there are guards for all.
    """

    looks: tuple[Look, ...]
    python: str = ""
    step: str = ""
    unguarded: str = ""

    @property
    def outcome(self) -> Outcome:
        """The values that the looks gave."""
        return tuple(look.outcome for look in self.looks)


class Outcomes:
    """Finds the outcomes of batches, for the passes of one model.

    Args:
        context: What is needed to run passes of the model.
        looked: The points after a look, for the items with which the model was measured.
    """

    def __init__(self, context: BuildContext, looked: Collection[CapturePoint] = ()) -> None:
        self._context = context
        self._measured_key = context.model.signature.key
        self._looked = frozenset(looked)
        self._trees: OrderedDict[tuple[PassSpec, BatchKey, int], GuardTree] = OrderedDict()
        self._looks: OrderedDict[tuple[PassSpec, BatchKey], bool] = OrderedDict()
        self._refusals: OrderedDict[tuple[PassSpec, BatchKey], str] = OrderedDict()
        self._lock = threading.Lock()

    def looks(self, pass_spec: PassSpec, batch_key: BatchKey) -> bool | None:
        """Return whether passes look at values; None if no such pass was watched yet."""
        with self._lock:
            known = self._looks.get((pass_spec, batch_key))
        if known is None and batch_key == self._measured_key:
            return bool(self._looked) and not self._looked.isdisjoint(pass_spec.points)
        return known

    def guard(self, pass_spec: PassSpec, batch_key: BatchKey, size: int) -> GuardTree | None:
        """Return the guard for batches of that key and size; None if there is none yet."""
        place = pass_spec, batch_key, size
        with self._lock:
            tree = self._trees.get(place)
            if tree is not None:
                self._trees.move_to_end(place)
            return tree

    def refusal(self, pass_spec: PassSpec, batch_key: BatchKey) -> str:
        """Return why there can't be a guard for passes; empty if no reason is known."""
        with self._lock:
            return self._refusals.get((pass_spec, batch_key), "")

    def observe(self, pass_spec: PassSpec, x: Batch) -> Outcome:
        """Run the model on a batch, watched, and keep a guard for batches with this outcome.

        For a compute thread.

        Args:
            pass_spec: What the pass does.
            x: The batch, on the model's device and in its dtypes; it is not changed.

        Raises:
            ExtractorUnsupportedError: If there can be no guard, or a guard is wrong.
            ModelRunError: If the model fails on the batch.
            OverloadedError: If there is not enough memory to run it.
        """
        key = (pass_spec, x.key)
        if reason := self.refusal(*key):
            raise self._refused(pass_spec, reason)
        try:
            found = self.record(pass_spec, x)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise OverloadedError(
                f"out of memory while running model {self._context.model.name!r} on a batch of "
                f"{x.size}"
            ) from error
        reason = found.unguarded and no_guard(found.unguarded)
        if not reason:
            reason = self._kept(pass_spec, x, found)
        if reason:
            with self._lock:
                _remember(self._refusals, key, reason, MAX_KNOWN)
            raise self._refused(pass_spec, reason)
        return found.outcome

    def record(self, pass_spec: PassSpec, x: Batch) -> Recorded:
        """Run the model on a batch up to the last capture, and return what it looked at.

        For a compute thread.

        Raises:
            ModelRunError: If the model fails on the batch.
        """
        context, steps = self._context, list[str]()
        x = x.map(lambda tensor: tensor.clone(memory_format=torch.contiguous_format))
        with context.scope as scope:
            tape = Tape(context.model.module, x)
            with watch_looks(context.model.module, x.tensors, tape) as looks:

                def see(_: int, value: torch.Tensor) -> None:
                    steps.append(looks.step(value))
                    if len(steps) == len(pass_spec.points):
                        tape.close()

                try:
                    context.taps.run(
                        context.model.forward,
                        x,
                        pass_spec.points,
                        see,
                        to_end=not scope.rules.early_stop,
                    )
                except ModelRunError:
                    raise
                except Exception as error:
                    if is_out_of_memory(error):
                        raise
                    raise ModelRunError(
                        f"model {context.model.name!r} failed on this input "
                        f"({type(error).__name__})"
                    ) from error
        unguarded = next(filter(None, (why_not(look, tape.elements) for look in tape.looks)), "")
        return Recorded(
            tuple(tape.looks),
            python=next(iter(looks.python), ""),
            step=next(filter(None, steps), ""),
            unguarded=unguarded,
        )

    def _kept(self, pass_spec: PassSpec, x: Batch, found: Recorded) -> str:
        """Keep a pass's guard; return why it can't be trusted, empty if it was right."""
        batch_key, place = x.key, (pass_spec, x.key, x.size)
        known = self.looks(pass_spec, batch_key)
        with self._lock:
            _remember(self._looks, (pass_spec, batch_key), bool(found.looks or known), MAX_KNOWN)
        if not found.looks and not known:
            return ""  # There is only one outcome.
        tree = self.guard(pass_spec, batch_key, x.size)
        if tree is None:
            tree = GuardTree()
        else:
            # It was made from other batches: it may not know this outcome, but must not differ.
            before = tree.outcome(x)
            if before not in (None, found.outcome):
                return _differs(before, found.outcome)
        if not tree.add(found.looks):
            return no_guard("passes whose looks gave the same went on to look at other values")
        after = tree.outcome(x)
        if after != found.outcome and not (after is None and tree.full):
            return _differs(after, found.outcome)
        with self._lock:
            _remember(self._trees, place, tree, MAX_TREES)
        return ""

    def _refused(self, pass_spec: PassSpec, reason: str) -> ExtractorUnsupportedError:
        return ExtractorUnsupportedError(
            f"no compiled plan can serve {quoted(pass_spec.points)} of model "
            f"{self._context.model.name!r}: {reason}; HOOK can"
        )


def _differs(guard: Outcome | None, model: Outcome) -> str:
    found = in_words(guard or ()) or "nothing"
    return no_guard(f"its guard finds {found} where the model itself finds {in_words(model)}")


def _remember(cache: OrderedDict, key: object, value: object, most: int) -> None:  # type: ignore[type-arg]
    cache[key] = value
    cache.move_to_end(key)
    while len(cache) > most:
        cache.popitem(last=False)
