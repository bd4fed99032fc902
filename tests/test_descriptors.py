"""Our generated messages coexist with other packages' messages of the same names."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from google.protobuf.descriptor import Descriptor, FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2 as stock_health
from grpc_reflection.v1alpha import reflection_pb2 as stock_reflection

from layertap import Client
from layertap.descriptors import POOL
from layertap.grpc_health import health_pb2
from layertap.grpc_reflection import reflection_pb2, reflection_v1alpha_pb2
from processes import ENVIRONMENT, Serving
from tinynets import ITEM

ROOT = Path(__file__).resolve().parent.parent
TRITON = ROOT / ".venv-triton" / "bin" / "python"
OURS = "from layertap.inference import grpc_service_pb2"
THEIRS = "import tritonclient.grpc"

FACTORY = """
import sys
sys.path.append({path!r})
import tritonclient.grpc
import tinynets

def build():
    return tinynets.residual()
"""


def shape(file: FileDescriptor) -> FileDescriptorProto:
    """Return what a file declares, apart from its name, package and options."""
    proto = FileDescriptorProto()
    file.CopyToProto(proto)
    text = proto.SerializeToString()
    assert FileDescriptorProto.FromString(text) == proto
    for field in ("name", "package", "options"):
        proto.ClearField(field)
    for message in proto.message_type:
        for each in message.field:
            each.type_name = each.type_name.rpartition(".")[2]
            each.ClearField("json_name")
        for enum in message.enum_type:
            enum.ClearField("options")
    for service in proto.service:
        for method in service.method:
            method.ClearField("options")
            method.input_type = method.input_type.rpartition(".")[2]
            method.output_type = method.output_type.rpartition(".")[2]
    return proto


def triton_packages() -> str:
    """Return the folder of tritonclient, which is in its own environment."""
    if not TRITON.exists():
        pytest.skip("no .venv-triton: make setup")
    command = [TRITON, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_health_is_grpcs_own_protocol() -> None:
    """Messages, numbers and methods are those of the package that gRPC publishes.

    Except for List, which would tell the models' names to callers without a token.
    """
    stock = shape(stock_health.DESCRIPTOR)
    for part in (stock.message_type, stock.service[0].method):
        for each in [each for each in part if "List" in each.name]:
            part.remove(each)
    assert shape(health_pb2.DESCRIPTOR) == stock
    assert health_pb2.DESCRIPTOR.package == stock_health.DESCRIPTOR.package


@pytest.mark.parametrize("ours", [reflection_pb2, reflection_v1alpha_pb2])
def test_reflection_is_grpcs_own_protocol(ours) -> None:
    """Both names of reflection have the messages that gRPC publishes."""
    assert shape(ours.DESCRIPTOR) == shape(stock_reflection.DESCRIPTOR)
    package = ours.DESCRIPTOR.package
    assert package in ("grpc.reflection.v1", stock_reflection.DESCRIPTOR.package)


def test_our_messages_are_in_a_pool_of_our_own() -> None:
    """They are not in the process's default pool."""
    assert health_pb2.DESCRIPTOR.pool is POOL
    assert stock_health.DESCRIPTOR.pool is not POOL


@pytest.mark.parametrize(("first", "second"), [(OURS, THEIRS), (THEIRS, OURS)])
def test_tritonclient_in_our_process(first: str, second: str) -> None:
    """Both declare the Open Inference Protocol, and a process may import both in any order."""
    code = f"import sys; sys.path.append({triton_packages()!r}); {first}; {second}; print('ok')"
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.stdout == "ok\n", done.stderr


@pytest.mark.long
def test_a_factory_that_imports_tritonclient(tmp_path: Path) -> None:
    """A model whose code imports NVIDIA's client is served like any other."""
    (tmp_path / "tritonnet.py").write_text(FACTORY.format(path=triton_packages()))
    server = Serving(
        ["net=tritonnet:build", "--item-shape", "3,32,32", "--port", "0", "--metrics-port", "-1"],
        cwd=tmp_path,
    )
    try:
        with Client(server.address) as client:
            x = np.zeros((1, *ITEM), np.float32)
            assert client.extract("net", x, "layer1")["layer1"].shape[0] == 1
    finally:
        server.close()


def test_the_client_runs_beside_tritonclient(tmp_path: Path) -> None:
    """With tritonclient and its older protobuf installed, our client can be imported too."""
    triton_packages()
    info = tmp_path / "layertap-0.dist-info"
    info.mkdir()
    version = importlib.metadata.version("layertap")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: layertap\nVersion: {version}\n")
    code = (
        f"{THEIRS}; from layertap import Client; import google.protobuf as p; print(p.__version__)"
    )
    done = subprocess.run(
        [TRITON, "-c", code],
        env={**ENVIRONMENT, "PYTHONPATH": f"{ROOT / 'server'}:{tmp_path}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("6."), done.stderr


@pytest.mark.parametrize(
    "file", ["admin_service", "catalogue", "feature_service", "shared_memory_service", "tensor"]
)
def test_the_contract_has_no_two_members_of_one_name_in_other_languages(file: str) -> None:
    """C++ has ``index_size()`` for a repeated ``index``, so no field may be called that too."""
    described = importlib.import_module(f"layertap.v1.{file}_pb2").DESCRIPTOR

    def check(message: Descriptor) -> None:
        fields = message.fields_by_name
        for name in fields:
            for beginning in ("has_", "clear_", "set_", "add_", "mutable_", "release_"):
                assert f"{beginning}{name}" not in fields, f"{message.full_name}.{name}"
            assert f"{name}_size" not in fields, f"{message.full_name}.{name}"
        for nested in message.nested_types:
            check(nested)

    for message in described.message_types_by_name.values():
        check(message)
