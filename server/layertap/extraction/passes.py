"""How a model's passes may run, given what they do to the state that it keeps in Python.

Note [Each pass begins with the loaded state]
    A model may fill a list in ``forward`` and empty it at the end, keep a recurrent state between
    calls, or leave activations in helper objects. Then a pass that ends early, a concurrent pass,
    or just the pass before could change an answer. So the model is watched while it is measured.

    - A model that writes no state runs freely.
    - If a model writes state, its passes run one at a time, and after each pass everything is
      restored to what it was when the model was loaded. So every answer is that of a fresh module's
      first call.
    - If something can't be restored, nothing is. Passes run one at a time, to their end and by HOOK
      only, as calls of a plain module would, and the catalogue says that the model is stateful.
      Measuring has already changed that module, so the model is built again to serve requests.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import TracebackType
from typing import Any

from torch import nn

from layertap.extraction.base import BuiltExtractor
from layertap.extraction.chance import Generators
from layertap.extraction.containers import flatten, plain, unsendable
from layertap.extraction.gate import no_forward_pass
from layertap.extraction.kept_values import KeptValue
from layertap.extraction.looks import unwatched
from layertap.extraction.points import CapturePoint, PointKind, Sink
from layertap.extraction.samples import ordinary_batch
from layertap.extraction.script_taps import programs, writes_attributes
from layertap.extraction.state import Change, Snapshot, Watch
from layertap.extraction.survey import HookSurvey, survey_hooks
from layertap.extraction.taps import StopForward, observe
from layertap.extraction.writes import each_line
from layertap.listing import listed
from layertap.malloc import return_memory
from layertap.models import Batch, LoadedModel
from layertap.models.tensor_content import is_wrapper
from layertap.selection import Capture

__all__ = ["KeptState", "PassRules", "PassScope", "ScopedExtractor", "survey_passes"]

_log = logging.getLogger(__name__)

MAX_LISTED_PATHS = 5
"""Changed objects that a sentence about state lists by name."""

SAME = 1e-4
"""Two passes agree up to this relative difference, as some kernels add in a varying order."""

_process_wide = threading.Lock()
"""Held by passes that write to a class or to globals, as other models may use the same code."""


class KeptState(StrEnum):
    """What happens to the state that a model's passes write."""

    NONE = "none"
    """Its passes write no state."""
    RESET = "reset"
    """The state is restored after each pass to what it was when the model was loaded."""
    KEPT = "kept"
    """The state can't be restored, so answers may depend on earlier requests: a stateful model."""


@dataclass(frozen=True, slots=True)
class PassRules:
    """How a model's passes may run.

    Attributes:
        early_stop: Whether a pass may end after the last requested layer.
        concurrent: Whether several passes may run at once.
        shared: Whether requests may share a pass, if their items prove to be independent.
        state: What happens to the state that passes write.
        uncompiled: Why no compiled program may replace the model; empty if one may.
        everywhere: Whether the state belongs to a class or a file, so that the passes of all such
            models take turns.
        exclusive: Whether passes change something of torch, so that no pass of any model may run
            at the same time.
        own_threads: Whether the model runs modules in its own threads.
        notes: What watching the model showed, as clauses.
    """

    early_stop: bool = True
    concurrent: bool = True
    shared: bool = True
    state: KeptState = KeptState.NONE
    uncompiled: str = ""
    everywhere: bool = False
    exclusive: bool = False
    own_threads: bool = False
    notes: tuple[str, ...] = ()


_UNKNOWN = PassRules(early_stop=False, concurrent=False, shared=False, state=KeptState.RESET)
"""The rules until a model has been watched."""


class PassScope:
    """A context that every forward pass of a model runs in. It enforces the model's rules.

    Entering it waits for passes that may not run at the same time. Leaving it restores the state.
    A nested block in the same thread belongs to the same pass.

    Args:
        module: The model, as it was loaded: no pass of it has run yet.

    Attributes:
        rules: How passes may run. The rules become stricter if a pass writes state for the first
            time.
        snapshot: The loaded state.
    """

    def __init__(self, module: nn.Module) -> None:
        self.rules = _UNKNOWN
        self.snapshot = Snapshot(module)
        self._turns = threading.Condition()
        self._running = 0
        self._alone = False
        self._mine = threading.local()

    def __enter__(self) -> PassScope:
        """Wait for this pass's turn."""
        depth = self._mine.depth = getattr(self._mine, "depth", 0) + 1
        if depth > 1:
            return self
        # Before taking a turn, so that this pass does not wait for passes that wait for it.
        others: AbstractContextManager[object] = (
            no_forward_pass() if self.rules.exclusive else nullcontext()
        )
        others.__enter__()
        self._mine.others = others
        with self._turns:
            self._turns.wait_for(self._may_begin)
            self._running += 1
            self._alone = not self.rules.concurrent
            everywhere = self._alone and self.rules.everywhere
        if everywhere:
            _process_wide.acquire()
        self._everywhere = everywhere
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Restore the state if passes write any, and let the next pass begin."""
        self._mine.depth -= 1
        if self._mine.depth:
            return
        try:
            self._end_turn()
        finally:
            self._mine.others.__exit__(None, None, None)

    def _end_turn(self) -> None:
        with self._turns:
            try:
                if self._running == 1 and self.rules.state is KeptState.RESET:
                    with unwatched():
                        self.snapshot.restore()
            finally:
                self._running -= 1
                alone, self._alone = self._alone, False
                if alone and self._everywhere:
                    self._everywhere = False
                    _process_wide.release()
                self._turns.notify_all()

    def _may_begin(self) -> bool:
        if self._alone:
            return False
        return self.rules.concurrent or not self._running

    def settle(self, rules: PassRules, changes: Sequence[Change]) -> None:
        """Set the rules that watching the model led to, and free copies that aren't needed."""
        self.rules = rules
        self.snapshot.settle(change.path for change in changes)

    def learn(self, name: str) -> None:
        """Check whether a pass was the first to write state; call this inside the block.

        Args:
            name: The model's name, for the log.
        """
        if self.rules.state is not KeptState.NONE:
            return
        with unwatched():
            # Ignore hooks: other code may have added them since the model was measured.
            changes = self.snapshot.changes(hooks=False)
        if not changes:
            return
        with self._turns:
            rules = _for_changes(changes, persistent=True)
            notes = (*self.rules.notes, *rules.notes)
            self.rules = replace(rules, notes=notes)
        for note in rules.notes:
            _log.warning("model %s: %s", name, note)


class ScopedExtractor:
    """An extractor that runs the model's modules, each pass inside the model's scope.

    Args:
        built: The extractor.
        scope: The model's scope.
    """

    def __init__(self, built: BuiltExtractor, scope: PassScope) -> None:
        self._built = built
        self._scope = scope

    def run(self, x: Batch, sink: Sink) -> None:
        """See BuiltExtractor."""
        with self._scope:
            self._built.run(x, sink)


@dataclass
class _Seen:
    """What watching the passes showed.

    Attributes:
        changes: Everything that any of the passes wrote, by path.
        lasting: Whether some of it was still there after a whole pass.
        carried: Whether a pass gives other values if it begins with what another pass left behind.
        by_batch: State that one pass creates and later passes keep, although a pass at another
            batch size would have created other state.
        threads: Whether modules ran on threads other than the pass's own.
        stopped: What a pass changes only if it ends early.
        seeds: Whether passes seed the global random number generators and then draw from them.
        unexplained: Whether two passes differ that both began with the loaded state.
    """

    changes: dict[str, Change] = field(default_factory=dict)
    lasting: bool = False
    carried: bool = False
    by_batch: tuple[str, ...] = ()
    threads: bool = False
    stopped: tuple[str, ...] = ()
    seeds: bool = False
    unexplained: bool = False

    def add(self, changes: Sequence[Change]) -> None:
        for change in changes:
            self.changes.setdefault(change.path, change)


def survey_passes(model: LoadedModel, scope: PassScope) -> tuple[HookSurvey, HookSurvey]:
    """Run a model on batches of one and two, watch what it does to its state, and set its rules.

    No other pass of the model may run meanwhile. The model's exceptions are passed on.

    Returns:
        What hooks saw at batch 1, with the values, and at batch 2. Both passes began with the
        loaded state.
    """
    seen = _Seen()
    x, snapshot, chance = ordinary_batch(model, 1), scope.snapshot, Generators(model.device)
    watch = Watch(snapshot)
    with each_line(watch.look_at):
        one = survey_hooks(model, x, keep_values=True, look=watch.look_now_and_then)
    after = snapshot.deep_changes()
    seen.add([*watch.changes.values(), *after])
    seen.threads = len(watch.threads) > 1
    dirty = Snapshot(model.module) if after else None
    with chance.repeated():
        again = _agrees(model, x, one.values)
    rewritten = dirty.rewritten() if dirty else set()
    snapshot.deep_restore()
    if seen.changes or not again:
        _stop_early(model, x, max(1, len(one.order) // 2))
        snapshot.deep_restore()
        with chance.repeated():
            seen.unexplained = not _agrees(model, x, one.values)
        snapshot.deep_restore()
        seen.carried = not again and not seen.unexplained
    if not seen.unexplained:
        seen.stopped = _left_by_stops(model, x, len(one.order), snapshot, seen)
        seen.seeds = chance.moved() and _agrees(model, x, one.values)
        snapshot.deep_restore()
    return_memory()
    two = survey_hooks(model, ordinary_batch(model, 2))
    after_two = snapshot.deep_changes()
    seen.add(after_two)
    seen.lasting = bool(after or after_two)
    if dirty is not None:
        kept = {change.path for change in after} - rewritten
        seen.by_batch = tuple(c.path for c in dirty.deep_changes() if c.path in kept)
    snapshot.deep_restore()
    scope.settle(_rules(model, scope, seen), tuple(seen.changes.values()))
    return one, two


def _rules(model: LoadedModel, scope: PassScope, seen: _Seen) -> PassRules:
    rules = PassRules()
    if seen.changes:
        rules = _for_changes(list(seen.changes.values()), persistent=seen.lasting)
    elif any(map(writes_attributes, programs(model.module).values())):
        rules = PassRules(
            concurrent=False,
            shared=False,
            state=KeptState.RESET,
            notes=("its TorchScript program has statements that write attributes; passes run one "
                   "at a time, each from the loaded state",),
        )  # fmt: skip
    notes = list(rules.notes)
    if seen.carried or seen.by_batch:
        what = _named(seen.by_batch) if seen.by_batch else "values from an earlier pass"
        rules = replace(rules, uncompiled=f"the model keeps state between calls ({what}), which a "
                        "compiled program would hold as a constant")  # fmt: skip
    if not rules.uncompiled:
        rules = replace(rules, uncompiled=_held_by_wrappers(model))
    written = [change.path for change in seen.changes.values() if change.in_place]
    if written and not rules.uncompiled:
        # The memory of such a tensor is a constant of the program; a larger batch overruns it.
        rules = replace(
            rules,
            uncompiled=f"its passes write tensors in place ({_named(written)}), which a compiled "
            "program would hold as constants",
        )
    if seen.stopped:
        rules = replace(rules, early_stop=False)
        notes.append(
            f"a pass that ends early changes {_named(seen.stopped)}, so each pass runs to its end"
        )
    if seen.seeds:
        rules = replace(rules, concurrent=False, everywhere=True)
        notes.append(
            "its passes seed the random number generators of the whole process and draw from them: "
            "they run one at a time, and not while another such model runs"
        )
    if seen.threads:
        rules = replace(
            rules,
            early_stop=False,
            concurrent=False,
            shared=False,
            own_threads=True,
            uncompiled="the model runs modules in its own threads, which a trace does not record",
        )
        notes.append(
            "its modules run on several threads, so passes run one at a time and to their end"
        )
    if seen.unexplained:
        notes.append(
            "two passes from the loaded state differ, and no state or random numbers that "
            "layertap can see explain this; answers may depend on earlier requests"
        )
        rules = _stateful(rules)
    if scope.snapshot.outside:
        notes.append(
            f"it holds modules that are not registered ({_named(scope.snapshot.outside)}): eval(), "
            "the device and the precision don't reach them, and they have no layer names"
        )
    return replace(rules, notes=tuple(notes))


def _held_by_wrappers(model: LoadedModel) -> str:
    """Return why no program can hold the model's weights; empty if it can."""
    tensors = (*model.module.parameters(), *model.module.buffers())
    names = dict.fromkeys(type(each).__name__ for each in tensors if is_wrapper(each))
    if not names:
        return ""
    return (
        f"its weights are of the class {listed(names)}, whose operations run in Python, which a "
        f"compiled program can't contain"
    )


def _for_changes(changes: Sequence[Change], *, persistent: bool) -> PassRules:
    everywhere = any(change.everywhere for change in changes)
    exclusive = any(change.of_torch for change in changes)
    names = _named([change.path for change in changes])
    lost = [change for change in changes if change.reason]
    when = "keep what they write after they end" if persistent else "write while they run"
    if lost:
        reasons = ", ".join(dict.fromkeys(change.reason for change in lost))
        note = (
            f"stateful: its passes write {_named([c.path for c in lost])}, which can't be restored "
            f"({reasons}); passes run one at a time and to their end, and an answer may depend on "
            f"earlier requests"
        )
        return _stateful(PassRules(everywhere=everywhere, exclusive=exclusive, notes=(note,)))
    note = (
        f"its passes {when} {names}: they run one at a time, and the loaded state is restored "
        f"after each"
    ) if not persistent else (
        f"its passes leave {names} changed: they run one at a time, and the loaded state is "
        f"restored after each, so every answer is that of a first call"
    )  # fmt: skip
    if exclusive:
        note += "; no pass of any model runs at the same time"
    return PassRules(
        concurrent=False,
        shared=not persistent,
        state=KeptState.RESET,
        everywhere=everywhere,
        exclusive=exclusive,
        notes=(note,),
    )


def _stateful(rules: PassRules) -> PassRules:
    return replace(
        rules,
        early_stop=False,
        concurrent=False,
        shared=False,
        state=KeptState.KEPT,
        uncompiled=rules.uncompiled or "the model is stateful",
    )


def _named(paths: Sequence[str]) -> str:
    return listed(map(repr, paths), MAX_LISTED_PATHS)


def _agrees(model: LoadedModel, x: Batch, values: Mapping[CapturePoint, KeptValue]) -> bool:
    """Run a pass and return whether each output has the same values as before."""
    calls: dict[str, int] = {}
    agrees = True

    def see(path: str, side: Capture, value: Any) -> None:
        nonlocal agrees
        if side is not Capture.OUTPUT:
            return
        call = calls[path] = calls.get(path, -1) + 1
        for way, tensor in flatten(value):
            expected = values.get(CapturePoint(PointKind.MODULE, path, side, call, way))
            if expected is not None and not unsendable(tensor):
                agrees = agrees and expected.difference(plain(tensor)) <= SAME

    try:
        with observe(model.module, see):
            model.forward(x.clone())
    except Exception:  # noqa: BLE001 - with state from another pass, the model may fail in any way
        _log.info("model %s fails on its second pass", model.name, exc_info=True)
        return False
    return agrees


def _left_by_stops(
    model: LoadedModel, x: Batch, calls: int, snapshot: Snapshot, seen: _Seen
) -> tuple[str, ...]:
    """End passes early at a few places, and return what only such passes leave changed.

    Model code that catches our exception may treat it as a permanent failure of its own.
    """
    left: dict[str, None] = {}
    for quarter in (1, 2, 3):
        _stop_early(model, x, max(1, calls * quarter // 4))
        left.update(dict.fromkeys(change.path for change in snapshot.deep_undo()))
    return tuple(path for path in left if path not in seen.changes)


def _stop_early(model: LoadedModel, x: Batch, after: int) -> None:
    """Run a pass that ends after this many calls, as a request for an early layer would."""
    left = after

    def see(path: str, side: Capture, value: Any) -> None:
        nonlocal left
        left -= side is Capture.OUTPUT
        if not left:
            raise StopForward

    try:
        with observe(model.module, see):
            model.forward(x.clone())
    except StopForward:
        pass
    except Exception:  # noqa: BLE001 - code that catches our exception may raise another one
        _log.info("model %s fails when a pass ends early", model.name, exc_info=True)
