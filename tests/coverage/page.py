"""docs/coverage.md: one page, in which each command writes its own section."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["write_section"]

PAGE = """# Coverage

Is every value that layertap sends the value that the module returned, and is every gradient and
every intervention right? Several commands ask that of many models, each against a reference that
shares no code with layertap, and write what they found into this page.
"""

SECTIONS = (
    "models", "channels_last", "export", "zoo", "packages", "gradients", "beside",
    "interventions", "beside_interventions",
)  # fmt: skip


def write_section(file: Path, name: str, text: str) -> None:
    """Put a section into the page, in the place of its former text; other sections stay.

    Args:
        file: The page; it is made where it does not exist.
        name: One of SECTIONS, which is their order on the page.
        text: Markdown, beginning with its heading.

    Raises:
        ValueError: For another name.
    """
    if name not in SECTIONS:
        raise ValueError(f"section: got {name!r}, expected one of {', '.join(SECTIONS)}")
    sections = _sections(file.read_text("utf-8")) if file.exists() else {}
    sections[name] = text.strip()
    parts = [PAGE]
    parts.extend(f"{_mark(name)}\n{sections[name]}\n" for name in SECTIONS if name in sections)
    file.write_text("\n".join(parts), "utf-8")


def _sections(page: str) -> dict[str, str]:
    """Return the text after each mark, up to the next one."""
    pieces = re.split(r"^<!-- section: (\w+) -->\n", page, flags=re.MULTILINE)
    return {name: text.strip() for name, text in zip(pieces[1::2], pieces[2::2], strict=True)}


def _mark(section: str) -> str:
    return f"<!-- section: {section} -->"
