"""Write docs/settings.md from the declarations of the settings, or check that it is up to date.

    python tools/gen_settings.py          writes the file
    python tools/gen_settings.py --check  exits with 1 if the file differs

The declarations are in server/layertap/settings.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from layertap.settings import Definition, Limits, ServedModel, ServerOptions, definitions

PAGE = Path(__file__).resolve().parent.parent / "docs" / "settings.md"

INTRODUCTION = """\
# Settings

Every setting of `layertap serve`: its key in `layertap.toml`, its flag, what it takes, its default
and what it does. [examples/layertap.toml](../examples/layertap.toml) is an example.
Flags win over the file, and relative paths in the file are relative to its folder. After a reload,
settings of `[server]` and `[limits]` keep their values until the next start, apart from those
marked "applied by a reload".

This page is written by `tools/gen_settings.py` from the declarations in `server/layertap/settings`.
"""

SECTIONS = (
    (
        "[server]",
        "Where to listen and what to run on. A flag like `--watch` also has its opposite, "
        "`--no-watch`.",
        ServerOptions,
    ),
    ("[limits]", "What a request may ask for. A limit has no flag.", Limits),
    (
        "[[models]]",
        "One table for each model. The flags hold for every model. `layertap layers` and `layertap "
        "extract` have the flags that say how to load a model. Settings that begin with `image_` "
        "replace single steps of the preprocessing that the model's own configuration describes "
        "([images.md](images.md)).",
        ServedModel,
    ),
)


def page() -> str:
    """Return the whole page."""
    return "\n".join([INTRODUCTION, *(line for each in SECTIONS for line in _section(*each))])


def _section(title: str, text: str, owner: type) -> Iterator[str]:
    yield f"## `{title}`\n\n{text}\n"
    yield "| key | flag | takes | default | what it does |"
    yield "| --- | --- | --- | --- | --- |"
    yield from map(_row, definitions(owner))
    yield ""


def _row(setting: Definition) -> str:
    flag = f"`{setting.flag}`" if setting.flag else ""
    default = "must be given" if setting.required else setting.default_text
    live = " Applied by a reload." if setting.setting.live else ""
    cells = (f"`{setting.key}`", flag, setting.kind.expected, default, setting.setting.help + live)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def main() -> int:
    """Write or check the page; return the exit code."""
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page(), "utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text("utf-8") == page():
        return 0
    print(f"{PAGE}: out of date; run python tools/gen_settings.py")
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
