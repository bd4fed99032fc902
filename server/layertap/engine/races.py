"""Races of the proven extractors, for AUTO: which of them serves a layer set fastest?

Note [Measured races]
    A compiled program is mostly faster than the model under its hooks. By how much depends on the
    model, the layers, the number of items and the machine, and sometimes it is slower. AUTO begins
    with the compiled plan. Once that has served RACE_AFTER requests, the other plans for the same
    layers race it: the model under its hooks, its program finished in another way (see
    ``CompiledKind.variants``), and programs of other compilers, if a request has named them. The
    plans take turns on a compute thread, on input that proofs use, and each copies its values as a
    reply does; requests run between the passes. ``layertap.turns`` has the rule: another plan must
    be faster by MARGIN, or AUTO keeps the compiled one.

    Each bucket of batch sizes has a race of its own: 1, 2, 3 and 4, 5 to 8, and so on. The
    description of the model tells the results, and the plan cache keeps them for the next start
    (see ``kept_races``). If a request names a further compiler after the race, its program takes
    part in another one, RACE_AFTER requests later. A program that was finished in another way for a
    race is dropped if it wins none, and one that failed its proof is not tried again. Nothing is
    raced where a further pass could change later answers, as of a stateful model, and where a plan
    serves only some outcomes of the model's looks.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch

from layertap.call import Call
from layertap.engine.compute import ComputeThreads
from layertap.engine.contest import Contest, Entrant, Race
from layertap.engine.kept_races import KeptRaces
from layertap.extraction.plan import Plan, PlanKey
from layertap.models import Batch
from layertap.turns import other_pays

__all__ = ["RACE_AFTER", "Races"]

RACE_AFTER = 32
"""A race begins when a compiled plan has served this many of AUTO's requests of about one size."""

MARGIN = 1.03
"""How many times as fast another extractor must be to replace the compiled one."""

PASSES = 2
"""Passes of each plan in a turn, of which the faster one counts."""

MAX_RACES = 256


class Races:
    """Runs the races of one model, and keeps their results. Thread-safe.

    Args:
        compute: The compute threads.
        contenders: Returns the plans that may race for a contest and a batch size, the preferred
            one first; fewer than two if there is no race.
        sample: Returns a batch of so many items for a plan, on the model's device.
        names_of: Returns the names of a plan's layers, for notes.
        kept: The results of earlier starts.
    """

    def __init__(
        self,
        compute: ComputeThreads,
        contenders: Callable[[Contest, int], Sequence[Plan]],
        sample: Callable[[Plan, int], Batch],
        names_of: Callable[[Plan], str],
        kept: KeptRaces,
    ) -> None:
        self._compute = compute
        self._contenders = contenders
        self._sample = sample
        self._names_of = names_of
        self._lock = threading.Lock()
        self._kept = kept
        # By the plan and the bucket: a later race replaces one with fewer extractors. None if there
        # was no race yet, and none in an earlier start.
        self._results: OrderedDict[tuple[PlanKey, int], Race | None] = OrderedDict()
        self._call = Call()

    @property
    def notes(self) -> tuple[str, ...]:
        """The results so far, for people."""
        with self._lock:
            return tuple(str(race) for race in self._results.values() if race)

    def result(self, contest: Contest) -> Race | None:
        """Return a contest's last race, maybe of fewer extractors; None if there was none."""
        place = contest.key, contest.bucket
        with self._lock:
            if place in self._results:
                return self._results[place]
            race = self._kept.find(contest)
            self._remember(place, race)
            return race

    def steps(
        self, contest: Contest, size: int, refused: Collection[Entrant] = ()
    ) -> Iterator[None]:
        """Run a race, and yield between its passes.

        Args:
            contest: What it is about.
            size: The batch size at which it is run.
            refused: Which of its others failed their proof; the result tells it to later starts.

        Raises:
            LayertapError: The model failed, or the race was cancelled.
        """
        plans = self._contenders(contest, size)
        if len(plans) < 2:
            return
        x = self._compute.run(partial(self._sample, plans[0], size), self._call)
        for plan in plans:  # The first passes of a program at a batch size are slow.
            for _ in range(plan.kind.warm_up_runs(x.device)):
                self._timed(plan, x)
                yield
        ratios: dict[Entrant, list[float]] = {Entrant.of(plan.key): [] for plan in plans[1:]}
        while any(_pays(each) is None for each in ratios.values()):
            times = {}
            # Each plan is first in every other turn.
            turn = len(next(iter(ratios.values())))
            for plan in plans if turn % 2 else plans[::-1]:
                taken = []
                for _ in range(PASSES):
                    taken.append(self._timed(plan, x))
                    yield
                times[Entrant.of(plan.key)] = min(taken)
            for entrant, of_turns in ratios.items():
                of_turns.append(times[Entrant.of(contest.key)] / times[entrant])
        items = f"{size} item{'s' if size > 1 else ''}"
        where = f"{self._names_of(plans[0])}, about {items}"
        race = replace(_result(Entrant.of(contest.key), ratios, where), refused=frozenset(refused))
        with self._lock:
            self._remember((contest.key, contest.bucket), race)
        self._kept.store(contest, race)

    def winners(self, key: PlanKey) -> set[Entrant]:
        """Return what won the races of a compiled plan, at all numbers of items so far."""
        with self._lock:
            return {race.winner for (of, _), race in self._results.items() if race and of == key}

    def close(self) -> None:
        """Stop the race that is running."""
        self._call.cancel()

    def _timed(self, plan: Plan, x: Batch) -> int:
        """Return the nanoseconds of a pass, the copies of its values included."""

        def take(index: int, value: torch.Tensor) -> None:
            del index
            # Replies are contiguous.
            value.to("cpu", copy=True, memory_format=torch.contiguous_format)

        def run() -> int:
            own = x.clone()  # The model may write to its input.
            begun = time.perf_counter_ns()
            plan.built.run(own, take)
            return time.perf_counter_ns() - begun

        return self._compute.run(run, self._call)

    def _remember(self, place: tuple[PlanKey, int], race: Race | None) -> None:
        """Keep a result in memory; the lock is held."""
        self._results[place] = race
        while len(self._results) > MAX_RACES:
            self._results.popitem(last=False)


def _pays(ratios: Sequence[float]) -> bool | None:
    return other_pays(ratios, margin=MARGIN)


def _result(first: Entrant, ratios: Mapping[Entrant, Sequence[float]], where: str) -> Race:
    faster = [entrant for entrant, of_turns in ratios.items() if _pays(of_turns)]
    winner = max(faster, key=lambda each: statistics.median(ratios[each]), default=first)
    return Race(first, winner, ratios, where)
