"""One log record for each extraction."""

from __future__ import annotations

import logging
import time
from typing import Any

from layertap.engine import Extraction
from layertap.services.caller import Caller
from layertap.services.error_codes import ErrorCode

__all__ = ["AccessLog"]

_log = logging.getLogger("layertap.access")


class AccessLog:
    """Logs how each extraction ended, at INFO (a ``layertap.services.observer.Observer``).

    The fields are model, status, peer (the caller's address) and total_ms. A successful extraction
    also has extractor, variant if its program has one, bytes (including bytes in shared memory),
    prepare_ms, queue_ms and compute_ms. The record has the id of the request.
    """

    @staticmethod
    def wanted() -> bool:
        """Return whether records are logged at this level; if not, the observer can be omitted."""
        return _log.isEnabledFor(logging.INFO)

    def succeeded(self, model: str, extraction: Extraction[bytes], caller: Caller) -> None:
        """Log a successful extraction."""
        timings = extraction.timings
        _write(
            model=model,
            extractor=str(extraction.extractor),
            **({"variant": extraction.variant} if extraction.variant else {}),
            status="OK",
            peer=caller.peer,
            bytes=len(extraction.payload) + extraction.shared_bytes,
            prepare_ms=_ms(timings.prepare_ns),
            queue_ms=_ms(timings.queue_ns),
            compute_ms=_ms(timings.compute_ns),
            total_ms=_ms(timings.total_ns),
        )

    def failed(self, model: str, code: ErrorCode, caller: Caller) -> None:
        """Log a failed extraction. The reason is not logged here: the caller gets it."""
        total_ns = time.perf_counter_ns() - caller.call.started_ns
        _write(model=model, status=code.name, peer=caller.peer, total_ms=_ms(total_ns))


def _write(**fields: Any) -> None:
    text = " ".join(f"{name}={value}" for name, value in fields.items())
    _log.info("extract %s", text, extra={"fields": fields})


def _ms(nanoseconds: int) -> float:
    return round(nanoseconds / 1e6, 3)
