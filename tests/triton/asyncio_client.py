"""The asyncio client: unary calls together, and a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import tritonclient.grpc.aio as triton

from common import ADDRESS, HOOK, MODEL, batch, tensor


async def main() -> None:
    """Send many requests at once, then over a stream."""
    async with triton.InferenceServerClient(ADDRESS) as client:
        assert await client.is_server_ready()
        given = [batch(seed=seed) for seed in range(8)]
        answers = await asyncio.gather(
            *(client.infer(MODEL, [tensor(x)], parameters=HOOK) for x in given)
        )
        values = [answer.as_numpy("layer1") for answer in answers]
        assert not np.array_equal(values[0], values[1])

        async def requests() -> AsyncIterator[dict[str, object]]:
            for number, x in enumerate(given):
                name = "nope" if number == 3 else MODEL
                yield {
                    "model_name": name,
                    "inputs": [tensor(x)],
                    "request_id": str(number),
                    "parameters": HOOK,
                }

        got = [pair async for pair in client.stream_infer(requests())]
        assert len(got) == len(given)
        for number, (result, error) in enumerate(got):
            if number == 3:
                assert "Request for unknown model" in str(error)
            else:
                assert error is None
                assert result.get_response().id == str(number)
                assert np.array_equal(result.as_numpy("layer1"), values[number])


asyncio.run(main())
print("ok")
