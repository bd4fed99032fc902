"""Which plans serve several requests in one forward pass.

Note [Measured sharing]
    Whether a shared pass is faster than single ones depends on the model, the layers, the item's
    size and the machine, and on a CPU often on the mode of the server. With ``batching = "auto"``
    a plan's requests run alone until it was measured: callers in threads of their own send single
    items through the queue to the compute threads, which run the plan's own passes and copy each
    caller's values. So a measurement has all that a request has between the queue and its reply,
    waiting for other callers included, and nothing of the transport.

    Plans of declared layers are measured before the model is ready. Any other plan is measured
    after PROMOTE_AFTER of its requests have met another one, while requests are served: a turn is
    short, and requests run between its passes. ``layertap.turns`` has the rule. To run alone is the
    way that is kept in doubt, as the values are then exactly those of the request's own pass.
"""

from __future__ import annotations

import logging
import statistics
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from layertap.batching import BatchPolicy
from layertap.call import Call
from layertap.engine.compute import ComputeThreads
from layertap.engine.promotion import Promoter
from layertap.errors import LayertapError
from layertap.extraction.plan import Plan, PlanKey
from layertap.extraction.proof import items_of
from layertap.models import Batch
from layertap.threads import WorkerThreads, start_threads
from layertap.turns import other_pays

__all__ = ["MAX_CALLERS", "Decision", "Sharing", "Trial"]

_log = logging.getLogger(__name__)

MAX_CALLERS = 8
"""How many callers a measurement has, if a shared pass may have as many items."""

TURN_SECONDS = 0.1
"""For how long each way is measured in a turn, unless its callers need longer for two calls."""

MAX_DECISIONS = 256

Once = Callable[[bool], float]
"""Measures one way for a turn, shared passes or single ones; returns the items a second."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided for a plan.

    Attributes:
        shared: Whether its requests share passes.
        ratios: For each turn, the items a second of shared passes as a multiple of single ones'.
    """

    shared: bool
    ratios: tuple[float, ...]

    @classmethod
    def of(cls, once: Once, before: bool | None) -> Decision:
        """Measure in turns until the rule can tell."""
        ratios: list[float] = []
        while (shared := other_pays(ratios, before)) is None:
            # Each way is first in every other turn.
            first = len(ratios) % 2 == 1
            rates = {way: once(way) for way in (first, not first)}
            ratios.append(rates[True] / rates[False])
        return cls(shared, tuple(ratios))

    def __str__(self) -> str:
        """Return the decision in words, after the name of what it is about."""
        what = "share passes" if self.shared else "run alone"
        low, high = min(self.ratios), max(self.ratios)
        return (
            f"{what}: shared passes gave {statistics.median(self.ratios):.2f} times as many items "
            f"per second as single ones ({low:.2f} to {high:.2f} in {len(self.ratios)} turns)"
        )


class Trial:
    """Measures the passes of one plan through the compute threads.

    Args:
        plan: The plan, which may run batches of up to ``policy.max_size`` items.
        items: Batches of one item each that it may run, on the CPU.
        compute: The compute threads.
        policy: The policy of shared passes.
        on_device: Moves a batch to the model's device.
    """

    def __init__(
        self,
        plan: Plan,
        items: Sequence[Batch],
        compute: ComputeThreads,
        policy: BatchPolicy,
        on_device: Callable[[Batch], Batch],
    ) -> None:
        self._plan = plan
        self._items = items
        self._compute = compute
        self._policy = policy
        self._on_device = on_device

    @contextmanager
    def callers(self, call: Call) -> Iterator[Once]:
        """Start the callers; yield what lets them call for a turn.

        Args:
            call: Cancels the measurement.

        Raises:
            UnavailableError: If the system allows no more threads.
        """
        pool = WorkerThreads(min(self._policy.max_size, MAX_CALLERS), "layertap-sharing")
        start_threads([pool])
        try:
            yield lambda shared: self._turn(pool, shared, call)
        finally:
            pool.shutdown()

    def _turn(self, pool: WorkerThreads, shared: bool, call: Call) -> float:
        begun = time.monotonic()
        done = [
            pool.submit(partial(self._call, self._items[n % len(self._items)], shared, begun, call))
            for n in range(pool.count)
        ]
        count = sum(each.result() for each in done)
        return count / (time.monotonic() - begun)

    def _call(self, x: Batch, shared: bool, begun: float, call: Call) -> int:
        """Send an item until the turn is over, at least twice; return how often."""
        count = 0
        while count < 2 or time.monotonic() - begun < TURN_SECONDS:
            if shared:
                self._compute.run_batched(x, self._run, call, key=self, policy=self._policy)
            else:
                self._compute.run_batched(x, self._run, call)
            count += 1
        return count

    def _run(self, items: Sequence[Batch]) -> Sequence[None]:
        moved = [self._on_device(x) for x in items]
        # A copy also where there is one item, as the model may write to its input.
        x = Batch.cat(moved) if len(moved) > 1 else moved[0].clone()

        def take(index: int, value: torch.Tensor) -> None:
            for begin in range(len(items)):
                own = items_of(value, self._plan.specs[index], begin, 1)
                own.to("cpu", copy=True)

        self._plan.built.run(x, take)
        return [None] * len(items)


class Sharing:
    """Decides for the plans of one model whether their requests share passes. Thread-safe.

    Args:
        name: The model's name.
        policy: Its policy.
        trial: Returns the trial of a plan; None if its requests must not share a pass.
        find: Returns the plan of a key; None if it was dropped.
        names_of: Returns the names of a plan's layers, for notes.
    """

    def __init__(
        self,
        name: str,
        policy: BatchPolicy,
        trial: Callable[[Plan, BatchPolicy, Call], Trial | None],
        find: Callable[[PlanKey], Plan | None],
        names_of: Callable[[Plan], str],
    ) -> None:
        self._name = name
        self._trial = trial
        self._find = find
        self._names_of = names_of
        self._measured = policy.measured
        self._together, self._alone = policy.together(), policy.alone()
        self._lock = threading.Lock()
        # With the note that says so.
        self._decisions: OrderedDict[PlanKey, tuple[Decision, str]] = OrderedDict()
        self._before: dict[PlanKey, bool] = {}
        self._running: dict[PlanKey, int] = {}
        self._call = Call()
        self._promoter: Promoter[PlanKey] | None = None
        if self._measured:
            self._promoter = Promoter(self._measure_later)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was decided so far, for people."""
        with self._lock:
            return tuple(note for _, note in self._decisions.values())

    def policy(self, plan: Plan, *, padded: bool) -> BatchPolicy:
        """Return the policy of a plan's requests; ``max_size`` is 1 if they run alone.

        Args:
            plan: The plan.
            padded: Whether they may share passes with items of other lengths. Such passes have a
                setting of their own, ``max_tokens_per_pass``, and are not measured.
        """
        if padded or not self._measured:
            return self._together
        with self._lock:
            decided = self._decisions.get(plan.key)
        return self._together if decided is not None and decided[0].shared else self._alone

    @contextmanager
    def request(self, plan: Plan) -> Iterator[None]:
        """Count a request; if it meets another one of its plan, the plan may be measured later."""
        if self._promoter is None:
            yield
            return
        key = plan.key
        with self._lock:
            others = self._running.get(key, 0)
            self._running[key] = others + 1
            undecided = key not in self._decisions
        if others and undecided:
            self._promoter.note(key)
        try:
            yield
        finally:
            with self._lock:
                self._running[key] -= 1
                if not self._running[key]:
                    del self._running[key]

    def decide(self, plan: Plan, call: Call) -> None:
        """Measure a plan, if measurements decide, and record the decision.

        Args:
            plan: The plan.
            call: Cancels the measurement.

        Raises:
            LayertapError: The call was cancelled, or the model failed.
        """
        trial = self._trial(plan, self._together, call) if self._measured else None
        if trial is None:
            return
        with self._lock:
            former = self._decisions.get(plan.key)
            before = self._before.get(plan.key) if former is None else former[0].shared
        with trial.callers(call) as once:
            once(True)  # The first passes at a batch size are slow.
            decision = Decision.of(once, before)
        note = f"requests for {self._names_of(plan)} by {plan.kind.name} {decision}"
        _log.info("model %s: %s", self._name, note)
        with self._lock:
            self._decisions[plan.key] = decision, note
            self._decisions.move_to_end(plan.key)
            while len(self._decisions) > MAX_DECISIONS:
                self._decisions.popitem(last=False)

    def inherit(self, former: Sharing) -> None:
        """Take the decisions of a former version of the model as those before its own."""
        with former._lock:
            self._before = {key: each.shared for key, (each, _) in former._decisions.items()}

    def close(self) -> None:
        """Stop measuring."""
        if self._promoter is not None:
            self._call.cancel()
            self._promoter.close()

    def _measure_later(self, key: PlanKey, _: object) -> Iterator[None]:
        plan = self._find(key)
        if plan is not None:
            try:
                self.decide(plan, self._call)
            except LayertapError as error:
                _log.info("model %s: sharing was not measured: %s", self._name, error)
        yield
