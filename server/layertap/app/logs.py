"""Log records for people or for machines, each with the id of the request that it is about."""

from __future__ import annotations

import json
import logging
import re
import sys
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from layertap.services.request import current_request

__all__ = ["LogFormat", "LogLevel", "LogNarrator", "configure_logs"]

LogFormat = Literal["human", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

NARRATION = "layertap.serve"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def configure_logs(form: LogFormat, level: LogLevel, stream: TextIO | None = None) -> None:
    """Send this process's log records to a stream, in place of what was configured before.

    Args:
        form: ``human`` or ``json``.
        level: The least that layertap's own loggers tell; other libraries' stay at WARNING.
        stream: Where to; stderr unless given.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_Json() if form == "json" else _Human())
    handler.addFilter(_add_request_id)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("layertap").setLevel(level.upper())
    # That it serves, and where, is told whatever the level: in the human form the console tells it.
    logging.getLogger(NARRATION).setLevel(logging.INFO)


class LogNarrator:
    """Logs how serving goes; a ``layertap.app.lifecycle.Narrator`` for where machines read."""

    def __init__(self) -> None:
        self._log = logging.getLogger(NARRATION)

    def say(self, text: str) -> None:
        """Log a line, at the level that its first word names."""
        word, _, rest = text.partition(": ")
        level = {"error": logging.ERROR, "warning": logging.WARNING}.get(word)
        self._log.log(level or logging.INFO, "%s", rest if level else text)

    def busy(self, text: str) -> AbstractContextManager[None]:
        """Log what has begun."""
        self._log.info("%s", text)
        return nullcontext()


def _add_request_id(record: logging.LogRecord) -> bool:
    """Note the request that the logging thread works for; keep every record."""
    request = current_request()
    record.request_id = request.id if request else ""
    return True


class _Human(logging.Formatter):
    """A line of text; more where there is a traceback."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """Return the line; what a stranger wrote can't begin another or colour the terminal."""
        record.message = _CONTROL.sub(lambda match: ascii(match[0])[1:-1], record.message)
        request_id = getattr(record, "request_id", "")
        return super().formatMessage(record) + (f" [request {request_id}]" if request_id else "")


class _Json(logging.Formatter):
    """One JSON object a line, in ASCII."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the object."""
        when = datetime.fromtimestamp(record.created, UTC)
        entry: dict[str, Any] = {
            "time": when.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := getattr(record, "request_id", ""):
            entry["request_id"] = request_id
        entry.update(getattr(record, "fields", {}))
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)
