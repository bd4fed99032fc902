"""The native form is an ExtractResponse."""

from __future__ import annotations

import numpy as np

from layertap.selection import Extractor
from layertap.services.native_form import NativeForm
from layertap.timings import Timings
from layertap.v1.feature_service_pb2 import ExtractStreamResponse
from layertap.wire.stream_messages import id_field


def test_the_native_form_is_what_upb_reads() -> None:
    """Extractor, timings, additional fields and tensors are readable, at the size laid out."""
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    form = NativeForm(Extractor.FX, fields=id_field(7))
    nbytes = form.lay_out([("a", 1, (2, 3))])
    admitted: list[int] = []
    builder = form.builder(admitted.append)
    builder.write(0, x, 1)
    message = builder.finish(form.head(Timings(1, 2, 3, 4)))
    assert (nbytes, [nbytes], form.shared_bytes) == (len(message), admitted, 0)
    reply = ExtractStreamResponse.FromString(message)
    assert (reply.id, reply.timings.compute_ns, reply.tensors[0].name) == (7, 3, "a")
    assert reply.tensors[0].data == x.tobytes()
