"""System shared memory for inputs and outputs, used as in NVIDIA's own example."""

from __future__ import annotations

import os

import numpy as np
import tritonclient.grpc as triton
import tritonclient.utils.shared_memory as shm

from common import ADDRESS, HOOK, MODEL, batch, refused, tensor

client = triton.InferenceServerClient(ADDRESS)
client.unregister_system_shared_memory()
client.unregister_cuda_shared_memory()
assert not client.get_cuda_shared_memory_status().regions
x = batch()
expected = client.infer(MODEL, [tensor(x)], parameters=HOOK)
sizes = {name: expected.as_numpy(name).nbytes for name in ("layer1", "before")}
key = f"/test-{os.getpid()}"
given = shm.create_shared_memory_region("given", f"{key}-in", x.nbytes)
taken = shm.create_shared_memory_region("taken", f"{key}-out", sum(sizes.values()))
try:
    shm.set_shared_memory_region(given, [x])
    client.register_system_shared_memory("given", f"{key}-in", x.nbytes)
    client.register_system_shared_memory("taken", f"{key}-out", sum(sizes.values()))
    assert set(client.get_system_shared_memory_status().regions) == {"given", "taken"}
    refused(
        lambda: client.register_system_shared_memory("given", f"{key}-in", x.nbytes),
        "registered already",
    )
    source = triton.InferInput("input", list(x.shape), "FP32")
    source.set_shared_memory("given", x.nbytes)
    layer1, before = (triton.InferRequestedOutput(name) for name in sizes)
    layer1.set_shared_memory("taken", sizes["layer1"])
    before.set_shared_memory("taken", sizes["before"], offset=sizes["layer1"])
    result = client.infer(MODEL, [source], outputs=[layer1, before], parameters=HOOK)
    offset = 0
    for name, size in sizes.items():
        out = result.get_output(name)
        values = shm.get_contents_as_numpy(taken, np.float32, list(out.shape), offset=offset)
        assert np.array_equal(values, expected.as_numpy(name)), name
        assert out.parameters["shared_memory_byte_size"].int64_param == size
        offset += size
    assert list(result.get_response().raw_output_contents) == [b"", b""]
    layer1.set_shared_memory("taken", sizes["layer1"], offset=10**6)
    refused(
        lambda: client.infer(MODEL, [source], outputs=[layer1]),
        "Invalid offset for shared memory region",
    )
    client.unregister_system_shared_memory("given")
    refused(lambda: client.infer(MODEL, [source]), "Unable to find shared memory region")
    client.unregister_system_shared_memory()
    assert not client.get_system_shared_memory_status().regions
finally:
    shm.destroy_shared_memory_region(given)
    shm.destroy_shared_memory_region(taken)
    client.close()
print("ok")
