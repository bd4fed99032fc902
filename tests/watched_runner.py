"""A real model for a data set, whose answers a test may delay, refuse or change."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

from layertap.dataset.runners import Answer, LocalRunner, Worker
from layertap.selection import Extractor, LayerSelection

__all__ = ["WatchedRunner"]


class WatchedRunner(LocalRunner):
    """A model in this process; ``answer`` is called for each batch.

    Attributes:
        most_workers: The workers, or fewer if the model has fewer: one for each core, and another.
    """

    most_workers = 1

    @abstractmethod
    def answer(self, ask_model: Callable[[], Answer], extractor: Extractor, variant: str) -> Answer:
        """Return the answer for a batch, or raise an error; called by all workers' threads.

        Args:
            ask_model: Returns the model's own answer.
            extractor: The extractor that was named.
            variant: The variant that was named; empty for the usual way.
        """

    def workers(self) -> list[Worker]:
        """Return workers that call ``answer``."""
        return [_WatchedWorker(self, real) for real in super().workers()[: self.most_workers]]


class _WatchedWorker(Worker):
    name = "watched"

    def __init__(self, runner: WatchedRunner, real: Worker) -> None:
        self._runner, self._real = runner, real

    def ask(
        self,
        given: object,
        selections: Sequence[LayerSelection],
        extractor: Extractor,
        variant: str = "",
    ) -> Answer:
        def ask_model() -> Answer:
            return self._real.ask(given, selections, extractor, variant)

        return self._runner.answer(ask_model, extractor, variant)

    def close(self) -> None:
        self._real.close()
