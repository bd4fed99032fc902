"""``python -m layertap``: the command ``layertap`` of this very Python."""

from __future__ import annotations

from layertap.cli.main import main

main(prog_name="layertap")
