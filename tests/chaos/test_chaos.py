"""Half a minute of what `make chaos` runs for longer."""

from __future__ import annotations

import pytest

from drill import drill


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_server_survives_its_surroundings() -> None:
    """During each fault values are right, calls end and health answers; then it serves again."""
    report = drill(1.0)
    # With the whole report of such a fault, which has the server's log.
    assert {name: seen for name, seen in report.items() if seen["faults"]} == {}
    assert all(seen["recovered"] for seen in report.values())
    # What needs no rights at all is never left out.
    never = ("no_more_files", "clients_killed", "client_stopped", "half_open")
    assert [report[name]["skipped"] for name in never] == [""] * len(never)
    assert sum(ended for seen in report.values() for ended in seen["ended"].values()) > 0
