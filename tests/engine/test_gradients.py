"""Requests with gradients beside others, on several threads."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

import gradnets
from asking import request_for
from kept import kept
from layertap import Extractor, Features, Objective
from layertap.engine import Call, Engine
from layertap.models import ModelSpec

IMAGES = torch.randn(6, 2, *gradnets.IMAGE, generator=torch.Generator().manual_seed(1)).double()


def ask(engine: Engine, index: int, *, gradients: bool) -> dict[str, np.ndarray]:
    """Return a reply with or without gradients."""
    layers = ["conv1:gradient", "relu_1:gradient", "fc"] if gradients else ["bn1", "relu_1", "fc"]
    request = request_for("residual", layers, IMAGES[index].numpy(), Extractor.HOOK)
    if gradients:
        object.__setattr__(request, "objective", Objective.maximum("fc"))
    extraction = engine.extract(request, Call())
    try:
        return {name: value.copy() for name, value in Features(extraction.payload).items()}
    finally:
        extraction.release()


def test_plain_and_gradient_requests_at_once() -> None:
    """With several passes at once, each reply has the bits that it has alone."""
    engine = Engine(instances=3, threads=1, plan_cache=kept())
    try:
        engine.load(
            ModelSpec("gradnets:residual", item_shape=gradnets.IMAGE, input_dtype="float64")
        )
        alone = {
            (index, gradients): ask(engine, index, gradients=gradients)
            for index in range(6)
            for gradients in (False, True)
        }
        barrier = threading.Barrier(6)

        def work(index: int) -> int:
            barrier.wait()
            wrong = 0
            for turn in range(20):
                gradients = (index + turn) % 2 == 0
                reply = ask(engine, index, gradients=gradients)
                for name, value in alone[index, gradients].items():
                    wrong += not np.array_equal(reply[name], value)
            return wrong

        with ThreadPoolExecutor(6) as threads:
            assert sum(threads.map(work, range(6))) == 0
        assert engine.pending_bytes == 0
    finally:
        engine.close()
