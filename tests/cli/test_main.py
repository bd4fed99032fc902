"""The command line has helpful messages and starts fast."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from layertap.cli.main import main
from layertap.settings import ServedModel, ServerOptions, definitions
from processes import layertap


@pytest.fixture
def run():
    """Run a command in this process."""
    return lambda *args: CliRunner().invoke(main, args)


def test_version(run) -> None:
    """``--version`` prints the installed version."""
    assert importlib.metadata.version("layertap") in run("--version").output


@pytest.mark.parametrize("verb", ["serve", "layers", "extract", "health"])
def test_help_teaches(run, verb: str) -> None:
    """Each command's help has examples that begin with the command, and describes every option."""
    result = run(verb, "--help")
    assert result.exit_code == 0
    assert "Examples:\n" in result.output
    assert f"    layertap {verb} " in result.output
    options = [p for p in main.commands[verb].params if isinstance(p, click.Option)]
    assert [option.name for option in options if not option.help] == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["serve"], "nothing to serve"),
        (["serve", "a", "--port", "70000"], "70000"),
        (["serve", "a", "--keep-memory-mib", "0"], "keep-memory-mib"),
        (["serve", "a", "--item-shape", "3,x"], "expected positive sizes"),
        (["serve", "a", "--device", "gpu"], "got 'gpu', expected auto, cpu, cuda or cuda:1"),
        (["serve", "a", "--image-mean", "0.5,x"], "expected numbers such as 0.485,0.456,0.406, or"),
        (["serve", "a", "--image-crop", "0"], "expected positive sizes"),
        (["layers", "a", "--image-color", "bgr"], "gray"),
        (
            ["extract", "a", "b", "-l", "c", "-o", "d", "--server", "e:1", "--no-exif-orientation"],
            "--exif-orientation: not together",
        ),
        (["layers"], "MODEL"),
        (["layers", "a", "--server", "b:1", "--weights", "random"], "--weights: not together"),
        (["extract", "a", "b.jpg", "-l", "c"], "--output"),
        (["extract", "a", "b.jpg", "-o", "c.npz"], "--layer"),
        (["extract", "a", "b", "-l", "c", "-o", "d", "--dtype", "int8"], "float16"),
    ],
)
def test_wrong_usage_is_code_2(run, args: list[str], message: str) -> None:
    """A wrong command line gives code 2 and says what was expected, before anything is loaded."""
    result = run(*args)
    assert result.exit_code == 2
    assert message in result.output


def test_server_that_is_not_there_is_code_1(run, tmp_path: Path) -> None:
    """A failure gives code 1 and one message."""
    result = run("layers", "a", "--server", "127.0.0.1:1")
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize("verb", ["layers", "serve"])
def test_config_errors_have_no_traceback(run, tmp_path: Path, verb: str) -> None:
    """Errors that layertap raises on purpose are shown without a traceback."""
    wrong = {"layers": ["a b"], "serve": ["--config", str(tmp_path / "gone.toml")]}
    result = run(verb, *wrong[verb])
    assert result.exit_code == 1
    assert "Error: " in result.output


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["--help"], 0, "Usage: "),
        (["serve", "--help"], 0, "--port"),
        (["layers", "--help"], 0, "--server"),
        (["serve", "a", "--port", "x"], 2, "got 'x', expected a port"),
        (["layers", "a", "--server", "127.0.0.1:1"], 1, "Error: "),
        (["extract", "a", "a.jpg", "-l", "b", "-o", "c", "--server", "127.0.0.1:1"], 1, "Error: "),
        (["serve", "--config", "typo.toml"], 1, "line 2: server.prot: unknown key"),
        (["serve", "--config", "typo.toml", "--log-format", "json"], 1, "server.prot: unknown"),
        (["serve", "a", "--tls-cert", "gone", "--tls-key", "gone"], 1, "tls_cert: gone: No such"),
        (["serve", "a", "--client-shm-uids", "1"], 1, "has no effect without allow_client_shm"),
        (["serve", "a", "a=b"], 1, "two models are called 'a'"),
        (["serve", "a", "--layers", "b:up"], 1, "layer: got 'b:up'"),
    ],
)
def test_help_remote_verbs_and_mistakes_import_no_torch(
    tmp_path: Path, args: list[str], code: int, text: str
) -> None:
    """Help, commands that call a server, and usage errors don't import torch."""
    (tmp_path / "a.jpg").write_bytes(b"")
    (tmp_path / "typo.toml").write_text("[server]\nprot = 1\n")
    program = """if True:
        import sys
        from layertap.cli.main import main
        try:
            main(sys.argv[1:])
        finally:
            assert "torch" not in sys.modules, "torch was imported"
    """
    done = subprocess.run(
        [sys.executable, "-c", program, *args],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == code, done.stderr
    assert text in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_runs_as_a_module() -> None:
    """``python -m layertap`` is the same command."""
    assert layertap("--help").stdout.startswith("Usage: layertap [OPTIONS] COMMAND")


def test_every_flag_is_a_setting_with_the_same_words() -> None:
    """`layertap serve` has a flag for each setting that declares one, with its key and its help."""
    options = {p.name: p for p in main.commands["serve"].params if isinstance(p, click.Option)}
    declared = [each for owner in (ServedModel, ServerOptions) for each in definitions(owner)]
    flags = {each.key: each for each in declared if each.flag}
    assert set(options) - {"config_file"} == set(flags)
    for key, setting in flags.items():
        assert setting.flag in options[key].opts
        assert (options[key].help or "").startswith(setting.setting.help)
