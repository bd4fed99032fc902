"""Chooses which plan serves a request, and makes faster plans beside the requests."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

from layertap.call import Call
from layertap.engine.contest import Contest, Entrant
from layertap.engine.host.measured_model import MeasuredModel
from layertap.engine.host.plan_maker import PlanMaker
from layertap.engine.host.plans import Plans
from layertap.engine.kept_races import KeptRaces
from layertap.engine.promotion import Promoter
from layertap.engine.races import RACE_AFTER, Races
from layertap.engine.resolve import Resolved
from layertap.errors import LayertapError
from layertap.extraction.guards import Outcome
from layertap.extraction.kinds.registry import KINDS, REFERENCE, kind_of
from layertap.extraction.plan import Plan, PlanKey
from layertap.extraction.samples import ordinary_batch
from layertap.models import Batch, BatchKey

__all__ = ["MAX_PROMOTED", "Choice"]

_log = logging.getLogger(__name__)

MAX_PROMOTED = 24
"""Maximum number of layers in a set that is compiled while requests are served.

A program's first run in torch can't be divided into steps. For the hundreds of layers of a large
transformer it takes minutes, in which no other request would be served.
"""


class Choice:
    """Chooses an extractor for the requests of one model.

    A request that names an extractor gets it. AUTO takes the compiled plan that there is, or the
    one that won its race. Where there is none, requests that come often have one compiled.

    Args:
        measured: The model.
        plans: Its plans.
        maker: Makes more of them.
        kept_races: The results of races in earlier starts.
        compiles: Whether requests have plans compiled.
        races: Whether compiled plans race others.

    Attributes:
        races: Which extractor AUTO takes where there is a compiled plan.
    """

    def __init__(
        self,
        measured: MeasuredModel,
        plans: Plans,
        maker: PlanMaker,
        kept_races: KeptRaces,
        *,
        compiles: bool,
        races: bool,
    ) -> None:
        self._measured = measured
        self._compute = measured.compute
        self._plans = plans
        self._maker = maker
        self._compiles = compiles
        # Further passes of a stateful model would change later answers.
        self._may_race = races and not measured.is_stateful
        self._promoter: Promoter[PlanKey | Contest] = Promoter(self._beside_requests)
        self.races = Races(
            self._compute, self._contenders, self._race_batch, measured.names_of, kept_races
        )

    def choose(
        self, resolved: Resolved, batch_key: BatchKey, x: Batch, outcome: Outcome | None
    ) -> Entrant:
        """Return what serves a request.

        Args:
            resolved: The request.
            batch_key: The key of its batch.
            x: Its batch.
            outcome: The outcome of the model's looks at that batch; None if it is not known.
        """
        if len(resolved.candidates) == 1:
            return Entrant(resolved.candidates[0], resolved.variant)
        compiles = self._compiles and len(resolved.points) <= MAX_PROMOTED
        for extractor in resolved.candidates:
            if not kind_of(extractor).compiled:
                return Entrant(extractor)
            key = PlanKey(extractor, resolved.pass_spec, batch_key, outcome)
            # It counts as used even if the winner of its race serves.
            plan, refused = self._plans.use_built(key)
            if plan is not None and not plan.refusal(x.size):
                return self._fastest(key, plan, x.size)
            if compiles and plan is None and not refused:
                # A copy: the request's own memory goes with the request.
                self._promoter.note(key, x.clone if outcome != () else lambda: None)
                compiles = False  # The next kind is compiled only if this one is refused.
        return Entrant(resolved.candidates[0])

    def close(self) -> None:
        """Stop compiling and racing beside requests."""
        self.races.close()
        self._promoter.close()

    def _fastest(self, key: PlanKey, plan: Plan, size: int) -> Entrant:
        """Return what won the race of a compiled plan; the plan's extractor if there was none."""
        own = Entrant.of(plan.key)
        if key.outcome or not self._may_race:
            return own
        contest = Contest.of(key, size, self._others(key))
        race = self.races.result(contest)
        if race is None or not race.had(contest.others):
            self._promoter.note(contest, lambda: size, after=RACE_AFTER)
        if race is None or race.winner == own:
            return own
        if race.winner.extractor is REFERENCE.id:
            return race.winner
        if race.winner.variant and race.winner not in contest.others:
            return own  # It was refused.
        winner = race.winner.key(key)
        other = self._plans.find(winner)
        if other is None:
            self._promoter.note(winner, after=1)  # It may be in the plan cache.
        return own if other is None or other.refusal(size) else race.winner

    def _others(self, key: PlanKey) -> list[Entrant]:
        """Return what else may race a compiled plan, besides the model itself.

        These are other ways to finish its program, unless they were refused, and the other
        compilers that have a plan for the same layers.
        """
        compilers = [
            Entrant(other)
            for other, kind in KINDS.items()
            if kind.compiled and other is not key.extractor
            if self._plans.find(key._replace(extractor=other))
        ]
        return [*self._variants(key), *compilers]

    def _variants(self, key: PlanKey) -> list[Entrant]:
        variants = kind_of(key.extractor).variants(self._measured.model.device)
        found = [Entrant(key.extractor, each) for each in variants]
        return [each for each in found if not self._plans.is_refused(each.key(key))]

    def _contenders(self, contest: Contest, size: int) -> list[Plan]:
        """Return the plans for a contest, proven at a batch size, the preferred one first."""
        keys = [contest.key, *(each.key(contest.key) for each in contest.others)]
        found = [self._plans.find(key) for key in keys]
        reference = contest.key._replace(extractor=REFERENCE.id)
        model = self._maker.built(reference, lambda: None, Call())
        plans = [plan for plan in (*found, model) if plan is not None and not plan.dynamic]
        for plan in plans:
            prove = partial(self._measured.builder.prover.prove_size, plan, size)
            self._compute.run(prove, Call())
        proven = [plan for plan in plans if plan.refusal(size) == ""]
        return proven if proven and proven[0].key == contest.key else []

    def _race_batch(self, plan: Plan, size: int) -> Batch:
        return ordinary_batch(self._measured.model, size, plan.batch_key)

    def _beside_requests(self, key: PlanKey | Contest, noted: Any) -> Iterator[None]:
        """Compile a layer set that is requested often, or race what is.

        A program that AUTO does not compile by itself, but that won a race, is only loaded.
        """
        if isinstance(key, Contest):
            yield from self._race(key, noted)
        elif kind_of(key.extractor).automatic or self._maker.is_stored(key):
            yield from self._maker.compile(key, noted)

    def _race(self, contest: Contest, size: int) -> Iterator[None]:
        """Run a race with its variants, and drop those programs that were made for it in vain.

        A program that was there because a request has named it stays, even if it loses.
        """
        for_races = {each for each in self.races.winners(contest.key) if each.variant}
        try:
            yield from self._finish_variants(contest, for_races)
            yield from self.races.steps(contest, size, self._refused(contest))
        finally:
            for loser in for_races - self.races.winners(contest.key):
                self._plans.drop(loser.key(contest.key))

    def _finish_variants(self, contest: Contest, made: set[Entrant]) -> Iterator[None]:
        """Compile a contest's program again for each other way to finish it, if there is room.

        Args:
            contest: The contest.
            made: Those that are compiled here are added to it.
        """
        for each in contest.others:
            key = each.key(contest.key)
            if not each.variant or self._plans.find(key) or not self._plans.has_room():
                continue
            made.add(each)
            try:
                yield from self._maker.compile(key, None)
            except LayertapError as error:
                _log.info("not in the race: %s", error)

    def _refused(self, contest: Contest) -> list[Entrant]:
        others = contest.others
        return [each for each in others if self._plans.is_refused(each.key(contest.key))]
