"""Callers that mix plain, gradient and intervention requests each get the answers of their own.

``LAYERTAP_MIXED_REQUESTS`` is the number of requests: a few hundred here, 5,000 with
``LAYERTAP_MIXED_REQUESTS=5000 pytest --timeout 900 tests/services/test_mixed_requests.py``.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import gradnets
from kept import kept
from layertap import Client
from layertap.engine import Engine
from layertap.models import ModelSpec
from serving import running_server

REQUESTS = int(os.environ.get("LAYERTAP_MIXED_REQUESTS", "320"))
THREADS, INPUTS, CHANNELS = 8, 5, 4
SPEC = ModelSpec("gradnets:residual", item_shape=gradnets.IMAGE, input_dtype="float64")
IMAGES = [
    torch.randn(1 + seed % 3, *gradnets.IMAGE, generator=torch.Generator().manual_seed(seed))
    .double()
    .mul(seed + 1)
    for seed in range(INPUTS)
]

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Question:
    """A request of one kind, about one input, with a channel or class of its own.

    Attributes:
        kind: What is asked for: see ``ASKED``.
        image: The number of the input.
        index: The channel that is set to zero, or the class whose gradient is taken.
    """

    kind: str
    image: int
    index: int


def plain(client: Client, question: Question, extractor: str) -> Arrays:
    return dict(
        client.extract("residual", IMAGES[question.image], ["conv2", "fc"], extractor=extractor)
    )


def gradient(client: Client, question: Question) -> Arrays:
    layers = ["conv2:gradient", "inputs.x:gradient", "fc"]
    aim = f"fc[{question.index}]"
    found = client.extract("residual", IMAGES[question.image], layers, objective=aim)
    return {layer: found[layer] for layer in layers}


def intervention(client: Client, question: Question) -> Arrays:
    change = f"conv2:channel={question.index}:zero"
    found = client.extract(
        "residual", IMAGES[question.image], ["conv2", "fc"], interventions=change
    )
    return {layer: found[layer] for layer in ("conv2", "fc")}


ASKED: dict[str, Callable[[Client, Question], Arrays]] = {
    "plain": lambda client, question: plain(client, question, "hook"),
    "auto": lambda client, question: plain(client, question, "auto"),
    "gradient": gradient,
    "intervention": intervention,
}


# Tests run in inference mode, in which nothing has a gradient.
@torch.inference_mode(False)
def truth(question: Question) -> Arrays:
    """Return the answer by plain PyTorch, on a fresh module without in-place operations."""
    module = gradnets.residual().eval().requires_grad_()
    module.relu.inplace = False
    x = IMAGES[question.image].clone().requires_grad_()
    kept: dict[str, torch.Tensor] = {}

    def keep(_module: torch.nn.Module, _args: object, output: torch.Tensor) -> torch.Tensor:
        if question.kind == "intervention":
            output = output.clone()
            output[:, question.index] = 0
        kept["conv2"] = output
        return output

    module.get_submodule("conv2").register_forward_hook(keep)
    module.get_submodule("fc").register_forward_hook(lambda *args: kept.update(fc=args[-1]))
    module(x)
    if question.kind == "gradient":
        aim, wanted = kept["fc"].sum(0)[question.index], (kept["conv2"], x)
        of_layer, of_input = torch.autograd.grad(aim, wanted)
        kept = {"conv2:gradient": of_layer, "inputs.x:gradient": of_input, "fc": kept["fc"]}
    return {name: value.detach().numpy() for name, value in kept.items()}


def fault(question: Question, found: Arrays, expected: Arrays) -> str:
    """Return how an answer differs from the truth; empty if it doesn't.

    Plain answers of HOOK must be the same bits. The others add in another order.
    """
    for name, value in expected.items():
        if found[name].shape != value.shape:
            return f"{question}: {name} has shape {found[name].shape}, not {value.shape}"
        if question.kind == "plain":
            if not np.array_equal(found[name], value):
                return f"{question}: {name} has other bits"
        elif not np.allclose(found[name], value, rtol=1e-9, atol=1e-9 * np.abs(value).max()):
            return f"{question}: {name} differs by {np.abs(found[name] - value).max()}"
    return ""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server in throughput mode."""
    engine = Engine(threads=1, instances=2, plan_cache=kept())
    engine.load(SPEC)
    with running_server(engine) as address:
        yield address
    engine.close()


def test_mixed_callers_get_their_own_answers(address: str) -> None:
    """Eight threads mix all kinds of requests over one model; no answer is wrong or another's."""
    questions = [
        Question(kind, image, index)
        for kind in ASKED
        for image in range(INPUTS)
        for index in range(CHANNELS)
    ]
    truths = {question: truth(question) for question in questions}

    def ask(seed: int) -> tuple[Counter[str], list[str]]:
        choose, asked, faults = random.Random(seed), Counter[str](), list[str]()
        with Client(address, timeout=120) as client:
            for _ in range(REQUESTS // THREADS):
                question = choose.choice(questions)
                asked[question.kind] += 1
                found = ASKED[question.kind](client, question)
                faults += filter(None, [fault(question, found, truths[question])])
        return asked, faults

    with ThreadPoolExecutor(THREADS) as threads:
        outcomes = list(threads.map(ask, range(THREADS)))
    assert [fault for _, faults in outcomes for fault in faults] == []
    assert set(sum((asked for asked, _ in outcomes), Counter[str]())) == set(ASKED)


@pytest.mark.parametrize("kind", ASKED)
def test_a_wrong_answer_would_be_noticed(address: str, kind: str) -> None:
    """The answer to a question about another input, channel or class is not the right one."""
    right = Question(kind, 2, 1)
    others = [Question(kind, 0, 1), Question(kind, 1, 1), Question(kind, 3, 1)]
    if kind in ("gradient", "intervention"):
        others.append(Question(kind, 2, 2))
    with Client(address) as client:
        assert fault(right, ASKED[kind](client, right), truth(right)) == ""
        for other in others:
            assert fault(right, ASKED[kind](client, other), truth(right))
