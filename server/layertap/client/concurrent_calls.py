"""Makes many calls at once, for a client of several servers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

from layertap.client.items import check_in_flight
from layertap.errors import LayertapError

__all__ = ["concurrent_calls"]

A = TypeVar("A")
R = TypeVar("R")


def concurrent_calls(
    call: Callable[[A], R], arguments: Iterable[A], max_in_flight: int, *, ordered: bool
) -> Iterator[R | LayertapError]:
    """Yield the outcome of a call for each argument.

    Args:
        call: Called from up to ``max_in_flight`` threads at once.
        arguments: Read in the caller's thread, at most ``max_in_flight`` ahead of what was yielded.
        max_in_flight: Maximum number of calls that were begun and not yet yielded.
        ordered: Whether to yield in the order of the arguments, or as the calls end.

    Raises:
        InvalidInputError: If ``max_in_flight`` is below 1.
        BaseException: What a call raised that is no LayertapError.
    """
    check_in_flight(max_in_flight)
    left, running = iter(arguments), list[Future[R]]()
    more = True
    pool = ThreadPoolExecutor(max_in_flight, "layertap-call")
    try:
        while True:
            while more and len(running) < max_in_flight:
                try:
                    argument = next(left)
                except StopIteration:
                    more = False
                else:
                    running.append(pool.submit(call, argument))
            if not running:
                return
            first = running[:1] if ordered else running
            ended = wait(first, return_when=FIRST_COMPLETED).done.pop()
            running.remove(ended)
            outcome: R | LayertapError
            try:
                outcome = ended.result()
            except LayertapError as error:
                outcome = error
            yield outcome
    finally:
        # Calls that have begun run to their end or their timeout; nobody waits for them.
        pool.shutdown(wait=False, cancel_futures=True)
