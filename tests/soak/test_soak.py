"""Half a minute of what `make soak` runs for longer."""

from __future__ import annotations

import pytest

from endure import soak


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_server_endures_bad_clients_and_reloads() -> None:
    """With four times its capacity, kills and reloads, nothing is wrong, lost or growing."""
    report = soak(10)
    print("\np99 ratio:", report["p99 ratio"], "ended:", report["ended"])
    assert report["faults"] == []
    ended = report["ended"]
    assert ended["heavy: OK"] > 8
    assert ended["heavy: OverloadedError"] > 4
    assert ended["plain: OK"] > 50
    assert ended["item: OK"] > 5
    assert report["reloads"] >= 4
    assert report["clients killed"] >= 2
    assert report["stop"]["exit code"] == 0
