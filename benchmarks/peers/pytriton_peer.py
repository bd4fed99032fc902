"""NVIDIA's PyTriton (gRPC by its own client): a model for each kind, with its dynamic batching."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from peers.given import IMAGE, ITEM, TENSOR, Announce, Ask, kinds
from peers.over_http import free_port

__all__ = ["connect", "serve"]

LARGEST = 128


def serve(threads: int, announce: Announce) -> None:
    """Serve until standard input ends."""
    from pytriton.model_config import ModelConfig, Tensor
    from pytriton.triton import Triton, TritonConfig

    from peers.subject import Subject

    subject = Subject(threads)
    port = free_port()
    config = TritonConfig(
        grpc_address="127.0.0.1", grpc_port=port, http_address="127.0.0.1", http_port=free_port(),
        allow_metrics=False, log_verbose=0,
    )  # fmt: skip
    with (
        tempfile.TemporaryDirectory() as folder,
        Triton(config=config, workspace=f"{folder}/w") as triton,
    ):
        for kind in kinds():
            is_image = kind.endswith(IMAGE)
            taken = (
                Tensor(name="sent", dtype=np.bytes_, shape=(1,))
                if is_image
                else Tensor(name="sent", dtype=np.float32, shape=ITEM)
            )
            # More than one, so that photographs are decoded while a pass runs.
            instances = len(os.sched_getaffinity(0)) if is_image else 1
            triton.bind(
                model_name=kind,
                infer_func=[_model(subject, kind) for _ in range(instances)],
                inputs=[taken],
                outputs=[Tensor(name="value", dtype=np.float32, shape=(-1, -1, -1))],
                config=ModelConfig(max_batch_size=LARGEST),
            )
        triton.run()
        announce(f"127.0.0.1:{port}")
        sys.stdin.read()
    subject.close()


def _model(subject: Any, kind: str) -> Callable[..., Any]:
    from pytriton.decorators import batch

    from peers.subject import pixels

    layer, sent_kind = kind.split("-")

    def infer(sent: np.ndarray) -> dict[str, np.ndarray]:
        x = sent if sent_kind == TENSOR else pixels(sent[:, 0])
        return {"value": subject.run(layer, x)}

    return batch(infer)  # type: ignore[no-any-return,unused-ignore]


@contextmanager
def connect(address: str) -> Iterator[Ask]:
    """Yield what asks, with a client for each kind."""
    from pytriton.client import ModelClient

    with ExitStack() as closing:
        clients: dict[str, Any] = {}

        def ask(kind: str, data: bytes) -> memoryview:
            if kind not in clients:
                client = ModelClient(f"grpc://{address}", kind, inference_timeout_s=120)
                clients[kind] = closing.enter_context(client)
            if kind.endswith(TENSOR):
                x = np.frombuffer(data, np.float32).reshape(-1, *ITEM)
            else:
                x = np.array([[data]], np.bytes_)
            value: np.ndarray = clients[kind].infer_batch(x)["value"]
            return value.data.cast("B")

        yield ask
