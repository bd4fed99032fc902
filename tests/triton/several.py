"""A model of several inputs, an optional one among them, by the blocking client."""

from __future__ import annotations

import numpy as np
import tritonclient.grpc as triton

from common import ADDRESS, HOOK

IDS = np.array([[5, 6, 7, 8], [9, 3, 0, 0]], np.int64)
MASK = (IDS != 0).astype(np.int64)


def tensor(name: str, x: np.ndarray) -> triton.InferInput:
    """Return an input with a numpy array in it."""
    given = triton.InferInput(name, list(x.shape), "INT64")
    given.set_data_from_numpy(x)
    return given


def head(*inputs: triton.InferInput) -> np.ndarray:
    """Return the model's layer ``head``."""
    wanted = [triton.InferRequestedOutput("head")]
    return client.infer("optional", list(inputs), outputs=wanted, parameters=HOOK).as_numpy("head")


def refusal(*inputs: triton.InferInput) -> str:
    """Return why inputs are refused; empty if they are not."""
    try:
        head(*inputs)
    except triton.InferenceServerException as error:
        return str(error.message())
    return ""


with triton.InferenceServerClient(ADDRESS) as client:
    metadata = client.get_model_metadata("optional")
    names = [(each.name, list(each.shape)) for each in metadata.inputs]
    assert names[:2] == [("input_ids", [-1, -1]), ("attention_mask", [-1, -1])], names

    masked = head(tensor("input_ids", IDS), tensor("attention_mask", MASK))
    whole = head(tensor("input_ids", IDS))
    # The first item has no padding, the second one has.
    assert np.allclose(masked[0], whole[0], rtol=1e-6)
    assert not np.allclose(masked[1], whole[1], rtol=1e-2)
    assert np.array_equal(head(tensor("attention_mask", MASK), tensor("input_ids", IDS)), masked)

    text = refusal(tensor("attention_mask", MASK))
    assert "without 'input_ids'" in text, text
print("ok")
