"""Where catalogues and compiled plans are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from layertap.errors import ConfigError
from layertap.extraction.plan_folder import open_plan_cache

MUCH = 1 << 30


def test_plans_are_kept_in_the_users_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the folder of the XDG specification, or the one that was named; both are created."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert open_plan_cache("auto", MUCH) is not None
    assert (tmp_path / "cache/layertap/plans").stat().st_mode & 0o777 == 0o700
    for place, folder in ((str(tmp_path / "mine"), "mine"), ("~/theirs", "home/theirs")):
        assert open_plan_cache(place, MUCH) is not None
        assert (tmp_path / folder).is_dir()
    assert open_plan_cache("off", MUCH) is None


def test_catalogues_may_be_left_out(tmp_path: Path) -> None:
    """A cache keeps catalogues unless it is told not to."""
    for catalogues in (True, False):
        cache = open_plan_cache(str(tmp_path), MUCH, catalogues=catalogues)
        assert cache is not None
        assert cache.catalogues is catalogues


def test_without_a_cache_folder_plans_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A home without write access is no error; a named folder without write access is one."""
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert open_plan_cache("auto", MUCH) is None
    assert "compiled plans are not stored" in caplog.text
    with pytest.raises(ConfigError, match="plan cache"):
        open_plan_cache(str(tmp_path / "file"), MUCH)
