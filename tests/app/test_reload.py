"""A server applies new files and configurations without failing a request."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from authorities import ADMIN, EXTRACT, UNKNOWN, token_file
from inprocess import served
from layertap import Client, errors
from layertap.v1 import admin_service_pb2 as admin
from processes import layertap, serving
from versioned import ITEM, Callers, save, save_weights, version_of, write_config

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
RELOADS = 4


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration with one model, ``net``, at version 1, with declared layers."""
    file = tmp_path / "layertap.toml"
    save(tmp_path / "net.pt", 1)
    write_config(file, "net:first,second,third")
    return file


def health(address: str, service: str) -> int:
    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        return health_pb2_grpc.HealthStub(channel).Check(request, timeout=30).status


def watched_health(address: str, service: str) -> Iterator[int]:
    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        for reply in health_pb2_grpc.HealthStub(channel).Watch(request, timeout=60):
            yield reply.status


def outcome(report: admin.ReloadResponse) -> list[tuple[str, str, bool]]:
    return [
        (m.name, admin.ReloadAction.Name(m.action).removeprefix("RELOAD_ACTION_"), m.serving)
        for m in report.models
    ]


@pytest.mark.parametrize(
    ("trigger", "source", "mode"),
    [
        pytest.param("signal", "script", "latency", marks=pytest.mark.long),
        pytest.param("call", "factory", "latency", marks=pytest.mark.long),
        pytest.param("signal", "factory", "throughput", marks=pytest.mark.long),
        ("call", "script", "throughput"),
    ],
)
def test_reloads_under_load_fail_no_request(
    config: Path, trigger: str, source: str, mode: str
) -> None:
    """Through reloads under four callers no request fails, and each answer is of one version."""
    file, write, extractors = config.parent / "net.pt", save, ("auto", "auto", "hook", "hook")
    if source == "factory":
        file, write = config.parent / "net.pth", save_weights
        extractors = ("auto", "torchscript", "hook", "fx")
        config.write_text(
            "[[models]]\nname = 'net'\nsource = 'versioned:build'\nweights = 'net.pth'\n"
            "item_shape = [3, 4, 4]\nlayers = ['first', 'second', 'third']",
            encoding="utf-8",
        )
        write(file, 1)
    with (
        serving("--config", str(config), "--admin", "--mode", mode) as server,
        Client(server.address) as client,
        Callers(server.address, 1, extractors) as callers,
    ):
        for version in range(2, 2 + RELOADS):
            callers.written = version
            write(file, version)
            if trigger == "signal":
                server.process.send_signal(signal.SIGHUP)
                server.line(r"^layertap: replaced net: ", version - 1)
            else:
                assert outcome(client.reload()) == [("net", "REPLACED", True)]
            callers.confirmed = version
            callers.check()
            assert version_of(client) == version
            assert health(server.address, "net") == SERVING
    assert callers.answers > RELOADS


def test_watch_takes_up_a_changed_file(config: Path) -> None:
    """With --watch a changed file is loaded automatically, even after a broken one."""
    with (
        served("--config", str(config), "--watch") as server,
        Client(server.address) as client,
    ):
        file = config.parent / "net.pt"
        file.write_bytes(b"half a file")
        server.line(
            r"error: model net: not replaced, still serving the previous version: TorchScript"
        )
        assert version_of(client) == 1
        save(file, 2)
        server.line(r"^layertap: replaced net")
        assert version_of(client) == 2
        save(config.parent / "more.pt", 3)
        write_config(config, "net", "more")
        server.line(r"^layertap: loaded more")
        assert version_of(client, "more") == 3


@pytest.mark.parametrize(
    ("models", "extra", "reason"),
    [
        (("net:frist",), "", "frist"),
        (("net:first", "gone"), "", "no such file"),
    ],
)
def test_what_cannot_be_loaded_leaves_the_version_before(
    config: Path, models: tuple[str, ...], extra: str, reason: str
) -> None:
    """A model that fails is reported with the reason, and the previous version keeps serving."""
    with (
        served("--config", str(config), "--admin") as server,
        Client(server.address) as client,
    ):
        write_config(config, *models, extra=extra)
        report = client.reload()
        failed = report.models[-1]
        assert failed.action == admin.RELOAD_ACTION_FAILED
        assert reason in failed.reason
        assert (failed.serving, version_of(client)) == (failed.name == "net", 1)
        assert health(server.address, "net") == SERVING
        assert [model.name for model in client.list_models()] == ["net"]


def test_a_wrong_configuration_changes_nothing(config: Path) -> None:
    """The call returns the error in the file, with its line, and nothing was changed."""
    with (
        served("--config", str(config), "--admin") as server,
        Client(server.address) as client,
    ):
        save(config.parent / "net.pt", 2)
        write_config(config, "net", extra="[sever]")
        with pytest.raises(errors.ConfigError, match="line 1: sever: unknown key"):
            client.reload()
        assert version_of(client) == 1
        server.hang_up()
        server.line("error: not reloaded: .* line 1: sever: unknown key")
        write_config(config, "net")
        assert outcome(client.reload()) == [("net", "REPLACED", True)]
        assert version_of(client) == 2


def test_models_come_and_go_with_the_file(config: Path) -> None:
    """New models are loaded, removed ones unloaded, and unchanged ones stay."""
    with (
        served("--config", str(config), "--admin") as server,
        Client(server.address) as client,
    ):
        save(config.parent / "more.pt", 7)
        write_config(config, "more", "net:first,second,third")
        assert outcome(client.reload()) == [("more", "LOADED", True), ("net", "UNCHANGED", True)]
        assert version_of(client, "more") == 7
        assert [model.name for model in client.list_models()] == ["more", "net"]
        watched = watched_health(server.address, "net")
        assert next(watched) == SERVING
        write_config(config, "more")
        assert outcome(client.reload()) == [("more", "UNCHANGED", True), ("net", "UNLOADED", False)]
        assert next(watched) == SERVICE_UNKNOWN
        with pytest.raises(grpc.RpcError) as unknown:
            health(server.address, "net")
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
        with pytest.raises(errors.ModelNotFoundError, match="served models: 'more'"):
            version_of(client)


def test_settings_that_wait_for_a_restart_are_told(config: Path) -> None:
    """A changed port or limit is reported as not applied; flags have priority as at the start."""
    with (
        served("--config", str(config), "--admin") as server,
        Client(server.address) as client,
    ):
        write_config(
            config,
            "net:first,second,third",
            extra="[server]\nport = 9\nthreads = 1\ngrace_seconds = 3\n[limits]\nbatch = 5\n",
        )
        report = client.reload()
        assert list(report.not_applied) == [
            "server.threads: 1, still None",
            "limits.batch: 5, still 1024",
        ]
        assert outcome(report) == [("net", "UNCHANGED", True)]
        server.line(r"note: limits.batch: 5, still 1024, until the server is restarted")


def test_a_model_that_fails_at_the_start_leaves_the_others(config: Path) -> None:
    """The others serve; it is UNAVAILABLE, without a path, and a reload tries it again."""
    write_config(config, "net", "late")
    with (
        served("--config", str(config), "--admin") as server,
        Client(server.address) as client,
    ):
        server.line("error: model late: not loaded: TorchScript file .*late.pt: no such file")
        assert version_of(client) == 1
        assert [model.name for model in client.list_models()] == ["net"]
        assert [health(server.address, name) for name in ("", "net", "late")] == [
            SERVING,
            SERVING,
            NOT_SERVING,
        ]
        with pytest.raises(errors.UnavailableError, match="'late' is not ready: it could") as told:
            version_of(client, "late")
        assert str(config.parent) not in str(told.value)
        save(config.parent / "late.pt", 4)
        assert outcome(client.reload()) == [("net", "UNCHANGED", True), ("late", "LOADED", True)]
        assert version_of(client, "late") == 4
        assert health(server.address, "late") == SERVING


@pytest.mark.parametrize("args", [("--strict",), ()])
def test_strict_and_total_failures_end_it(config: Path, args: tuple[str, ...]) -> None:
    """With --strict one failed model ends the start with code 1; without it, only if all fail."""
    write_config(config, "late", "net" if args else "later")
    common = ("--port", "0", "--metrics-port", "-1", "--plan-cache", "off")
    result = layertap("serve", "--config", str(config), *common, *args, fresh=False)
    assert result.returncode == 1
    assert "late.pt: no such file" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_verb_tells_what_was_done(config: Path) -> None:
    """``layertap reload`` prints a line for each model; its exit code is 1 if one failed."""
    with served("--config", str(config), "--admin") as server:
        server_flag = ("--server", server.address)
        save(config.parent / "net.pt", 2)
        done = layertap("reload", *server_flag)
        assert (done.returncode, done.stdout) == (0, "net: replaced\n")
        (config.parent / "net.pt").write_bytes(b"")
        failed = layertap("reload", *server_flag)
        assert failed.returncode == 1
        assert failed.stdout.startswith(
            "net: failed, still serving the previous version: TorchScript"
        )


@pytest.mark.parametrize("trigger", ["signal", "call", "watch"])
def test_every_reload_reads_tokens_again(config: Path, trigger: str) -> None:
    """A token that was removed from its file is refused after a reload of any kind."""
    tokens = token_file(config.parent / "tokens", EXTRACT, UNKNOWN)
    secrets = ("--extract-tokens-file", str(tokens))
    admin_file = token_file(config.parent / "admin", ADMIN)
    options = ("--admin", "--watch", "--admin-tokens-file", str(admin_file), *secrets)
    with served("--config", str(config), *options) as server:
        with Client(server.address, token=UNKNOWN) as leaked:
            assert leaked.list_models()
            token_file(tokens, EXTRACT)
            if trigger == "signal":
                server.hang_up()
            elif trigger == "call":
                with Client(server.address, token=ADMIN) as owner:
                    owner.reload()
            else:
                save(config.parent / "net.pt", 2)
            if trigger != "call":
                server.line("reloaded")
            with pytest.raises(errors.UnauthenticatedError):
                leaked.list_models()
        with Client(server.address, token=EXTRACT) as client:
            assert client.list_models()


def test_a_call_tells_of_secrets_that_will_not_do(config: Path) -> None:
    """The caller of a reload learns which file is wrong, and the previous tokens stay valid."""
    tokens = token_file(config.parent / "admin", ADMIN)
    with (
        served("--config", str(config), "--admin", "--admin-tokens-file", str(tokens)) as server,
        Client(server.address, token=ADMIN) as owner,
    ):
        tokens.write_text("short", encoding="utf-8")
        with pytest.raises(errors.ConfigError, match="admin_tokens_file.*16 at least"):
            owner.reload()
        token_file(tokens, ADMIN)
        assert outcome(owner.reload()) == [("net", "UNCHANGED", True)]


def test_without_admin_nobody_reloads_by_a_call(config: Path) -> None:
    """A server without --admin has no AdminService, and the command says how to enable it."""
    with served("--config", str(config)) as server:
        refused = layertap("reload", "--server", server.address)
        assert refused.returncode == 1
        assert "only if it runs with --admin" in refused.stderr


def test_a_reload_in_progress_does_not_hold_the_stop(config: Path) -> None:
    """SIGTERM ends a server with code 0 even if a model hangs while loading; calls are answered."""
    with (
        serving("--config", str(config)) as server,
        Client(server.address) as client,
    ):
        watched = watched_health(server.address, "never")
        assert next(watched) == SERVICE_UNKNOWN
        text = config.read_text("utf-8") + "[[models]]\nsource = 'slownets:never'\n"
        config.write_text(text, encoding="utf-8")
        server.process.send_signal(signal.SIGHUP)
        assert next(watched) == NOT_SERVING
        with pytest.raises(errors.UnavailableError, match="'never' is not ready: it is being load"):
            client.extract("never", np.ones((1, *ITEM), np.float32), "conv")
        assert version_of(client) == 1
        server.process.send_signal(signal.SIGTERM)
        assert server.ended() == 0
        assert server.lines[-1] == "layertap: stopped serving"
        assert not any("Traceback" in line for line in server.lines)
