"""What several sections of the page have: tables, quartiles and the facts of a machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import charts

__all__ = ["facts", "markdown_table", "quartiles"]


def facts(machine: dict[str, Any]) -> str:
    """Return what is known of a machine, for people."""
    return ", ".join(f"{key} {value}" for key, value in machine.items() if value)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def quartiles(row: dict[str, float]) -> str:
    """Return a median and, in brackets, the other quartiles."""
    p25, p50, p75 = (charts.digits(row[key]) for key in ("p25", "p50", "p75"))
    return f"{p50} ({p25}–{p75})"
