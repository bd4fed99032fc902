"""Texts as BYTES by the blocking client, and what it says of wrong ones."""

from __future__ import annotations

import sys

import numpy as np
import tritonclient.grpc as triton

from common import ADDRESS, HOOK, refused

LAYER = "encoder.layer.0"
WANTED = [triton.InferRequestedOutput(LAYER)]


def texts(*values: str | bytes, name: str = "texts") -> triton.InferInput:
    """Return an input of texts, as tritonclient encodes them."""
    given = triton.InferInput(name, [len(values)], "BYTES")
    given.set_data_from_numpy(np.array(values, dtype=np.object_))
    return given


with triton.InferenceServerClient(ADDRESS) as client:
    metadata = client.get_model_metadata("bert")
    rows = {each.name: (each.datatype, list(each.shape)) for each in metadata.inputs}
    assert rows["texts"] == ("BYTES", [-1]), rows

    two = texts("the cat sat on the mat.", "a bird flew")
    result = client.infer("bert", [two], outputs=WANTED, parameters={**HOOK, "return_tokens": True})
    np.save(sys.argv[2], result.as_numpy(LAYER))
    assert result.as_numpy("tokens.mask").tolist() == [[1] * 9, [1] * 5 + [0] * 4]

    cut = client.infer(
        "bert",
        [texts("the cat sat on the mat.", name="input_ids")],
        outputs=WANTED,
        parameters={**HOOK, "truncation": "end", "max_tokens": 5},
    )
    assert cut.as_numpy(LAYER).shape == (1, 5, 32)

    refused(
        lambda: client.infer("bert", [texts(b"\xff\xfe")], outputs=WANTED),
        "INVALID_ARGUMENT",
        "expected a text in UTF-8",
    )
    refused(lambda: client.infer("bert", [texts("a"), two], outputs=WANTED), "expected it once")
print("ok")
