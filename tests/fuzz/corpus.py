"""The seeds of the fuzzers: real messages of every kind, and one for each refusal.

``python tests/fuzz/corpus.py`` writes them to ``corpus/``, and test_corpus.py tells when they are
stale. Other files there are inputs that a fuzzer once found something with: they are kept by hand.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from layertap.selection import Extractor
from layertap.services.native_form import encode_reply_head
from layertap.timings import Timings
from layertap.v1.feature_service_pb2 import ExtractRequest, ExtractResponse, ImageBatch
from layertap.v1.tensor_pb2 import DATA_TYPE_BOOL, DATA_TYPE_FLOAT32, SharedSlice, Tensor
from layertap.wire.dtypes import DTYPES
from layertap.wire.messages import (
    REPLY_TENSOR_FIELD,
    encode_request,
)
from layertap.wire.tensors import encode_message
from protowire import INT8, SCALAR, field, groups, varint

FOLDER = Path(__file__).parent / "corpus"

SHAPES = {"scalar": (), "vector": (5,), "empty": (0,), "hollow": (3, 0, 2), "rank_32": (1,) * 32}
HEAD = encode_reply_head(Extractor.FX, Timings(1, 2, 1 << 40, (1 << 64) - 1))
SHARED = Tensor(
    name="x",
    dtype=DATA_TYPE_FLOAT32,
    shape=[2, 3],
    shared=SharedSlice(region=3, generation=1 << 40, offset=64, size=24),
)


def ask() -> ExtractRequest:
    """Return the small fields of a request."""
    return ExtractRequest(
        model="resnet18",
        layers=[{"layer": "layer1.**", "dtype": 2}, {"layer": "fc", "capture": 2, "alias": "né"}],
        extractor=3,
    )


def seeds() -> dict[str, bytes]:
    """Return the seeds by name; the first word is the kind of message, or ``refused``."""
    return {**replies(), **requests(), **oddities(), **refused()}


def replies() -> dict[str, bytes]:
    """Return messages of servers: every dtype and every kind of shape."""
    out = {
        f"reply_{row.name}": _reply({"layer1.0": np.arange(6).reshape(2, 3).astype(row.numpy)})
        for row in DTYPES
    }
    for name, shape in SHAPES.items():
        out[f"reply_{name}"] = _reply({name: np.ones(shape, np.float32)})
    arrays = {f"b{row.number}": np.ones((1, row.number), row.numpy) for row in DTYPES}
    out["reply_shared"] = ExtractResponse(tensors=[SHARED], extractor=4).SerializeToString()
    return {**out, "reply_many": _reply(arrays), "reply_head": HEAD, "reply_nothing": b""}


def requests() -> dict[str, bytes]:
    """Return messages of clients: every dtype, images, and those of the protobuf library."""
    out = {
        f"request_{row.name}": encode_request(ask(), [("x", np.ones((1, 2, 2), row.numpy))])
        for row in DTYPES
    }
    images = ExtractRequest(model="m", images=[ImageBatch(images=[b"\x89PNG", b""])])
    plain = Tensor(name="x", dtype=DATA_TYPE_FLOAT32, shape=[1, 300], data=bytes(1200))
    return {
        **out,
        "request_shared": ExtractRequest(
            model="m", inputs=[SHARED], shared_memory_session=bytes(range(16))
        ).SerializeToString(),
        "request_long_bool": encode_request(ask(), [("mask", np.arange(5000) % 3 == 0)]),
        "request_images": images.SerializeToString(),
        "request_several": encode_request(
            ask(), [("ids", np.arange(6).reshape(1, 6)), ("mask", np.ones((1, 6), np.bool_))]
        ),
        "request_no_input": ask().SerializeToString(),
        "request_ordinary": ExtractRequest(model="m", inputs=[plain]).SerializeToString(),
    }


def oddities() -> dict[str, bytes]:
    """Return messages that no library writes but every parser must read."""
    tensor, images = field(2, 2, SCALAR), field(3, 2, field(1, 2, b"png"))
    sizes = field(3, 0, b"\x02") + field(3, 2, b"\x01\x03") + field(3, 0, b"\x01")
    first = INT8 + field(3, 0, b"\x02")
    full_group = field(9, 3) + field(0, 0, b"\1") + field(1, 2, b"\xff") + groups(2) + field(9, 4)
    strangers = field(1, 0, b"\x05") + field(2, 2, b"\x09") + field(5, 5, bytes(4)) + full_group
    eight = bytes([1, *[0] * 7])
    shared = [
        field(6, 2, field(4, 1, bytes(8)) + field(1, 0, b"\x07") + groups(98)),
        field(6, 2, field(4, 1, eight) + field(2, 1, eight) + field(9, 1, eight)),
    ]
    return {
        "request_tensor_then_images": tensor + images,
        "request_images_then_tensor": images + tensor,
        "request_two_tensors": field(2, 2, first + field(5, 2, b"ab")) + field(2, 2, SCALAR),
        "reply_sizes_packed_and_not": field(1, 2, INT8 + sizes + field(5, 2, b"abcdef")),
        "reply_scalars_twice": field(1, 2, SCALAR + field(1, 2, b"a") + field(1, 2, b"b") + SCALAR),
        "reply_unknown_fields": groups(2)
        + field(1, 2, strangers + SCALAR)
        + field(15, 1, bytes(8)),
        "reply_overlong_varints": varint(1 << 3 | 2, 5) + varint(len(SCALAR), 5) + SCALAR,
        "reply_names_of_every_plane": field(1, 2, SCALAR + field(1, 2, "a\u07ff\uffff🜁".encode())),
        "reply_deep_groups": groups(100) + field(1, 2, SCALAR + groups(99)),
        "reply_shared_twice": field(1, 2, INT8 + shared[0] + shared[1]),
        "reply_unknown_extractor": field(1, 2, SCALAR) + field(2, 0, b"\x4d"),
    }


def refused() -> dict[str, bytes]:
    """Return a reply for each rule that it can break."""
    minus_one, bool_ = varint((1 << 64) - 1), field(2, 0, varint(DATA_TYPE_BOOL))
    tensors = {
        "dtype_0": field(5, 2, b"\x07"),
        "dtype_11": field(2, 0, b"\x0b"),
        "rank_33": SCALAR + field(3, 2, b"\x01" * 33),
        "negative_size": SCALAR + field(3, 2, minus_one * 2),
        "overflow": INT8 + field(3, 2, varint(1 << 32) * 2),
        "overflow_by_1": INT8 + field(3, 2, varint(1 << 62) + b"\x02"),
        "overflow_next_to_0": INT8 + field(3, 2, varint(1 << 62) + b"\x04\x00"),
        "data_too_long": INT8 + field(3, 0, b"\x02") + field(5, 2, b"abc"),
        "shared_too_long": INT8 + field(6, 2, field(4, 1, bytes([2, *[0] * 7]))),
        "shared_and_data": SCALAR + field(6, 2, field(4, 1, bytes([1, *[0] * 7]))),
        "shared_cut": INT8 + field(6, 2, field(4, 1, bytes(7))),
        "groups_too_deep_in_shared": SCALAR + field(6, 2, groups(99)),
        "bool_2_in_front": bool_ + field(3, 0, b"\x03") + field(5, 2, b"\2\1\0"),
        "bool_2": bool_ + field(3, 0, b"\x03") + field(5, 2, b"\0\1\2"),
        "name": SCALAR + field(1, 2, b"\xed\xa0\x80"),
        "packed_size_cut": INT8 + field(3, 2, b"\x81") + field(5, 2, b"a"),
        "groups_too_deep": SCALAR + groups(100),
        "group_without_begin": SCALAR + field(9, 4),
        "group_without_end": SCALAR + field(9, 3),
        "group_ended_by_another": SCALAR + field(9, 3) + field(8, 4),
        "wire_type_6": SCALAR + field(9, 6),
        "tag_of_six_bytes": SCALAR + varint(1 << 3, 6) + b"\x05",
        "length_of_six_bytes": INT8 + b"\x2a" + varint(1, 6) + b"a",
        "field_number_0": SCALAR + b"\x00\x01",
        "tag_over_32_bits": SCALAR + varint(1 << 32) + b"\x05",
        "varint_too_long": SCALAR + field(2, 0, b"\x85" + b"\x80" * 9 + b"\x00"),
    }
    out = {f"refused_{name}": field(1, 2, tensor) for name, tensor in tensors.items()}
    return {
        **out,
        "refused_length_past_the_end": b"\x0a\x7f" + SCALAR,
        "refused_field_number_0_on_top": b"\x02\x00",
        "refused_tag_over_32_bits_on_top": varint(1 << 32) + b"\x05",
    }


def _reply(arrays: dict[str, np.ndarray]) -> bytes:
    return encode_message(list(arrays.items()), REPLY_TENSOR_FIELD, HEAD)


def main() -> None:
    """Write the seeds."""
    FOLDER.mkdir(exist_ok=True)
    for name, message in seeds().items():
        (FOLDER / name).write_bytes(message)


if __name__ == "__main__":
    main()
