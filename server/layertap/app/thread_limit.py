"""Refuses calls that would wait long for a thread, instead of leaving them in gRPC's queue."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import grpc

from layertap.app.health import HEALTH
from layertap.errors import OverloadedError
from layertap.services.caller import Caller
from layertap.services.error_codes import code_of
from layertap.services.grpc_adapter.handlers import refusing
from layertap.services.observer import Observer
from layertap.threads import CallersThread, WorkerThreads, run_in

__all__ = ["ThreadLimit"]

_HAS_OWN_THREADS = f"/{HEALTH}/"


class ThreadLimit(grpc.ServerInterceptor):  # type: ignore[misc] # gRPC has no types
    """Refuses a call at once if as many calls wait for a thread as there are threads.

    gRPC puts calls that find no free thread into an unbounded queue, where their deadlines pass
    unnoticed. A burst of short calls may wait there. Further calls are refused before their
    message is read, in gRPC's thread that reports the call, so that refusing needs no other
    thread.

    Args:
        workers: The pool of threads.
        observer: Notified of each refusal.
    """

    def __init__(self, workers: WorkerThreads, observer: Observer) -> None:
        self._workers = workers

        def refuse(caller: Caller) -> NoReturn:
            error = OverloadedError(
                f"all {workers.count} threads that serve calls are in use, and {workers.count} "
                f"calls wait for one, the most allowed; try again later"
            )
            observer.failed("", code_of(error), caller)
            raise error

        self._refusal = grpc.stream_stream_rpc_method_handler(
            run_in(CallersThread(), refusing(refuse))
        )

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """Pass a call on, or refuse it."""
        full = self._workers.waiting >= self._workers.count
        if full and not handler_call_details.method.startswith(_HAS_OWN_THREADS):
            return self._refusal
        return continuation(handler_call_details)
