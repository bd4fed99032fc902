"""The command line teaches, refuses and starts fast."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from layertap.app.config import ModelSection
from layertap.cli.main import main
from layertap.cli.options import DEVICES, IMAGE_FLAGS
from layertap.engine import DEVICE_PATTERN
from layertap.models import ImageSettings
from processes import layertap


@pytest.fixture
def run():
    """Run a verb in this process."""
    return lambda *args: CliRunner().invoke(main, args)


def test_version(run) -> None:
    """``--version`` prints the installed version."""
    assert importlib.metadata.version("layertap") in run("--version").output


@pytest.mark.parametrize("verb", ["serve", "layers", "extract", "health"])
def test_help_teaches(run, verb: str) -> None:
    """Each verb's help has examples that begin with the command, and describes every option."""
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
            "--exif-orientation: the server chose",
        ),
        (["layers"], "MODEL"),
        (["layers", "a", "--server", "b:1", "--weights", "random"], "--weights: the server chose"),
        (["extract", "a", "b.jpg", "-l", "c"], "--output"),
        (["extract", "a", "b.jpg", "-o", "c.npz"], "--layer"),
        (["extract", "a", "b", "-l", "c", "-o", "d", "--dtype", "int8"], "float16"),
    ],
)
def test_wrong_usage_is_code_2(run, args: list[str], message: str) -> None:
    """A wrong command line is code 2 with what was expected, before anything is loaded."""
    result = run(*args)
    assert result.exit_code == 2
    assert message in result.output


def test_server_that_is_not_there_is_code_1(run, tmp_path: Path) -> None:
    """A failure is code 1 and one message."""
    result = run("layers", "a", "--server", "127.0.0.1:1")
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize("verb", ["layers", "serve"])
def test_config_errors_have_no_traceback(run, tmp_path: Path, verb: str) -> None:
    """What layertap refuses on purpose is told without a traceback."""
    wrong = {"layers": ["a b"], "serve": ["--config", str(tmp_path / "gone.toml")]}
    result = run(verb, *wrong[verb])
    assert result.exit_code == 1
    assert "Error: " in result.output


def test_help_and_remote_verbs_import_no_torch(tmp_path: Path) -> None:
    """Help, and the verbs that ask a server, start without torch."""
    image = tmp_path / "a.jpg"
    image.write_bytes(b"")
    code = """if True:
        import sys
        from click.testing import CliRunner
        from layertap.cli.main import main
        assert CliRunner().invoke(main, ["--help"]).exit_code == 0
        for args in (
            ["layers", "a", "--server", "127.0.0.1:1"],
            ["extract", "a", sys.argv[1], "-l", "b", "-o", "c", "--server", "127.0.0.1:1"],
        ):
            result = CliRunner().invoke(main, args)
            assert result.exit_code == 1 and "Error: " in result.output, result.output
        sys.exit("torch" in sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-c", code, str(image)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_runs_as_a_module() -> None:
    """``python -m layertap`` is the command too."""
    assert layertap("--help").stdout.startswith("Usage: layertap [OPTIONS] COMMAND")


def test_the_options_of_models_are_the_configurations() -> None:
    """Devices and image settings have one meaning on the command line and in layertap.toml."""
    assert DEVICES.pattern == DEVICE_PATTERN
    assert set(IMAGE_FLAGS) <= set(ModelSection.__struct_fields__)
    everything = ImageSettings(
        mean=(),
        std=(),
        resize=(),
        crop=(),
        interpolation="bilinear",
        color="rgb",
        exif_orientation=True,
    )
    assert set(everything.given) == set(IMAGE_FLAGS)
