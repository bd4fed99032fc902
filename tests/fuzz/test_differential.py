from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import pytest
from google.protobuf.internal import api_implementation
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corpus import seeds
from differential import CORES, MALFORMED, Reading, by_upb, check
from hostile import hostile_message, mutated
from layertap import _core
from layertap.client.features import Features
from layertap.v1.feature_service_pb2 import ExtractRequest, ExtractResponse
from layertap.v1.tensor_pb2 import Tensor
from protowire import SCALAR, field, groups
from strategies import tensors

# Derandomized, because a test that fails now and then says little about the change at hand; looking
# further each time is what `make fuzz` is for.
bounded = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
random_seeds = st.integers(0, (1 << 64) - 1)

parts = st.lists(tensors(), max_size=3)


def test_the_oracle_is_upb() -> None:
    """The parser to compare with is the one in C, not protobuf's fallback in Python."""
    assert api_implementation.Type() == "upb"


@bounded
@given(parts, st.integers(-5, 5))
def test_structured_replies_decode_as_upb_does(parts: list[Tensor], extractor: int) -> None:
    """A reply of the protobuf library is read with the same values."""
    message = ExtractResponse(tensors=parts, extractor=extractor).SerializeToString()
    assert isinstance(by_upb(message, ExtractResponse), Reading)
    check(message)


@bounded
@given(tensors(), st.text(st.characters(exclude_categories=["Cs"]), max_size=5))
def test_structured_requests_decode_as_upb_does(tensor: Tensor, model: str) -> None:
    """A request of the protobuf library is read with the same values."""
    message = ExtractRequest(model=model, inputs=[tensor]).SerializeToString()
    assert isinstance(by_upb(message, ExtractRequest), Reading)
    check(message)


@bounded
@given(parts, random_seeds)
def test_mutated_messages_decode_as_upb_does(parts: list[Tensor], seed: int) -> None:
    """A valid message with a few changes is read like in upb, or refused by a rule."""
    random = Random(seed)
    request = ExtractRequest(model="m", inputs=parts)
    for message in (
        ExtractResponse(tensors=parts).SerializeToString(),
        request.SerializeToString(),
        random.choice(list(seeds().values())),
    ):
        check(mutated(random, message))


@bounded
@given(random_seeds)
def test_hostile_bytes_decode_as_upb_does(seed: int) -> None:
    """Any fields in any order are accepted or refused like in upb, with the same meaning."""
    random = Random(seed)
    for _ in range(10):
        check(hostile_message(random))


@bounded
@given(st.binary(max_size=40))
def test_random_bytes_decode_as_upb_does(message: bytes) -> None:
    """Random bytes are accepted or refused like in upb."""
    check(message)


@pytest.mark.parametrize("kind", [ExtractRequest, ExtractResponse])
def test_every_prefix_is_refused_or_read_as_upb_does(kind: Callable[..., Any]) -> None:
    """A message cut anywhere never crashes and is never read differently."""
    tensor = Tensor(name="né", dtype=1, shape=[1, 300], padding=b"\0", data=bytes(1200))
    if kind is ExtractRequest:
        message = ExtractRequest(model="m", inputs=[tensor]).SerializeToString() + groups(3)
    else:
        message = ExtractResponse(tensors=[tensor], extractor=1).SerializeToString() + groups(3)
    for size in range(len(message) + 1):
        check(message[:size])


def test_mutations_reach_every_outcome() -> None:
    """Of 500 mutations some are malformed, some break a rule, and many are read."""
    random = Random(0)
    messages = [mutated(random, seeds()["reply_head"] + field(1, 2, SCALAR)) for _ in range(500)]
    outcomes = [by_upb(message, ExtractResponse) for message in messages]
    read = sum(isinstance(outcome, Reading) for outcome in outcomes)
    malformed = outcomes.count(MALFORMED)
    assert read > 100
    assert malformed > 20
    assert len(outcomes) - read - malformed > 20


def fake(decode: Callable[..., Any]) -> Any:
    """Return a core that decodes by a function."""
    return type("Fake", (), {"decode": staticmethod(decode)})


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found[1:],
        lambda found: [("other", *found[0][1:])],
        lambda found: [(found[0][0], 6, *found[0][2:])],
        lambda found: [(*found[0][:2], (1,), found[0][3])],
        lambda found: [(*found[0][:3], memoryview(b"\x08"))],
    ],
    ids=["lost", "name", "dtype", "shape", "data"],
)
def test_a_wrong_tensor_is_told(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[list], list]
) -> None:
    """The check detects a tensor that is missing or has another name, dtype, shape or elements."""

    def decode(*arguments: Any, **keywords: Any) -> Any:
        rest, found = _core.decode(*arguments, **keywords)
        return rest, change(found) if found else found

    message = field(1, 2, SCALAR)
    check(message)
    monkeypatch.setitem(CORES, "core", fake(decode))
    with pytest.raises(AssertionError, match="ExtractResponse, core: "):
        check(message)


def test_a_lost_field_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check detects that a field besides the tensors is missing."""

    def decode(*arguments: Any, **keywords: Any) -> Any:
        return b"", _core.decode(*arguments, **keywords)[1]

    monkeypatch.setitem(CORES, "core", fake(decode))
    with pytest.raises(AssertionError, match=", core: Reading"):
        check(seeds()["reply_head"])


@pytest.mark.parametrize("name", [name for name in sorted(seeds()) if name.startswith("refused")])
def test_a_lenient_decoder_is_told(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The check detects a decoder that accepts what it should refuse."""
    monkeypatch.setitem(CORES, "pure", fake(lambda *_, **__: (b"", [])))
    with pytest.raises(AssertionError, match=", pure: Reading"):
        check(seeds()[name])


@pytest.mark.parametrize("name", ["reply_head", "request_images", "refused_bool_2"])
def test_a_refusal_without_its_reason_is_told(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The check detects a decoder that refuses what it should read, or for another reason."""

    def decode(*_: Any, **__: Any) -> Any:
        raise ValueError("tensor: dtype: got 0, not a DataType")

    monkeypatch.setitem(CORES, "core", fake(decode))
    with pytest.raises(AssertionError, match=", core: 'tensor: dtype"):
        check(seeds()[name])


@pytest.mark.parametrize("name", ["field_number_0", "tag_over_32_bits"])
def test_a_fault_that_upb_would_hide_is_told(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The check detects that decode accepts what it should refuse, although upb refuses it then."""
    monkeypatch.setitem(CORES, "core", fake(lambda message, **_: (message, [])))
    with pytest.raises(AssertionError, match="its twin: None"):
        check(seeds()[f"refused_{name}_on_top"])


def test_a_wrong_array_of_features_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check detects that the client's arrays differ from the message."""
    monkeypatch.setattr(Features, "__getitem__", lambda *_: np.zeros((), np.int8))
    with pytest.raises(AssertionError):
        check(field(1, 2, SCALAR))
