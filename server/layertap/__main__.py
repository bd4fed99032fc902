"""``python -m layertap``: runs the command ``layertap`` with this Python."""

from __future__ import annotations

from layertap.cli.main import main

main(prog_name="layertap")
