"""A client made only from the published .proto files gets the same arrays."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from kept import kept
from layertap import Client
from layertap.engine import Engine
from layertap.models import ModelSpec
from serving import running_server
from tinynets import ITEM

ROOT = Path(__file__).parents[2]

STOCK = """
import json, sys
import grpc, numpy as np
from layertap.v1 import catalogue_pb2, feature_service_pb2, feature_service_pb2_grpc, tensor_pb2

address, given, taken = sys.argv[1:]
x = np.load(given)
channel = grpc.insecure_channel(address)
stub = feature_service_pb2_grpc.FeatureServiceStub(channel)
reply = stub.Extract(feature_service_pb2.ExtractRequest(
    model="residual",
    inputs=[tensor_pb2.Tensor(
        dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=x.shape, data=x.tobytes())],
    layers=[
        feature_service_pb2.LayerSelection(layer="bn1"),
        feature_service_pb2.LayerSelection(layer="layer1", alias="deep"),
        feature_service_pb2.LayerSelection(
            layer="avgpool", capture=catalogue_pb2.CAPTURE_INPUT),
    ],
))
np.savez(taken, **{
    t.name: np.frombuffer(t.data, "<f4").reshape(t.shape) for t in reply.tensors})
asked = (
    feature_service_pb2.ExtractStreamRequest(
        id=number, model=model, layers=[feature_service_pb2.LayerSelection(layer="layer1")],
        extractor=reply.extractor,
        inputs=[tensor_pb2.Tensor(
            dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=x.shape, data=x.tobytes())])
    for number, model in enumerate(["residual"] * 5 + ["nobody"])
)
streamed = {item.id: item for item in stub.ExtractStream(asked)}
described = stub.DescribeModel(feature_service_pb2.DescribeModelRequest(model="residual"))
print(json.dumps({
    "file": feature_service_pb2.__file__,
    "ours": [name for name in sys.modules if name.startswith("layertap.") and ".v1" not in name],
    "extractor": catalogue_pb2.Extractor.Name(reply.extractor),
    "total": reply.timings.total_ns,
    "models": [m.name for m in stub.ListModels(feature_service_pb2.ListModelsRequest()).models],
    "layers": len(described.layers),
    "streamed": sorted(streamed),
    "same": [streamed[n].tensors[0].data == reply.tensors[1].data for n in range(5)],
    "failed": [streamed[5].error.code, streamed[5].error.kind],
}))
"""


def test_stock_stubs_get_the_same_arrays(tmp_path: Path) -> None:
    """Stubs that grpc_tools generates, in a process without layertap, read every reply."""
    protos = sorted((ROOT / "proto").glob("layertap/v1/*.proto"))
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}"),
            *(f"--python_out={tmp_path}", f"--grpc_python_out={tmp_path}", *map(str, protos)),
        ],
        check=True,
    )
    # The installed package has the same name: these make the stubs a package that comes first.
    (tmp_path / "layertap" / "__init__.py").touch()
    (tmp_path / "layertap" / "v1" / "__init__.py").touch()
    x = np.random.default_rng(2).random((3, *ITEM), dtype=np.float32)
    np.save(tmp_path / "given.npy", x)
    (tmp_path / "stock.py").write_text(STOCK)
    engine = Engine(plan_cache=kept())
    try:
        engine.load(ModelSpec("tinynets:residual", item_shape=ITEM))
        with running_server(engine) as address, Client(address) as client:
            ours = client.extract(
                "residual", x, ["bn1", "layer1=deep", "avgpool:input"], extractor="hook"
            )
            output = subprocess.run(
                [sys.executable, "stock.py", address, "given.npy", "taken.npz"],
                check=True, capture_output=True, cwd=tmp_path, text=True, timeout=60,
            ).stdout  # fmt: skip
    finally:
        engine.close()
    said = json.loads(output)
    assert Path(said["file"]).is_relative_to(tmp_path)
    assert said["ours"] == []
    assert said["extractor"] == "EXTRACTOR_HOOK"
    assert said["total"] > 0
    assert said["models"] == ["residual"]
    assert said["layers"] > 20
    assert said["streamed"] == [0, 1, 2, 3, 4, 5]
    assert said["same"] == [True] * 5
    assert said["failed"] == [5, "ModelNotFoundError"]
    with np.load(tmp_path / "taken.npz") as taken:
        assert sorted(taken) == sorted(ours)
        for name, value in ours.items():
            assert np.array_equal(taken[name], value)
