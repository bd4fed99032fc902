"""The tool behind ``make fuzz``, tools/fuzz.py."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from corpus import FOLDER

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """Load the tool, with a test's folder for its output."""
    spec = importlib.util.spec_from_file_location("fuzz_tool", ROOT / "tools" / "fuzz.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, path in (("BUILD", ""), ("FOUND", "found"), ("DECODER", "decoder")):
        monkeypatch.setattr(module, name, tmp_path / path)
    return module


@pytest.mark.long
def test_decoder_reads_the_seeds_under_sanitizers(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without clang the decoder's fuzzer is built by gcc, says so, and passes the seeds."""
    monkeypatch.setattr(tool, "clangs", list)
    # The compiler takes three times as long with the flags that pay off in a long run.
    monkeypatch.setattr(tool, "FLAGS", [flag for flag in tool.FLAGS if flag not in {"-g", "-O2"}])
    try:
        assert "random changes" in tool.build_decoder()
    except SystemExit:
        log = (tool.BUILD / "compile.log").read_text("utf-8")
        if "asan" in log or "ubsan" in log:
            pytest.skip("this compiler has no sanitizers")
        raise
    assert "apt-get install clang" in capsys.readouterr().out
    result = subprocess.run(
        [tool.DECODER, *FOLDER.iterdir()], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def script(folder: Path, text: str) -> list[str]:
    """Return a command that behaves like a fuzzer."""
    path = folder / "fuzzer.sh"
    path.write_text(text, encoding="utf-8")
    return ["sh", str(path)]


def test_figures_of_a_clean_run_are_told(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Inputs, edges and kept inputs are read from libFuzzer's last output."""
    command = script(
        tmp_path,
        """
        echo "INFO: Loaded 1 modules   (619 inline 8-bit counters): 619 [0x1, 0x2),"
        echo "#57 INITED cov: 258 ft: 484 corp: 45/4468b exec/s: 0 rss: 33Mb"
        echo "#2000 DONE cov: 301 ft: 1046 corp: 273/44Kb lim: 1529 exec/s: 12875 rss: 425Mb" >&2
        echo "Done 2000 runs in 16 second(s)"
        """,
    )
    assert tool.fuzz("decoder", command, [tmp_path / "corpus"], 16)
    told = capsys.readouterr().out
    assert told == "decoder: 2,000 inputs, 301 of 619 edges, 273 inputs kept\n"
    assert (tmp_path / "corpus").is_dir()


def test_finding_is_told_with_its_replay(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """If a fuzzer fails the run fails, and prints the fault and how to reproduce it."""
    command = script(
        tmp_path,
        """
        echo "#57 INITED cov: 258 ft: 484 corp: 45/4468b exec/s: 0 rss: 33Mb"
        echo "==1==ERROR: AddressSanitizer: heap-buffer-overflow"
        echo "artifact_prefix='found/'; Test unit written to found/decoder-crash-1"
        exit 77
        """,
    )
    assert not tool.fuzz("decoder", command, [tmp_path / "corpus"], 16)
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "decoder: stopped, 258 edges, 45 inputs kept"
    assert told[1] == "==1==ERROR: AddressSanitizer: heap-buffer-overflow"
    assert f"Replay it:  {' '.join(command)} found/decoder-crash-1" in told
