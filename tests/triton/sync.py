"""The synchronous client: every kind of request, with numpy input and output."""

from __future__ import annotations

import queue
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import serialize_byte_tensor

from common import ADDRESS, HOOK, MODEL, batch, refused, tensor

client = triton.InferenceServerClient(ADDRESS)
assert client.is_server_live()
assert client.is_server_ready()
assert client.is_model_ready(MODEL)
assert not client.is_model_ready("nope")
assert client.get_server_metadata().name == "layertap"
metadata = client.get_model_metadata(MODEL)
assert [each.name for each in metadata.outputs] == ["layer1", "before"]
assert client.get_model_config(MODEL).config.max_batch_size == 64
assert client.get_model_config(MODEL, as_json=True)["config"]["backend"] == "layertap"
assert MODEL in {each.name for each in client.get_model_repository_index().models}
assert client.get_trace_settings().settings["trace_level"].value == ["OFF"]
assert client.get_log_settings().settings["log_error"].bool_param

# FP32, by default and by name.
x = batch()
everything = client.infer(MODEL, [tensor(x)], parameters=HOOK)
assert everything.as_numpy("layer1").shape == (2, 8, 8, 8)
assert everything.as_numpy("before").shape == (2, 16, 4, 4)
named = client.infer(
    MODEL,
    [tensor(x)],
    outputs=[triton.InferRequestedOutput("layer1"), triton.InferRequestedOutput("fc")],
    request_id="seven",
    parameters=HOOK,
)
assert np.array_equal(named.as_numpy("layer1"), everything.as_numpy("layer1"))
assert named.as_numpy("fc").dtype == np.float32
assert named.get_response().id == "seven"
np.save(sys.argv[2], named.as_numpy("layer1"))

# FP16 and BF16, in and out.
for model, datatype, kind in (("half", "FP16", np.float16), ("brain", "BF16", ml_dtypes.bfloat16)):
    request = triton.InferRequestedOutput("half")
    request._get_tensor().parameters["layer"].string_param = "layer1"
    request._get_tensor().parameters["dtype"].string_param = datatype
    half = client.infer(MODEL, [tensor(x)], outputs=[request], parameters=HOOK).as_numpy("half")
    assert half.dtype == kind, half.dtype
    assert np.array_equal(half, named.as_numpy("layer1").astype(kind))
    taken = client.infer(model, [tensor(x.astype(kind), datatype)])
    assert taken.as_numpy("fc").dtype == kind
    # What a request's own parameters say holds for all of its outputs.
    pooled = client.infer(
        MODEL,
        [tensor(x)],
        outputs=[triton.InferRequestedOutput("layer1")],
        parameters={"reduction": "global_average_pool", "dtype": datatype},
    ).as_numpy("layer1")
    assert (pooled.shape, pooled.dtype) == ((2, 8), kind)

# Encoded images, as BYTES.
photo = np.array([Path(sys.argv[3]).read_bytes()] * 2, dtype=np.object_)
images = triton.InferInput("images", [2], "BYTES")
images.set_data_from_numpy(photo)
seen = client.infer("resnet18", [images], outputs=[triton.InferRequestedOutput("avgpool")])
assert seen.as_numpy("avgpool").shape == (2, 512, 1, 1)
assert len(serialize_byte_tensor(photo).item()) == sum(4 + len(each) for each in photo)

# Statistics.
before = client.get_inference_statistics(MODEL).model_stats[0]
client.infer(MODEL, [tensor(batch(3))])
after = client.get_inference_statistics(MODEL).model_stats[0]
assert after.inference_count == before.inference_count + 3
assert after.inference_stats.success.count == before.inference_stats.success.count + 1

# What is wrong.
refused(lambda: client.infer("nope", [tensor(x)]), "NOT_FOUND", "Request for unknown model")
refused(
    lambda: client.infer(MODEL, [tensor(x)], outputs=[triton.InferRequestedOutput("layer7")]),
    "NOT_FOUND",
    "did you mean",
)
refused(lambda: client.infer(MODEL, [tensor(batch()[:, :2])]), "INVALID_ARGUMENT", "got shape")
refused(lambda: client.load_model(MODEL), "PERMISSION_DENIED")
refused(
    lambda: client.infer(MODEL, [tensor(x)], sequence_id=3, sequence_start=True),
    "sequences are not supported",
)
refused(lambda: client.infer(MODEL, [tensor(x)], timeout=1), "DEADLINE_EXCEEDED")
assert client.infer(MODEL, [tensor(x)], priority=1, timeout=10**8).as_numpy("layer1") is not None

# Callbacks.
results: queue.Queue = queue.Queue()
for _ in range(4):
    client.async_infer(
        MODEL,
        [tensor(x)],
        lambda result, error: results.put((result, error)),
        parameters=HOOK,
    )
for _ in range(4):
    result, error = results.get(timeout=30)
    assert error is None
    assert np.array_equal(result.as_numpy("layer1"), named.as_numpy("layer1"))
client.close()
print("ok")
