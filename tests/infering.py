"""Shared by the tests of the Open Inference Protocol: requests from stock messages, readers."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from layertap.inference import grpc_service_pb2 as pb
from tinynets import ITEM

ROOT = Path(__file__).parents[1]
TRITON_PYTHON = ROOT / ".venv-triton" / "bin" / "python"

NUMPY = {
    "FP32": np.float32,
    "FP16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "INT64": np.int64,
    "BOOL": np.bool_,
}


def parameter(value: object) -> pb.InferParameter:
    """Return a parameter of a value's type."""
    if isinstance(value, bool):
        return pb.InferParameter(bool_param=value)
    if isinstance(value, int):
        return pb.InferParameter(int64_param=value)
    return pb.InferParameter(string_param=str(value))


def parameters(values: Mapping[str, object]) -> dict[str, pb.InferParameter]:
    """Return parameters by name."""
    return {name: parameter(value) for name, value in values.items()}


def output(name: str, **values: object) -> pb.ModelInferRequest.InferRequestedOutputTensor:
    """Return a requested output."""
    return pb.ModelInferRequest.InferRequestedOutputTensor(name=name, parameters=parameters(values))


def given(
    name: str, datatype: str, shape: Sequence[int], **fields: object
) -> pb.ModelInferRequest.InferInputTensor:
    """Return an input."""
    return pb.ModelInferRequest.InferInputTensor(
        name=name, datatype=datatype, shape=shape, **fields
    )


def batch(size: int = 1, seed: int = 5) -> np.ndarray:
    """Return a random batch for tiny nets."""
    return np.random.default_rng(seed).random((size, *ITEM), dtype=np.float32)


def raw_request(
    x: np.ndarray | None = None,
    *outputs: pb.ModelInferRequest.InferRequestedOutputTensor,
    **changes: object,
) -> pb.ModelInferRequest:
    """Return a request of raw FP32 for residual's layer1, or other outputs.

    By HOOK: answers are compared bit for bit, and AUTO may go over to another extractor meanwhile.
    """
    x = batch() if x is None else x
    fields: dict[str, object] = {
        "model_name": "residual",
        "inputs": [given("input", "FP32", x.shape)],
        "outputs": outputs or [output("layer1")],
        "raw_input_contents": [x.tobytes()],
        "parameters": {"extractor": pb.InferParameter(string_param="hook")},
    }
    return pb.ModelInferRequest(**{**fields, **changes})


def bytes_tensor(*elements: bytes) -> bytes:
    """Return byte strings in their raw form."""
    return b"".join(len(each).to_bytes(4, "little") + each for each in elements)


def arrays(response: pb.ModelInferResponse) -> dict[str, np.ndarray]:
    """Return the outputs of a response."""
    assert len(response.raw_output_contents) == len(response.outputs)
    return {
        out.name: np.frombuffer(raw, NUMPY[out.datatype]).reshape(out.shape)
        for out, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }


def run_tritonclient(script: str, *args: object) -> None:
    """Run a script of tests/triton with NVIDIA's client, and check that it ended well."""
    done = subprocess.run(
        [TRITON_PYTHON, ROOT / "tests" / "triton" / script, *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["ok"]), done.stderr
