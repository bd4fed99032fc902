"""Plans: an extractor built for one layer set and item shape, and proven before it is used."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch

from layertap.errors import ExtractorUnsupportedError, InvalidInputError
from layertap.extraction.base import BuiltExtractor
from layertap.extraction.catalogue import Catalogue
from layertap.extraction.cuda_graph import GraphedExtractor
from layertap.extraction.fx import FxExtractor, GraphNames, WholeGraphExtractor
from layertap.extraction.hook import HookExtractor
from layertap.extraction.looks import watch_looks
from layertap.extraction.plan_cache import PlanCache, PlanFile, fingerprint, plan_digest
from layertap.extraction.points import CapturePoint, PointKind, ValueSpec
from layertap.extraction.proof import Values, collect, prove, shares_passes
from layertap.extraction.survey import sample_input, wide_input
from layertap.extraction.taps import Taps
from layertap.extraction.torchscript import WARM_UP_RUNS, TorchScriptExtractor, trace_taps
from layertap.extraction.walk import ChildrenExtractor, LayerGetterExtractor
from layertap.models import LoadedModel
from layertap.selection import Extractor

__all__ = ["Plan", "PlanBuilder"]

_log = logging.getLogger(__name__)


@dataclass
class Plan:
    """A proven way to capture a list of points from batches of one item shape.

    Attributes:
        extractor: Which of the five it is.
        points: What it captures.
        specs: The type and shape of each point's value, in the order of the points.
        built: The extractor itself; it runs on a compute thread only.
        dynamic: Whether some value's shape follows more than the batch size, so that the specs
            predict nothing. Set when a forward pass shows it.
        shared: Whether several requests may share one of its forward passes; None until
            ``PlanBuilder.prove_shared`` has found out.
    """

    extractor: Extractor
    points: tuple[CapturePoint, ...]
    specs: tuple[ValueSpec, ...]
    built: BuiltExtractor
    dynamic: bool = False
    shared: bool | None = None

    def __post_init__(self) -> None:
        self.dynamic = self.dynamic or any(spec.dynamic for spec in self.specs)


@dataclass
class _Proof:
    """What an extractor is held against: batches, and what the oracle gave for each."""

    extractor: Extractor
    points: Sequence[CapturePoint]
    cases: list[tuple[torch.Tensor, Values]]
    turn: AbstractContextManager[object]

    @property
    def example(self) -> torch.Tensor:
        return self.cases[0][0]

    def steps(self, built: BuiltExtractor) -> Iterator[None]:
        for x, expected in self.cases:
            with self.turn:
                prove(self.extractor, built, self.points, x, expected)
            yield None


class PlanBuilder:
    """Builds and proves the plans of one model.

    Every method runs the model, so each must be called on a compute thread.

    Args:
        model: The model.
        taps: Its taps.
        catalogue: Its catalogue.
        cache: Where the compiled plans that are to be kept are stored.
        turn: Held while the model runs. Not while it is traced symbolically, which waits for the
            passes of others, who may wait for this turn.
    """

    def __init__(
        self,
        model: LoadedModel,
        taps: Taps,
        catalogue: Catalogue,
        cache: PlanCache | None = None,
        turn: AbstractContextManager[object] | None = None,
    ) -> None:
        self._model = model
        self._taps = taps
        self._catalogue = catalogue
        self._cache = cache
        self._turn = turn or nullcontext()

    def build(
        self,
        extractor: Extractor,
        points: Sequence[CapturePoint],
        item_shape: tuple[int, ...],
        *,
        keep: bool = False,
    ) -> Plan:
        """Build an extractor and hold it against the oracle at three batch sizes.

        The oracle is HOOK, so HOOK itself is only measured. FX, CHILDREN and LAYER_GETTER must be
        equal to it bit for bit, TORCHSCRIPT within TORCHSCRIPT_TOLERANCE.

        Args:
            extractor: Any but AUTO.
            points: Distinct capture points of the catalogue that the extractor claims to serve.
            item_shape: The sizes of one item, without the batch.
            keep: Whether to store a compiled plan on disk, or use the one stored there.

        Raises:
            InvalidInputError: Where the model itself can't run on such items.
            ExtractorUnsupportedError: Where the extractor can't be built or its values differ.
        """
        *_, plan = self.steps(extractor, points, item_shape, keep=keep)
        if plan is None:
            raise AssertionError("the last step yields the plan")
        return plan

    def steps(
        self,
        extractor: Extractor,
        points: Sequence[CapturePoint],
        item_shape: tuple[int, ...],
        *,
        keep: bool = False,
    ) -> Iterator[Plan | None]:
        """Build as ``build`` does, in steps of about one forward pass; the last yields the plan."""
        if extractor is Extractor.HOOK and item_shape == self._model.input.item_shape:
            # The oracle at the size at which the catalogue was measured: nothing is left to learn.
            specs = tuple(self._catalogue.specs[point] for point in points)
            built: BuiltExtractor = HookExtractor(self._model, self._taps, points)
            yield Plan(extractor, tuple(points), specs, built)
            return
        batches = [sample_input(self._model, size, item_shape) for size in (1, 2)]
        oracle = []
        for x in batches:
            oracle.append(self._run_oracle(points, x))
            yield None
        specs = tuple(
            ValueSpec.from_batches(one.dtype, one.shape, two.shape)
            for one, two in zip(*oracle, strict=True)
        )
        proof = _Proof(extractor, points, list(zip(batches, oracle, strict=True)), self._turn)
        if extractor is not Extractor.HOOK:
            proof.cases.extend(self._wide_case(extractor, points, item_shape))
            yield None
        if extractor is Extractor.TORCHSCRIPT:
            built = yield from self._compiled(points, proof, keep=keep)
        else:
            built = self.construct(extractor, points, batches[0])
            yield None
            if extractor is not Extractor.HOOK:
                yield from proof.steps(built)
        yield Plan(extractor, tuple(points), specs, built)

    def prove_shared(self, plan: Plan, item_shape: tuple[int, ...]) -> bool:
        """Find out whether requests may share a plan's forward passes, and keep the answer in it.

        A model whose modules write attributes while they run may remember what it saw, and one
        whose code looks at values goes one way for the whole batch.
        """
        if plan.shared is None:
            plan.shared = not self._catalogue.keeps_state and self._shares(plan, item_shape)
        return plan.shared

    def _shares(self, plan: Plan, item_shape: tuple[int, ...]) -> bool:
        x = sample_input(self._model, 3, item_shape)
        if self._looks(plan, x) or not shares_passes(plan.built, plan.points, plan.specs, x):
            return False
        wide = wide_input(self._model, 3, item_shape)
        if wide is None:
            return True
        try:
            return shares_passes(plan.built, plan.points, plan.specs, wide)
        except Exception:  # noqa: BLE001 - a model need not take such input; a batch would fail
            _log.info("model %s fails on wide input", self._model.name, exc_info=True)
            return True

    def _looks(self, plan: Plan, x: torch.Tensor) -> bool:
        if plan.extractor is Extractor.TORCHSCRIPT:
            return False  # Or it would not have been compiled.
        with watch_looks(self._model.module, x) as looks:
            plan.built.run(x.clone(), lambda index, value: None)
        return looks.count > 0

    def warm(self, plan: Plan, item_shape: tuple[int, ...], size: int) -> None:
        """Run a plan on a batch of that many items, as the first such batch takes longer."""
        x = sample_input(self._model, size, item_shape)
        for _ in range(WARM_UP_RUNS):
            with self._turn:
                plan.built.run(x.clone(), lambda index, value: None)

    def _wide_case(
        self, extractor: Extractor, points: Sequence[CapturePoint], item_shape: tuple[int, ...]
    ) -> list[tuple[torch.Tensor, Values]]:
        """Return a batch of input outside [0, 1) and what the oracle gives for it, if it can.

        A model that clamps its input, say, shows it on such input only.
        """
        x = wide_input(self._model, 3, item_shape)
        if x is None:
            return []
        try:
            values = self._run_oracle(points, x)
        except InvalidInputError:
            return []  # Not every model takes such input.
        if extractor is Extractor.TORCHSCRIPT and not all(v.isfinite().all() for v in values):
            return []  # The last bits decide where a root of some noise is NaN.
        return [(x, values)]

    def record(self, plan: Plan, item_shape: tuple[int, ...], sizes: Sequence[int]) -> list[int]:
        """Replay a plan's passes as CUDA graphs at some batch sizes; return those that work.

        Each graph is held against the oracle on inputs other than the recorded one, and forgotten
        where it differs. Sizes whose pass can't be recorded are logged, and run as before. For a
        model on a CUDA device.
        """
        graphed = GraphedExtractor(plan.built, plan.points)
        recorded = [size for size in sizes if self._records(plan, graphed, item_shape, size)]
        if recorded:
            plan.built = graphed
        return recorded

    def _records(
        self, plan: Plan, graphed: GraphedExtractor, item_shape: tuple[int, ...], size: int
    ) -> bool:
        x = sample_input(self._model, size, item_shape)
        oracle = self._oracle(plan.points)
        try:
            self._refuse_replays(plan, x)
            graphed.record(x)
            # The second replay would show what the first one left behind.
            for other in (x.flip(-1), x):
                expected = collect(oracle, plan.points, other)
                prove(plan.extractor, graphed, plan.points, other, expected)
        except Exception as error:  # noqa: BLE001 - whatever a model's code makes of the refusal
            graphed.forget(x.shape)
            _log.warning(
                "model %s: no CUDA graph of %s at batch size %d: %s",
                self._model.name, _names(plan.points), size, error,
            )  # fmt: skip
            return False
        return True

    def _refuse_replays(self, plan: Plan, x: torch.Tensor) -> None:
        """Refuse what would not be the same pass again; see Note [What a graph holds]."""
        if self._catalogue.keeps_state:
            raise ExtractorUnsupportedError("its modules write attributes while they run")
        if plan.dynamic:
            raise ExtractorUnsupportedError("its shapes depend on the content")
        if self._looks(plan, x):
            raise ExtractorUnsupportedError("its code looks at values")

    def _compiled(
        self, points: Sequence[CapturePoint], proof: _Proof, *, keep: bool
    ) -> Generator[None, None, BuiltExtractor]:
        """Return a compiled, proven and warm plan: the stored one, or else a new one."""
        example = proof.example
        stored = self._stored(points, example) if keep else None
        program = stored.load(self._model.device) if stored else None
        if stored and program:
            try:
                return (yield from self._warm(TorchScriptExtractor(program), proof))
            except ExtractorUnsupportedError:
                _log.warning("model %s: a stored plan no longer fits it", self._model.name)
                stored.forget()
        frozen = self._trace(points, example)
        yield None
        with stored.storing(frozen) if stored else nullcontext():
            return (yield from self._warm(TorchScriptExtractor(frozen), proof))

    def _warm(
        self, built: TorchScriptExtractor, proof: _Proof
    ) -> Generator[None, None, BuiltExtractor]:
        yield None
        yield from proof.steps(built)
        for _ in range(WARM_UP_RUNS):
            with self._turn:
                built.run(proof.example.clone(), lambda index, value: None)
            yield None
        return built

    def _stored(self, points: Sequence[CapturePoint], example: torch.Tensor) -> PlanFile | None:
        if self._cache is None:
            return None
        digest = plan_digest(self._fingerprint, points, example.shape[1:], example.dtype)
        return self._cache.file(digest)

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self._model)

    def _run_oracle(self, points: Sequence[CapturePoint], x: torch.Tensor) -> Values:
        try:
            oracle = self._oracle(points)
            with self._turn:
                return collect(oracle, points, x)
        except Exception as error:
            _log.info("model %s fails on %s", self._model.name, list(x.shape), exc_info=True)
            raise InvalidInputError(
                f"tensor: model {self._model.name!r} can't run on items of shape "
                f"{list(x.shape[1:])}; it was measured at {list(self._model.input.item_shape)}"
            ) from error

    def _oracle(self, points: Sequence[CapturePoint]) -> BuiltExtractor:
        if all(point.kind is PointKind.MODULE for point in points):
            return HookExtractor(self._model, self._taps, points)
        # A graph node is no module, so hooks can't see it: the whole graph, in which no node is
        # dead, stands in; the catalogue has held it against the modules.
        names = self._graph()
        return WholeGraphExtractor(self._model, names, self._nodes(names, points))

    def construct(
        self, extractor: Extractor, points: Sequence[CapturePoint], example: torch.Tensor
    ) -> BuiltExtractor:
        """Build an extractor without proving it.

        Args:
            extractor: Any but AUTO.
            points: Distinct capture points that it claims to serve.
            example: ``[B, ...]`` on the model's device; compiled programs hold for its item shape.

        Raises:
            ExtractorUnsupportedError: Where it can't be built.
        """
        match extractor:
            case Extractor.HOOK:
                return HookExtractor(self._model, self._taps, points)
            case Extractor.CHILDREN:
                return ChildrenExtractor(self._model, points)
            case Extractor.LAYER_GETTER:
                return LayerGetterExtractor(self._model, points)
            case Extractor.FX:
                names = self._graph()
                return FxExtractor(self._model, names, self._nodes(names, points))
            case Extractor.TORCHSCRIPT:
                return TorchScriptExtractor(self._trace(points, example))
            case Extractor.AUTO:
                raise ValueError("AUTO is a choice between extractors, not an extractor")

    def _trace(
        self, points: Sequence[CapturePoint], example: torch.Tensor
    ) -> torch.jit.ScriptModule:
        try:
            with self._turn:
                self._refuse_looks(points, example)
                return trace_taps(self._model, self._taps, points, example.clone())
        except ExtractorUnsupportedError:
            raise
        except Exception as error:
            _log.info("model %s can't be traced", self._model.name, exc_info=True)
            raise ExtractorUnsupportedError(
                f"TORCHSCRIPT can't serve {_names(points)} of model {self._model.name!r}: "
                f"tracing failed ({type(error).__name__}); HOOK can"
            ) from error

    def _refuse_looks(self, points: Sequence[CapturePoint], example: torch.Tensor) -> None:
        """Refuse to trace what would go the example's way for every input; see Note [Looks].

        The catalogue knows of the item shape at which it was measured; code may look at others.
        """
        x = example.clone()
        with watch_looks(self._model.module, x) as looks:
            self._taps.run(self._model.forward, x, points, lambda index, value: None)
        if looks.count:
            raise ExtractorUnsupportedError(
                f"TORCHSCRIPT can't serve {_names(points)} of model {self._model.name!r}: its code "
                f"looks at values (bool, int or item of a tensor), and a trace would go the "
                f"example's way for every input; HOOK can"
            )

    def _graph(self) -> GraphNames:
        if self._catalogue.graph is None:
            raise ExtractorUnsupportedError(
                f"FX can't serve model {self._model.name!r}: it can't be traced symbolically"
            )
        return self._catalogue.graph

    def _nodes(self, names: GraphNames, points: Sequence[CapturePoint]) -> list[str]:
        nodes = [names.node_of(point) for point in points]
        return [node for node in nodes if node is not None]


def _names(points: Sequence[CapturePoint]) -> str:
    return ", ".join(repr(point.path) for point in points)
