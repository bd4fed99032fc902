"""Anyone may list the configuration's models; only the owner may load and unload them."""

from __future__ import annotations

from pathlib import Path

import grpc
import numpy as np
import pytest

from authorities import ADMIN, EXTRACT, token_file
from infering import arrays, given, output
from inprocess import served
from layertap import Client
from layertap.errors import ModelNotFoundError
from layertap.inference import grpc_service_pb2 as pb
from stubs import inference_stub
from versioned import ITEM, save, write_config

Code = grpc.StatusCode


def index(stub, *, ready: bool = False) -> dict[str, tuple[str, str]]:
    reply = stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=ready))
    return {model.name: (model.state, model.reason) for model in reply.models}


def load(name: str, **fields: object) -> pb.RepositoryModelLoadRequest:
    return pb.RepositoryModelLoadRequest(model_name=name, **fields)


def unload(name: str, **fields: object) -> pb.RepositoryModelUnloadRequest:
    return pb.RepositoryModelUnloadRequest(model_name=name, **fields)


def refusal(call, request, **options: object) -> tuple[Code, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=60, **options)
    return caught.value.code(), caught.value.details()


def infer(stub) -> np.ndarray:
    x = np.ones((1, *ITEM), np.float32)
    request = pb.ModelInferRequest(
        model_name="net",
        inputs=[given("input", "FP32", x.shape)],
        outputs=[output("first")],
        raw_input_contents=[x.tobytes()],
    )
    return arrays(stub.ModelInfer(request, timeout=60))["first"]


def test_the_index_tells_states(stub) -> None:
    """It lists models that serve and one that is expected, in order; or only those that serve."""
    told = index(stub)
    assert told["residual"] == ("READY", "")
    assert told["coming"] == ("LOADING", "it is being loaded")
    assert "coming" not in index(stub, ready=True)
    assert list(told)[-1] == "coming"
    request = pb.RepositoryIndexRequest(repository_name="other")
    assert refusal(stub.RepositoryIndex, request)[0] == Code.INVALID_ARGUMENT


def test_without_rights_nothing_is_loaded(stub) -> None:
    """A server without --admin refuses before it checks the name."""
    for call, request in (
        (stub.RepositoryModelLoad, load("residual")),
        (stub.RepositoryModelUnload, unload("residual")),
    ):
        assert refusal(call, request)[0] == Code.PERMISSION_DENIED
    assert index(stub)["residual"] == ("READY", "")


def test_an_owner_unloads_and_loads(tmp_path: Path) -> None:
    """A model can be unloaded, and loaded again as configured then; unknown models are refused."""
    file = tmp_path / "layertap.toml"
    save(tmp_path / "net.pt", 1)
    write_config(file, "net:first")
    with (
        served("--config", str(file), "--admin") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = inference_stub(channel)
        before = infer(stub)
        stub.RepositoryModelUnload(unload("net"), timeout=60)
        assert index(stub) == {"net": ("UNAVAILABLE", "it was unloaded")}
        assert not stub.ServerReady(pb.ServerReadyRequest()).ready
        with pytest.raises(grpc.RpcError) as caught:
            infer(stub)
        assert caught.value.code() == Code.UNAVAILABLE
        assert refusal(stub.RepositoryModelUnload, unload("net"))[0] == Code.NOT_FOUND
        save(tmp_path / "net.pt", 2)
        stub.RepositoryModelLoad(load("net"), timeout=60)
        assert index(stub) == {"net": ("READY", "")}
        assert stub.ServerReady(pb.ServerReadyRequest()).ready
        assert not np.array_equal(infer(stub), before)
        code, text = refusal(stub.RepositoryModelLoad, load("other"))
        assert (code, "'other', which the configuration does not name" in text) == (
            Code.NOT_FOUND,
            True,
        )
        given_ = {"config": pb.ModelRepositoryParameter(string_param="{}")}
        code, text = refusal(stub.RepositoryModelLoad, load("net", parameters=given_))
        assert (code, "got config, expected none" in text) == (Code.INVALID_ARGUMENT, True)
        (tmp_path / "net.pt").write_bytes(b"no model")
        code, text = refusal(stub.RepositoryModelLoad, load("net"))
        assert (code, "failed to load 'net'" in text) == (Code.FAILED_PRECONDITION, True)
        assert index(stub) == {"net": ("READY", "")}


def test_an_unloaded_model_goes_with_the_configuration(tmp_path: Path) -> None:
    """An unloaded model that is no longer configured is forgotten at the next reload."""
    file = tmp_path / "layertap.toml"
    for name in ("net", "more"):
        save(tmp_path / f"{name}.pt", 1)
    write_config(file, "net", "more")
    with (
        served("--config", str(file), "--admin") as server,
        grpc.insecure_channel(server.address) as channel,
        Client(server.address) as client,
    ):
        stub = inference_stub(channel)
        stub.RepositoryModelUnload(unload("more"), timeout=60)
        assert index(stub)["more"] == ("UNAVAILABLE", "it was unloaded")
        write_config(file, "net")
        client.reload()
        assert index(stub) == {"net": ("READY", "")}
        with pytest.raises(ModelNotFoundError):
            client.describe_model("more")


def test_loading_takes_an_admin_token(tmp_path: Path) -> None:
    """If there are tokens, a token that may only extract is refused, as by AdminService."""
    file = tmp_path / "layertap.toml"
    save(tmp_path / "net.pt", 1)
    write_config(file, "net:first")
    options = (
        *("--extract-tokens-file", str(token_file(tmp_path / "e", EXTRACT))),
        *("--admin-tokens-file", str(token_file(tmp_path / "a", ADMIN))),
    )
    with (
        served("--config", str(file), "--admin", *options) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = inference_stub(channel)
        extract, admin = (
            {"metadata": (("authorization", f"Bearer {token}"),)} for token in (EXTRACT, ADMIN)
        )
        call = stub.RepositoryModelUnload
        assert refusal(call, unload("net"))[0] == Code.UNAUTHENTICATED
        assert refusal(call, unload("net"), **extract)[0] == Code.PERMISSION_DENIED
        call(unload("net"), timeout=60, **admin)
        stub.RepositoryModelLoad(load("net"), timeout=60, **admin)
