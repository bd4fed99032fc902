"""One version of a model makes an answer, even if it is replaced in the meantime."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import grpc
import numpy as np

from infering import arrays, output, raw_request
from kept import kept
from layertap import LayerSelection
from layertap.engine import Engine
from layertap.inference import grpc_service_pb2 as pb
from layertap.models import ModelSpec
from serving import running_server
from versioned import HOLDS, ITEM, save_weights


class Slowly(list[LayerSelection]):
    """Declared layers that block their reader, as a scheduler may stop a thread anywhere."""

    def __init__(self, layers: list[LayerSelection]) -> None:
        super().__init__(layers)
        self.reached, self.go_on = threading.Event(), threading.Event()

    def __iter__(self) -> Iterator[LayerSelection]:
        self.reached.set()
        assert self.go_on.wait(60)
        return super().__iter__()


def spec(folder: Path, version: int) -> ModelSpec:
    file = folder / f"{version}.pth"
    save_weights(file, version)
    return ModelSpec("versioned:build", "net", str(file), item_shape=ITEM)


def test_an_alias_and_its_values_are_of_one_version(tmp_path: Path) -> None:
    """A reload gives an alias another layer while a request is being read: it is the old one's.

    Not the old version's layer as the new version computes it.
    """
    engine = Engine(threads=1, plan_cache=kept())
    old = engine.load(spec(tmp_path, 1), [LayerSelection("first", alias="feature")])
    old.declared = slowly = Slowly(old.declared)
    request = raw_request(
        np.ones((1, *ITEM), np.float32), output("feature"), model_name="net", parameters={}
    )
    with (
        closing(engine),
        running_server(engine) as address,
        grpc.insecure_channel(address) as channel,
        ThreadPoolExecutor(1) as pool,
    ):
        infer = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelInferResponse.FromString,
        )
        answer = pool.submit(infer, request)
        assert slowly.reached.wait(60)
        engine.replace(spec(tmp_path, 2), [LayerSelection("second", alias="feature")])
        assert (arrays(infer(request))["feature"] == 2 * HOLDS["second"]).all()
        slowly.go_on.set()
        assert (arrays(answer.result(60))["feature"] == HOLDS["first"]).all()
