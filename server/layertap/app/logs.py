"""Log records as text or JSON, each with the id of its request."""

from __future__ import annotations

import logging
import re
import sys
import threading
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, TextIO

from layertap.app.json_lines import capture_output, json_line
from layertap.services.caller import current_caller
from layertap.settings import LogFormat, LogLevel

__all__ = [
    "LogNarrator",
    "configure_logs",
    "log_everything_as_json",
    "set_log_level",
]

NARRATION = "layertap.serve"
_uncaught = logging.getLogger("layertap.uncaught")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def configure_logs(form: LogFormat, level: LogLevel, stream: TextIO | None = None) -> None:
    """Send this process's log records to a stream; this replaces the former configuration.

    Args:
        form: ``human`` or ``json``.
        level: The lowest level of layertap's own loggers; those of other libraries stay at WARNING.
        stream: Where to write; stderr if not given.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_Json() if form == "json" else _Human())
    handler.addFilter(_add_request_id)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    set_log_level(level)
    # Where the server listens is logged at any level, just as the console shows it otherwise.
    logging.getLogger(NARRATION).setLevel(logging.INFO)


def set_log_level(level: LogLevel) -> None:
    """Set the lowest level that layertap's own loggers log."""
    logging.getLogger("layertap").setLevel(level.upper())


def log_everything_as_json(level: LogLevel) -> None:
    """Make every line that this process writes a JSON object, for the rest of its life.

    This includes log records, Python's warnings, uncaught exceptions, and what native code and
    models print to stderr and stdout (``layertap.app.json_lines``).

    Args:
        level: See ``configure_logs``.
    """
    try:
        stream = capture_output()
    except OSError as error:
        configure_logs("json", level)
        logging.getLogger(NARRATION).warning(
            "can't start a process (%s): output of other code on stderr stays plain text", error
        )
    else:
        configure_logs("json", level, stream)
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread
    sys.unraisablehook = _log_unraisable


def _log_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    _uncaught.critical("uncaught exception: %r", error, exc_info=(kind, error, trace))


def _log_uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is None or args.exc_type is SystemExit:
        return
    name = args.thread.name if args.thread else "a thread"
    trace = (args.exc_type, args.exc_value, args.exc_traceback)
    _uncaught.error("uncaught exception in %s: %r", name, args.exc_value, exc_info=trace)


def _log_unraisable(args: sys.UnraisableHookArgs) -> None:
    where = args.err_msg or "exception ignored in"
    if args.exc_value is None:
        _uncaught.error("%s %r: %s", where, args.object, args.exc_type)
        return
    trace = (args.exc_type, args.exc_value, args.exc_traceback)
    _uncaught.error("%s %r: %r", where, args.object, args.exc_value, exc_info=trace)


class LogNarrator:
    """Logs the progress of serving; a ``layertap.app.narrator.Narrator`` for output to machines."""

    def __init__(self) -> None:
        self._log = logging.getLogger(NARRATION)

    def say(self, text: str, level: int = logging.INFO) -> None:
        """Log a line."""
        self._log.log(level, "%s", text)

    def busy(self, text: str) -> AbstractContextManager[None]:
        """Log the beginning of something that may take long."""
        self._log.info("%s", text)
        return nullcontext()


def _add_request_id(record: logging.LogRecord) -> bool:
    """Add the id of the request that this thread works for; keep every record."""
    caller = current_caller()
    record.request_id = caller.request_id if caller else ""
    return True


class _Human(logging.Formatter):
    """One line of text per record, plus the traceback if there is one."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """Return the line with control characters escaped, as these could fake another line."""
        record.message = _CONTROL.sub(lambda match: ascii(match[0])[1:-1], record.message)
        request_id = getattr(record, "request_id", "")
        return super().formatMessage(record) + (f" [request {request_id}]" if request_id else "")


class _Json(logging.Formatter):
    """One JSON object per line, in ASCII."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the object."""
        more: dict[str, Any] = {}
        if request_id := getattr(record, "request_id", ""):
            more["request_id"] = request_id
        more.update(getattr(record, "fields", {}))
        if record.exc_info:
            more["exception"] = self.formatException(record.exc_info)
        when = datetime.fromtimestamp(record.created, UTC)
        level = record.levelname.lower()
        return json_line(when, level, record.name, record.getMessage(), **more)
