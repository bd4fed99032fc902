"""The synchronous client's stream: replies in order, failures in between."""

from __future__ import annotations

import queue

import numpy as np
import tritonclient.grpc as triton

from common import ADDRESS, HOOK, MODEL, batch, tensor

results: queue.Queue = queue.Queue()
with triton.InferenceServerClient(ADDRESS) as client:
    expected = [
        client.infer(MODEL, [tensor(batch(seed=seed))], parameters=HOOK).as_numpy("layer1")
        for seed in range(20)
    ]
    client.start_stream(lambda result, error: results.put((result, error)))
    for seed in range(20):
        client.async_stream_infer(
            "nope" if seed == 7 else MODEL,
            [tensor(batch(seed=seed))],
            request_id=str(seed),
            parameters=HOOK,
            enable_empty_final_response=True,
        )
    for seed in range(20):
        result, error = results.get(timeout=60)
        if seed == 7:
            assert "Request for unknown model" in str(error)
            continue
        assert error is None, error
        response = result.get_response()
        assert response.id == str(seed)
        assert response.parameters["triton_final_response"].bool_param
        assert np.array_equal(result.as_numpy("layer1"), expected[seed])
    client.stop_stream()
print("ok")
