"""A process with good and bad clients, which counts how every request ended, in JSON lines.

    python callers.py ADDRESS THREADS plain|heavy|mixed [INTERVAL]

Each caller asks as soon as it was answered, or, with INTERVAL, begins a request every so many
seconds and leaves out those that it is late for. The process writes its counts so far as a JSON
line to stdout, again and again, until it is killed or its stdin is closed. Needs no torch, as no
client does.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

import grpc
import numpy as np

from layertap import Client, Features, StreamRequest, errors
from layertap.v1 import feature_service_pb2 as pb
from layertap.wire.messages import encode_request

SIDE = 64
MODELS = ("a", "b")
LAYERS = ("first", "burn", "third")
EXTRACT = "/layertap.v1.FeatureService/Extract"

OVERLOAD = {"OverloadedError"}
LATER = OVERLOAD | {"RESOURCE_EXHAUSTED", "UnavailableError", "UNAVAILABLE"}
# What may become of each kind of request, besides OK and what every client must expect.
ALLOWED: dict[str, set[str]] = {
    "plain": OVERLOAD,
    "heavy": OVERLOAD,
    "described": set(),
    "cancelled": OVERLOAD | {"CANCELLED", "RESOURCE_EXHAUSTED"},
    "hurried": OVERLOAD | {"DeadlineExceededError"},
    "streamed": OVERLOAD | {"DeadlineExceededError"},
    "left": OVERLOAD,
    "unknown model": OVERLOAD | {"ModelNotFoundError"},
    "unknown layer": OVERLOAD | {"LayerNotFoundError"},
    "wrong shape": OVERLOAD | {"InvalidInputError"},
    "too many items": OVERLOAD | {"InvalidInputError"},
    "no image": OVERLOAD | {"InvalidInputError"},
    "garbage": {"INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"},
}
FAILS = {kind for kind in ALLOWED if kind[0] in "uwtg" or kind == "no image"}


class Caller:
    """One client that asks again and again; for one thread.

    Attributes:
        ended: How often each (kind of request, outcome) was seen.
        wrong: What was wrong in answers, or should not have happened.
        latencies: Milliseconds of the plain and heavy requests that were answered.
    """

    def __init__(self, address: str, seed: int) -> None:
        self.ended: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.latencies: list[float] = []
        self._chance = random.Random(seed)
        self._address = address
        self._client = Client(address, timeout=60)

    def plain(self) -> None:
        """Request some layers of a few items, and check every element."""
        self._timed(*self._question(items=self._chance.choice([1, 1, 1, 2, 4])))

    def heavy(self) -> None:
        """Request what takes the server as long as a pass of a usual network."""
        _, value, x, layers = self._question(items=1)
        self._timed("heavy", value, x, layers)

    def described(self) -> None:
        """Ask for the catalogue."""
        names = [layer.name for layer in self._client.describe_model("a").layers]
        if "third" not in names:
            self.wrong.append(f"catalogue without a layer: {names}")

    def hurried(self) -> None:
        """Set too short a deadline."""
        model, value, x, layers = self._question(items=4)
        timeout = self._chance.uniform(0.001, 0.03)
        self._check(self._client.extract(model, x, layers, timeout=timeout), value)

    def cancelled(self) -> None:
        """Leave in the middle of the call."""
        model, _, x, _ = self._question(items=2)
        request = pb.ExtractRequest(model=model, layers=[pb.LayerSelection(layer="third")])
        call = (
            self._client._opened()[0]
            .channel.unary_unary(EXTRACT)
            .future(encode_request(request, [("", x)]))
        )
        time.sleep(self._chance.uniform(0, 0.02))
        call.cancel()
        with suppress(grpc.FutureCancelledError):
            call.result()

    def streamed(self) -> None:
        """Request many large replies over one stream, and read them slowly."""
        asked = [self._question(items=16) for _ in range(12)]
        requests = [StreamRequest(model, x, layers, key=value) for model, value, x, layers in asked]
        with self._client.stream(timeout=60) as stream:
            for value, outcome in stream.extract(requests):
                self._item(outcome, value)
                time.sleep(self._chance.uniform(0, 0.05))

    def left(self) -> None:
        """Open a stream and leave it with all its items in flight."""
        model, value, x, layers = self._question(items=4)
        with self._client.stream(timeout=60) as stream:
            for _, outcome in stream.extract([StreamRequest(model, x, layers)] * 16):
                if self._item(outcome, value):
                    break

    def bad(self, kind: str) -> None:
        """Request what can't be served."""
        x = np.ones((1, 3, SIDE, SIDE), np.float32)
        match kind:
            case "unknown model":
                self._client.extract("nobody", x, "third")
            case "unknown layer":
                self._client.extract("a", x, "thirt")
            case "wrong shape":
                self._client.extract("a", x[:, :2], "third")
            case "too many items":
                self._client.extract("a", np.ones((65, 3, SIDE, SIDE), np.float32), "third")
            case "no image":
                self._client.extract("a", b"not an image", "third")
            case "garbage":
                garbage = self._chance.randbytes(self._chance.randrange(1, 200))
                self._client._opened()[0].channel.unary_unary(EXTRACT)(garbage, timeout=60)

    def once(self, kind: str, *, patient: bool = True) -> None:
        """Make a request of a kind, count how it ended, and wait if the server says so."""
        try:
            self.bad(kind) if kind in FAILS else getattr(self, kind)()
        except errors.LayertapError as error:
            outcome = type(error).__name__
        except grpc.RpcError as error:
            outcome = error.code().name
        else:
            outcome = "OK"
        self.ended[f"{kind}: {outcome}"] += 1
        if outcome not in ALLOWED[kind] | ({"UnavailableError"} if kind in FAILS else {"OK"}):
            self._unexpected(kind, outcome)
        if patient and outcome in LATER:
            # As any client should: come again later.
            time.sleep(self._chance.uniform(0.01, 0.06))

    def _unexpected(self, kind: str, outcome: str) -> None:
        # A server that was told to stop says so; the parent decides whether it was.
        if outcome in ("UnavailableError", "UNAVAILABLE"):
            return
        self.wrong.append(f"{kind} ended with {outcome}")

    def _question(self, items: int) -> tuple[str, int, np.ndarray, list[str]]:
        value = self._chance.randrange(1, 1000)
        layers = self._chance.sample(LAYERS, self._chance.randrange(1, len(LAYERS) + 1))
        if not {"first", "third"} & set(layers):
            layers.append("third")
        x = np.full((items, 3, SIDE, SIDE), value, np.float32)
        return self._chance.choice(MODELS), value, x, layers

    def _timed(self, model: str, value: int, x: np.ndarray, layers: list[str]) -> None:
        begun = time.perf_counter()
        self._check(self._client.extract(model, x, layers), value)
        self.latencies.append((time.perf_counter() - begun) * 1000)

    def _item(self, outcome: Features | errors.LayertapError, value: int) -> bool:
        """Count an item of a stream; return whether it was answered."""
        if isinstance(outcome, errors.LayertapError):
            if not isinstance(outcome, errors.OverloadedError):
                raise outcome
            self.ended["item: OverloadedError"] += 1
            return False
        self.ended["item: OK"] += 1
        self._check(outcome, value)
        return True

    def _check(self, features: Features, value: int) -> None:
        """Compare each layer with its expected values, all of one version."""
        versions = set()
        for layer, unit in (("first", 3 * value), ("third", 12 * value + 1)):
            if layer in features:
                versions.update(np.unique(features[layer] / unit).tolist())
        if len(versions) != 1 or not float(versions.pop()).is_integer():
            self.wrong.append(f"wrong values for {value}: {features!r}")
        if "burn" in features and not np.isfinite(features["burn"]).all():
            self.wrong.append("burn holds NaN")


def kinds(mode: str, chance: random.Random) -> Iterator[str]:
    """Yield the one kind of request, or all kinds but the heavy one, mostly plain ones."""
    others = [kind for kind in ALLOWED if kind not in ("plain", "heavy")]
    while True:
        if mode != "mixed":
            yield mode
        else:
            yield "plain" if chance.random() < 0.7 else chance.choice(others)


def ticks(interval: float, chance: random.Random) -> Iterator[None]:
    """Yield at regular times, with a phase; at once if there is no interval."""
    due = time.monotonic() + chance.uniform(0, interval)
    while True:
        late = time.monotonic() - due
        if late < 0:
            time.sleep(-late)
        elif interval:
            due += late // interval * interval
        due += interval
        yield


def main(address: str, threads: int, mode: str, interval: float = 0) -> None:
    """Let callers send requests until stdin is closed."""
    callers = [Caller(address, random.randrange(1 << 32)) for _ in range(threads)]
    ended = threading.Event()

    def ask(caller: Caller) -> None:
        asked = kinds(mode, caller._chance)
        for kind, _ in zip(asked, ticks(interval, caller._chance), strict=False):
            if ended.is_set():
                return
            try:
                caller.once(kind, patient=not interval)
            except Exception as error:
                # Otherwise only this thread would end, and nobody would notice.
                caller.wrong.append(f"{kind} raised {type(error).__name__}: {error}")
                raise

    begun = time.monotonic()
    asking = [threading.Thread(target=ask, args=(caller,)) for caller in callers]
    for thread in asking:
        thread.start()
    reader = threading.Thread(target=lambda: (sys.stdin.read(), ended.set()))
    reader.start()
    while not ended.wait(0.5):
        report(callers, begun)
    for thread in asking:
        thread.join()
    report(callers, begun)


def report(callers: list[Caller], begun: float) -> None:
    """Write the counts so far."""
    total = sum((caller.ended for caller in callers), Counter())
    wrong = [text for caller in callers for text in caller.wrong]
    latencies = [ms for caller in callers for ms in caller.latencies]
    said = {"ended": total, "wrong": wrong[:20], "latencies": latencies}
    print(json.dumps(said | {"seconds": time.monotonic() - begun}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], *map(float, sys.argv[4:]))
