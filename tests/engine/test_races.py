"""AUTO takes the extractor that was measured to be the fastest, and its answers stay right."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

import tinynets
from asking import ask
from layertap import Extractor, LayerSelection
from layertap.call import Call
from layertap.engine import Engine, HostOptions, describe
from layertap.engine.contest import Contest, Entrant, Race
from layertap.engine.host import ModelHost
from layertap.engine.kept_races import KeptRaces
from layertap.engine.races import RACE_AFTER
from layertap.errors import ModelRunError
from layertap.extraction.base import BuiltExtractor
from layertap.extraction.kinds.registry import kind_of
from layertap.extraction.kinds.torchscript import CHANNELS_LAST, TorchScriptKind
from layertap.extraction.plan import PlanKey
from layertap.extraction.plan_cache import PlanCache
from layertap.extraction.points import Sink
from layertap.extraction.verify import COMPILED_TOLERANCE, difference
from layertap.models import Batch, ModelSpec
from oracle import outputs_of
from tinynets import ITEM

TORCHSCRIPT, EXPORT, HOOK = map(Entrant, (Extractor.TORCHSCRIPT, Extractor.EXPORT, Extractor.HOOK))
VARIANT = Entrant(Extractor.TORCHSCRIPT, CHANNELS_LAST)

PATIENCE = 60
DELAY = 0.02
"""Seconds; a busy machine delays a pass by more than 5 ms."""


class Slow:
    """An extractor that takes its time."""

    def __init__(self, built: BuiltExtractor) -> None:
        self._built = built

    def run(self, x: Batch, sink: Sink) -> None:
        """See BuiltExtractor."""
        time.sleep(DELAY)
        self._built.run(x, sink)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the net's catalogue, but not that of other tests, some of which refuse plans."""
    return tmp_path_factory.mktemp("races")


@pytest.fixture
def variants() -> tuple[str, ...]:
    """The variants that TORCHSCRIPT has: none but in tests of them, where others would be slow."""
    return ()


@pytest.fixture
def engine(
    folder: Path, variants: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Engine]:
    """An engine with one compute thread."""
    monkeypatch.setattr(TorchScriptKind, "variants", lambda self, device: variants)
    engine = started(folder)
    yield engine
    engine.close()
    for file in folder.glob("*.races"):
        file.unlink()


def started(folder: Path) -> Engine:
    """Return an engine with one compute thread."""
    return Engine(threads=1, plan_cache=PlanCache(folder, 1 << 30))


@cache
def right(size: int) -> torch.Tensor:
    """Return the value of ``layer2`` of a net of its own, for ``batch(size)``."""
    (value,) = outputs_of(tinynets.residual(), torch.from_numpy(batch(size)), "layer2")
    return value


def load(engine: Engine, net: str = "residual", **options: Any) -> ModelHost:
    """Load a net with a declared layer."""
    spec = ModelSpec(f"tinynets:{net}", item_shape=ITEM)
    return engine.load(spec, [LayerSelection("layer2")], options=HostOptions(**options))


class Turned:
    """An extractor of values with channels last; notes whether their copies are contiguous."""

    def __init__(self, built: BuiltExtractor) -> None:
        self._built = built
        self.copies: list[bool] = []

    def run(self, x: Batch, sink: Sink) -> None:
        """See BuiltExtractor."""

        def turned(index: int, value: torch.Tensor) -> None:
            value = value.contiguous(memory_format=torch.channels_last)
            assert not value.is_contiguous()
            with _Copies(self.copies):
                sink(index, value)

        self._built.run(x, turned)


class _Copies(TorchFunctionMode):
    """Notes of each copy by ``Tensor.to`` whether it is contiguous."""

    def __init__(self, copies: list[bool]) -> None:
        super().__init__()
        self._copies = copies

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function."""
        result = func(*args, **kwargs or {})
        if func is torch.Tensor.to:
            self._copies.append(result.is_contiguous())
        return result


def slowed(host: ModelHost, extractor: Extractor) -> None:
    """Make the plan of an extractor for ``layer2`` slow; HOOK's is built first."""
    (key,) = host.plans._declared
    if extractor is Extractor.HOOK:
        plan = host._maker.built(key._replace(extractor=extractor), lambda: None, Call())
    else:
        plan = host.plans._declared[key]
    plans: Any = host.plans._built if extractor is Extractor.HOOK else host.plans._declared
    plans[plan.key] = replace(plan, built=Slow(plan.built))


def batch(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((size, *ITEM), dtype=np.float32)


def asked(engine: Engine, size: int, times: int = 1) -> list[Extractor]:
    """Ask AUTO for ``layer2`` with so many items; compare each answer; return who gave it."""
    x, served = batch(size), []
    for _ in range(times):
        values = ask(engine, "residual", "layer2", x)
        error = difference(values.torch()["layer2"], right(size))
        assert error <= COMPILED_TOLERANCE[torch.float32]
        served.append(values.extractor)
    return served


def notes(engine: Engine) -> list[str]:
    found = describe(engine.host("residual")).notes
    return [note for note in found if note.startswith("AUTO, layer2, ")]


def until(condition: Callable[[], bool]) -> None:
    """Wait until another thread has made something true."""
    ends = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < ends, "it took too long"
        time.sleep(0.01)


def raced(engine: Engine, count: int = 1) -> list[str]:
    """Wait for races; return their notes."""
    until(lambda: len(notes(engine)) >= count)
    return notes(engine)


def test_auto_leaves_a_program_that_is_slower(engine: Engine) -> None:
    """After the race AUTO takes HOOK. A request that names TORCHSCRIPT still gets it."""
    slowed(load(engine), Extractor.TORCHSCRIPT)
    assert asked(engine, 1, RACE_AFTER) == [Extractor.TORCHSCRIPT] * RACE_AFTER
    (note,) = raced(engine)
    assert note.startswith("AUTO, layer2, about 1 item: HOOK was ")
    assert "times as fast as TORCHSCRIPT (" in note
    assert asked(engine, 1, 3) == [Extractor.HOOK] * 3
    named = ask(engine, "residual", "layer2", batch(1), Extractor.TORCHSCRIPT)
    assert named.extractor is Extractor.TORCHSCRIPT


def test_a_race_copies_values_as_a_reply_does(engine: Engine) -> None:
    """A reply is contiguous, which costs more for a value with channels last."""
    host = load(engine)
    (key,) = host.plans._declared
    plan = host._maker.built(key._replace(extractor=Extractor.HOOK), lambda: None, Call())
    turned = Turned(plan.built)
    host.plans.add(plan.key, replace(plan, built=turned))
    asked(engine, 1, RACE_AFTER)
    raced(engine)
    assert turned.copies
    assert all(turned.copies)


def test_auto_keeps_a_program_that_is_faster(engine: Engine) -> None:
    """The description tells by how much it won."""
    slowed(load(engine), Extractor.HOOK)
    asked(engine, 1, RACE_AFTER)
    (note,) = raced(engine)
    assert note.startswith("AUTO, layer2, about 1 item: TORCHSCRIPT was ")
    assert "times as fast as HOOK (" in note
    assert asked(engine, 1, 3) == [Extractor.TORCHSCRIPT] * 3


def test_each_bucket_of_batch_sizes_has_its_race(engine: Engine) -> None:
    """The sizes 3 and 4 count together; the others keep the program meanwhile."""
    slowed(load(engine), Extractor.TORCHSCRIPT)
    half = RACE_AFTER // 2
    assert set(asked(engine, 3, half) + asked(engine, 4, half)) == {Extractor.TORCHSCRIPT}
    (note,) = raced(engine)
    assert note.startswith("AUTO, layer2, about 4 items: HOOK was ")
    assert set(asked(engine, 3) + asked(engine, 4)) == {Extractor.HOOK}
    assert set(asked(engine, 1) + asked(engine, 2) + asked(engine, 5)) == {Extractor.TORCHSCRIPT}


def test_no_answer_is_wrong_while_it_changes(engine: Engine) -> None:
    """Four callers see both extractors, and every answer is the net's own."""
    slowed(load(engine), Extractor.TORCHSCRIPT)
    for size in range(1, 5):
        right(size)  # Not by several threads, as making a net seeds their common generator.

    def call(n: int) -> set[Extractor]:
        return set(asked(engine, 1 + n % 4, 2 * RACE_AFTER))

    with ThreadPoolExecutor(4) as pool:
        served = set().union(*pool.map(call, range(4)))
    assert len(raced(engine, 3)) == 3
    assert served == {Extractor.TORCHSCRIPT, Extractor.HOOK}


def test_a_program_that_lost_its_race_counts_as_used(engine: Engine) -> None:
    """Or it would be dropped before programs that nobody asks for, and its race forgotten."""
    host = load(engine)
    slowed(host, Extractor.TORCHSCRIPT)
    asked(engine, 1, RACE_AFTER)
    raced(engine)
    (key,) = host.plans._declared
    host.plans._built[key] = host.plans._declared.pop(key)  # As if it had not been declared.
    ask(engine, "residual", "layer1", batch(1), Extractor.TORCHSCRIPT)
    assert programs_of(host)[0] == key
    assert asked(engine, 1) == [Extractor.HOOK]
    assert programs_of(host)[-1] == key


def test_a_race_can_be_forbidden(engine: Engine) -> None:
    """With ``race = false`` AUTO stays with the program, however slow."""
    host = load(engine, race=False)
    slowed(host, Extractor.TORCHSCRIPT)
    assert set(asked(engine, 1, 2 * RACE_AFTER)) == {Extractor.TORCHSCRIPT}
    assert host._choice._promoter._counts == {}
    assert notes(engine) == []


def test_a_model_that_is_gone_ends_its_race(engine: Engine) -> None:
    """Closing an engine in the middle of a race neither hangs nor fails."""
    slowed(load(engine), Extractor.TORCHSCRIPT)
    asked(engine, 1, RACE_AFTER)
    begun = time.monotonic()
    engine.close()
    assert time.monotonic() - begun < PATIENCE


def test_programs_that_were_named_take_part(engine: Engine) -> None:
    """Another compiler's plan races too, and wins if it is the fastest of three."""
    host = load(engine)
    slowed(host, Extractor.TORCHSCRIPT)
    slowed(host, Extractor.HOOK)
    # Its plan is there once a request has named it; here the program is TORCHSCRIPT's own.
    (key,) = host.plans._declared
    other = key._replace(extractor=Extractor.EXPORT)
    slow = host.plans._declared[key]
    host.plans._built[other] = replace(
        slow, built=slow.built._built, kind=kind_of(Extractor.EXPORT)
    )
    asked(engine, 1, RACE_AFTER)
    (note,) = raced(engine)
    assert note.startswith("AUTO, layer2, about 1 item: EXPORT was ")
    assert "times as fast as TORCHSCRIPT (" in note
    assert "times as fast as HOOK (" in note
    assert asked(engine, 1, 3) == [Extractor.EXPORT] * 3
    host.plans.drop(other)  # As if it had been dropped for others.
    assert asked(engine, 1) == [Extractor.TORCHSCRIPT]


def test_a_program_that_is_named_after_the_race_starts_another(engine: Engine) -> None:
    """The winner so far serves until then; a result with a program that is gone stays."""
    host = load(engine)
    slowed(host, Extractor.TORCHSCRIPT)
    asked(engine, 1, RACE_AFTER)
    raced(engine)
    (key,) = host.plans._declared
    other = key._replace(extractor=Extractor.EXPORT)
    slowed(host, Extractor.HOOK)
    slow = host.plans._declared[key]
    host.plans._built[other] = replace(
        slow, built=slow.built._built, kind=kind_of(Extractor.EXPORT)
    )
    assert set(asked(engine, 1, RACE_AFTER)) == {Extractor.HOOK}
    until(lambda: "EXPORT was" in notes(engine)[0])
    (note,) = notes(engine)
    assert note.startswith("AUTO, layer2, about 1 item: EXPORT was ")
    assert asked(engine, 1, 3) == [Extractor.EXPORT] * 3
    host.plans.drop(other)
    assert set(asked(engine, 1, 2 * RACE_AFTER)) == {Extractor.TORCHSCRIPT}
    assert notes(engine) == [note]


def test_results_are_kept_for_the_next_start(engine: Engine, folder: Path, caplog) -> None:
    """AUTO takes the winner from the first request on; a damaged file is as good as none."""
    slowed(load(engine), Extractor.TORCHSCRIPT)
    asked(engine, 1, RACE_AFTER)
    told = raced(engine)
    with closing(started(folder)) as again:
        load(again)
        assert asked(again, 1) == [Extractor.HOOK]
        assert asked(again, 2) == [Extractor.TORCHSCRIPT]
        assert notes(again) == told
    (file,) = folder.glob("*.races")
    file.write_text(file.read_text()[:-2])
    with closing(started(folder)) as again:
        load(again)
        assert asked(again, 1) == [Extractor.TORCHSCRIPT]
        assert notes(again) == []
    assert "the results of earlier races are damaged" in caplog.text


def test_a_kept_winner_whose_program_is_gone_is_not_compiled(engine: Engine, folder: Path) -> None:
    """EXPORT was named in an earlier start, and nobody has asked for it in this one."""
    host = load(engine)
    (key,) = host.plans._declared
    ratios = {EXPORT: (2.0, 2.0, 2.0)}
    race = Race(TORCHSCRIPT, EXPORT, ratios, "layer2, about 1 item")
    KeptRaces(PlanCache(folder, 1 << 30), host._measured.facts).store(Contest.of(key, 1), race)
    with closing(started(folder)) as again:
        host = load(again)
        assert set(asked(again, 1, RACE_AFTER)) == {Extractor.TORCHSCRIPT}
        (note,) = notes(again)
        assert "EXPORT was 2.00 times" in note
        host._choice._promoter.close()  # Its work is done.
        assert host.plans._built == {}


def hurdled(host: ModelHost, monkeypatch: pytest.MonkeyPatch, *hurdled: Extractor | str) -> None:
    """Make extractors or variants slow, whenever their programs are made."""
    finish = TorchScriptKind.finish

    def slow_finish(
        self: TorchScriptKind, program: Any, typical: Any = None, variant: str = ""
    ) -> BuiltExtractor:
        built = finish(self, program, typical, variant)
        return Slow(built) if variant in hurdled else built

    monkeypatch.setattr(TorchScriptKind, "finish", slow_finish)
    for each in hurdled:
        if isinstance(each, Extractor):
            slowed(host, each)


def programs_of(host: ModelHost) -> list[PlanKey]:
    """Return the compiled plans that were not declared."""
    return [key for key, plan in host.plans._built.items() if plan.kind.compiled]


def programs(host: ModelHost) -> set[Entrant]:
    """Return what runs them."""
    return set(map(Entrant.of, programs_of(host)))


with_variant = pytest.mark.parametrize("variants", [(CHANNELS_LAST,)])


@with_variant
def test_another_way_to_finish_the_program_wins(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AUTO's replies name TORCHSCRIPT; who names it gets the bits of the usual way."""
    host = load(engine)
    usual = ask(engine, "residual", "layer2", batch(1), Extractor.TORCHSCRIPT).torch()["layer2"]
    hurdled(host, monkeypatch, Extractor.TORCHSCRIPT, Extractor.HOOK)
    asked(engine, 1, RACE_AFTER)
    (note,) = raced(engine)
    assert note.startswith("AUTO, layer2, about 1 item: TORCHSCRIPT with channels last was ")
    assert "times as fast as TORCHSCRIPT (" in note
    assert "times as fast as HOOK (" in note
    assert programs(host) == {VARIANT}
    runs: list[str] = []
    for plans in (host.plans._built, host.plans._declared):
        for key, plan in list(plans.items()):
            plans[key] = replace(plan, built=Counted(plan.built, str(Entrant.of(key)), runs))
    assert asked(engine, 1, 3) == [Extractor.TORCHSCRIPT] * 3
    assert runs == ["TORCHSCRIPT with channels last"] * 3
    named = ask(engine, "residual", "layer2", batch(1), Extractor.TORCHSCRIPT)
    assert runs[3:] == ["TORCHSCRIPT"]
    assert torch.equal(named.torch()["layer2"], usual)


class Counted:
    """An extractor that notes its runs."""

    def __init__(self, built: BuiltExtractor, name: str, runs: list[str]) -> None:
        self._built, self._name, self._runs = built, name, runs

    def run(self, x: Batch, sink: Sink) -> None:
        """See BuiltExtractor."""
        self._runs.append(self._name)
        self._built.run(x, sink)


@with_variant
def test_a_program_that_loses_is_dropped(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes memory for nothing. It takes part in the race of another number of items again."""
    host = load(engine)
    hurdled(host, monkeypatch, CHANNELS_LAST)
    for size, count in ((1, 1), (2, 2)):
        asked(engine, size, RACE_AFTER)
        assert "times as fast as TORCHSCRIPT with channels last (" in raced(engine, count)[-1]
    host._choice._promoter.close()
    assert programs(host) == set()
    assert host.refused_plans() == []


@with_variant
def test_a_loser_that_requests_name_stays(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the next request that names it would wait until its program is made again."""
    host = load(engine)
    hurdled(host, monkeypatch, CHANNELS_LAST)
    ask(engine, "residual", "layer2", batch(1), Extractor.TORCHSCRIPT, variant=CHANNELS_LAST)
    (named,) = programs_of(host)
    asked(engine, 1, RACE_AFTER)
    (note,) = raced(engine)
    assert "times as fast as TORCHSCRIPT with channels last (" in note
    host._choice._promoter.close()
    assert programs_of(host) == [named]
    assert Entrant.of(named) == VARIANT


@with_variant
def test_a_variant_that_won_serves_after_a_restart(
    engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its program is made again beside the requests, without another race."""
    hurdled(load(engine), monkeypatch, Extractor.TORCHSCRIPT, Extractor.HOOK)
    asked(engine, 1, RACE_AFTER)
    told = raced(engine)
    with closing(started(folder)) as again:
        host = load(again)
        asked(again, 1)
        until(lambda: programs(host) == {VARIANT})
        asked(again, 1, 2 * RACE_AFTER)
        assert notes(again) == told


@with_variant
def test_a_variant_that_is_wrong_never_serves(
    engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The race is between the others, and no layer is said to be refused.

    After a restart it is not tried again.
    """
    finish, finished = TorchScriptKind.finish, []

    def wrong_finish(
        self: TorchScriptKind, program: Any, typical: Any = None, variant: str = ""
    ) -> BuiltExtractor:
        built = finish(self, program, typical, variant)
        finished.append(variant)
        return Wrong(built) if variant else built

    monkeypatch.setattr(TorchScriptKind, "finish", wrong_finish)
    host = load(engine)
    slowed(host, Extractor.TORCHSCRIPT)
    asked(engine, 1, RACE_AFTER)
    (note,) = raced(engine)
    assert note.startswith("AUTO, layer2, about 1 item: HOOK was ")
    assert "channels last" not in note
    asked(engine, 1, 2 * RACE_AFTER)
    assert programs(host) == set()
    assert host.refused_plans() == []
    assert (tried := finished.count(CHANNELS_LAST)) > 0
    with closing(started(folder)) as again:
        host = load(again)
        asked(again, 1, 2 * RACE_AFTER)
        host._choice._promoter.close()
        assert notes(again) == [note]
    assert finished.count(CHANNELS_LAST) == tried


class Wrong:
    """An extractor whose values are wrong."""

    def __init__(self, built: BuiltExtractor) -> None:
        self._built = built

    def run(self, x: Batch, sink: Sink) -> None:
        """See BuiltExtractor."""
        self._built.run(x, lambda index, value: sink(index, value * 1.01))


@with_variant
def test_a_race_that_fails_leaves_no_program(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AUTO stays with the program that it has."""
    host = load(engine)
    made: list[set[Entrant]] = []

    def failing(*_: Any) -> Iterator[None]:
        made.append(programs(host))
        raise ModelRunError("planted")
        yield

    monkeypatch.setattr(host.races, "steps", failing)
    asked(engine, 1, RACE_AFTER)
    until(lambda: bool(made))
    host._choice._promoter.close()
    assert made == [{VARIANT}]
    assert programs(host) == set()
    assert asked(engine, 1) == [Extractor.TORCHSCRIPT]


@with_variant
def test_where_there_is_no_room_for_a_program_there_is_no_variant(engine: Engine) -> None:
    """It would push out the programs that serve requests."""
    host = load(engine)
    host.plans._most_programs = 1
    ask(engine, "residual", "layer1", batch(1), Extractor.TORCHSCRIPT)
    (other,) = programs_of(host)
    slowed(host, Extractor.TORCHSCRIPT)
    asked(engine, 1, RACE_AFTER)
    (note,) = raced(engine)
    assert note.startswith("AUTO, layer2, about 1 item: HOOK was ")
    assert "channels last" not in note
    host._choice._promoter.close()
    assert programs_of(host) == [other]


@pytest.mark.parametrize(
    ("size", "bucket"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8), (9, 16), (17, 32)]
)
def test_buckets(size: int, bucket: int) -> None:
    """A bucket ends with a power of two."""
    key: Any = None
    assert Contest.of(key, size).bucket == bucket


def test_results_in_words() -> None:
    """The winner is told beside each of the others."""
    ratios = {EXPORT: (2.0, 2.0, 4.0), HOOK: (0.5, 0.5, 0.25)}
    own = TORCHSCRIPT
    assert str(Race(own, own, {HOOK: (0.5, 0.25, 0.5)}, "fc, about 1 item")) == (
        "AUTO, fc, about 1 item: TORCHSCRIPT was 2.00 times as fast as HOOK "
        "(2.00 to 4.00 in 3 turns)"
    )
    changed = Race(own, EXPORT, ratios, "fc, about 1 item")
    assert str(changed) == (
        "AUTO, fc, about 1 item: EXPORT was 2.00 times as fast as TORCHSCRIPT "
        "(2.00 to 4.00 in 3 turns) and 4.00 times as fast as HOOK (4.00 to 16.00 in 3 turns)"
    )
