from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from corpus import FOLDER
from differential import CORES
from fuzz_messages import at_random, main


def test_without_atheris_seeds_are_changed_at_random(capsys: pytest.CaptureFixture[str]) -> None:
    """The replacement for atheris checks the given number of messages, the seeds first."""
    at_random(["-runs=200", str(FOLDER)])
    assert "Done 200 runs" in capsys.readouterr().err


def test_finding_is_written_and_replayed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A message that is read wrongly is written to a file, which reproduces the fault."""

    def decode(*_: Any, **__: Any) -> Any:
        return b"", []

    with monkeypatch.context() as planted:
        planted.setitem(CORES, "core", type("Fake", (), {"decode": staticmethod(decode)}))
        with pytest.raises(AssertionError, match="core: Reading"):
            at_random(["-runs=200", f"-artifact_prefix={tmp_path}/messages-", str(FOLDER)])
        found = tmp_path / "messages-crash-messages"
        assert f"Test unit written to {found}" in capsys.readouterr().err
        with pytest.raises(AssertionError, match="core: Reading"):
            main([str(found)])
    main([str(found)])
    assert str(found) in capsys.readouterr().out
