"""What runs the model: this process, or servers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from layertap.dataset.changed import Changed, changed_of
from layertap.errors import InvalidInputError, LayertapError
from layertap.intervention import REPORT_PREFIX
from layertap.resources import available_cpus
from layertap.selection import Extractor, LayerSelection

if TYPE_CHECKING:
    import numpy as np

    from layertap.client import Client, Features, FeatureStream
    from layertap.description import ModelDescription
    from layertap.inputs import InputLike
    from layertap.intervention import Intervention
    from layertap.local import LocalFeatures, LocalModel
    from layertap.timings import Timings

__all__ = ["Answer", "LocalRunner", "RemoteRunner", "Runner", "Worker"]

_CALLS_OF_SERVER = 3
"""Streams to each server, each with one batch in flight: one is received and decoded and one sent
while the third runs."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The layers of one batch.

    Attributes:
        arrays: The layers by name.
        extractor: The extractor that captured them.
        variant: How its program is finished; empty for the usual way.
        timings: How long each part took.
        changed: What each intervention changed.
    """

    arrays: Mapping[str, np.ndarray]
    extractor: Extractor
    variant: str
    timings: Timings
    changed: tuple[Changed, ...] = ()


class Worker(ABC):
    """Runs one batch at a time; for one thread.

    Attributes:
        name: The model that runs the batches; workers of one server have the same.
    """

    name: str

    @abstractmethod
    def ask(
        self,
        given: InputLike,
        selections: Sequence[LayerSelection],
        extractor: Extractor,
        variant: str = "",
    ) -> Answer:
        """Return layers of a batch.

        Args:
            given: The batch.
            selections: The layers.
            extractor: The extractor to use.
            variant: How its program is finished; empty for the usual way.

        Raises:
            LayertapError: See ``LocalModel.extract`` and ``Client.extract``.
        """

    @abstractmethod
    def close(self) -> None:
        """Release what the worker holds; it may be used again."""


class Runner(ABC):
    """A model, and the workers that run it.

    Attributes:
        objective: What requested gradients are the gradients of; empty for nothing.
        interventions: Changes of values while the model runs.
    """

    objective: str = ""
    interventions: Sequence[Intervention] = ()

    @abstractmethod
    def describe(self) -> ModelDescription:
        """Return the description of the model."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a digest of the model's structure and weights; empty if it is not known."""

    @abstractmethod
    def workers(self) -> list[Worker]:
        """Return new workers, as many as batches may be in flight."""


class LocalRunner(Runner):
    """A model in this process.

    Args:
        model: The model. It stays open.
        objective: What requested gradients are the gradients of; empty for nothing.
        interventions: Changes of values while the model runs, all of one set.
    """

    def __init__(
        self,
        model: LocalModel,
        objective: str = "",
        interventions: Sequence[Intervention] = (),
    ) -> None:
        self._model = model
        self.objective = objective
        self.interventions = _one_set(interventions)

    def describe(self) -> ModelDescription:
        """See Runner."""
        return self._model.describe()

    def fingerprint(self) -> str:
        """See Runner."""
        return self._model.fingerprint()

    def workers(self) -> list[Worker]:
        """Return a worker for each core, to decode images, and one whose batch is in the model."""
        return [
            _LocalWorker(self._model, self.objective, self.interventions)
            for _ in range(min(16, available_cpus() + 1))
        ]


class _LocalWorker(Worker):
    name = "the model"

    def __init__(
        self, model: LocalModel, objective: str, interventions: Sequence[Intervention]
    ) -> None:
        self._model = model
        self._objective = objective or None
        self._interventions = interventions

    def ask(
        self,
        given: InputLike,
        selections: Sequence[LayerSelection],
        extractor: Extractor,
        variant: str = "",
    ) -> Answer:
        features = self._model.extract(
            given,
            selections,
            extractor=extractor,
            objective=self._objective,
            interventions=self._interventions,
            variant=variant,
        )
        return _answer(features.numpy(), features)

    def close(self) -> None:
        pass  # The model is the caller's.


class RemoteRunner(Runner):
    """A model on one or several servers, which must all have the same weights.

    Args:
        clients: A client for each server, by address. They stay open.
        model: The model's name.
        objective: What requested gradients are the gradients of; empty for nothing.
        timeout: Seconds that a server may take for one batch.
        interventions: Changes of values while the model runs, all of one set.

    Raises:
        InvalidInputError: If the servers' models differ.
    """

    def __init__(
        self,
        clients: Mapping[str, Client],
        model: str,
        objective: str = "",
        timeout: float = 600.0,
        interventions: Sequence[Intervention] = (),
    ) -> None:
        from layertap.wire.descriptions import description_from_proto

        self._clients = clients
        self._name = model
        self.objective = objective
        self.interventions = _one_set(interventions)
        self._timeout = timeout
        described = {
            address: description_from_proto(client.describe_model(model, fingerprint=True))
            for address, client in clients.items()
        }
        (first, self._description), *others = described.items()
        for address, other in others:
            for what in ("weights", "fingerprint", "inputs"):
                here, there = getattr(self._description, what), getattr(other, what)
                if here != there:
                    raise InvalidInputError(
                        f"servers: {first} and {address} have different models {model!r}: {what} "
                        f"{_words(here)} and {_words(there)}"
                    )

    def describe(self) -> ModelDescription:
        """See Runner."""
        return self._description

    def fingerprint(self) -> str:
        """See Runner."""
        return self._description.fingerprint

    def workers(self) -> list[Worker]:
        """Return workers for each server, each with a stream of its own."""
        return [
            _RemoteWorker(address, client.stream, self._name, self, self._timeout)
            for _ in range(_CALLS_OF_SERVER)
            for address, client in self._clients.items()
        ]


def _one_set(interventions: Sequence[Intervention]) -> Sequence[Intervention]:
    """Return interventions for a data set, if it can have them.

    Raises:
        InvalidInputError: If they have several sets, as the output has one row for each item; or
            are about single items, as these have other places in each batch.
    """
    if any(one.set > 1 for one in interventions):
        raise InvalidInputError("interventions: got several sets, expected one for a data set")
    if any(one.picks_items for one in interventions):
        raise InvalidInputError(
            "interventions: got one that picks items of the batch, which a data set does not have"
        )
    return interventions


def _answer(arrays: Mapping[str, np.ndarray], of: Features | LocalFeatures) -> Answer:
    """Return the answer with the reports about a whole batch apart from the items' outputs."""
    changed = changed_of(arrays)
    if changed:
        arrays = {n: array for n, array in arrays.items() if not n.startswith(REPORT_PREFIX)}
    return Answer(arrays, of.extractor, of.variant, of.timings, changed)


def _words(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


class _RemoteWorker(Worker):
    """One stream, with a batch at a time; opened when it is needed, and after it broke."""

    def __init__(
        self,
        name: str,
        opening: Callable[..., FeatureStream],
        model: str,
        runner: Runner,
        timeout: float,
    ) -> None:
        self.name = name
        self._opening = opening
        self._model = model
        self._objective = runner.objective or None
        self._interventions = runner.interventions
        self._timeout = timeout
        self._stream: FeatureStream | None = None

    def ask(
        self,
        given: InputLike,
        selections: Sequence[LayerSelection],
        extractor: Extractor,
        variant: str = "",
    ) -> Answer:
        from layertap.client import StreamRequest

        if self._stream is None:
            self._stream = self._opening(max_in_flight=1, item_timeout=self._timeout)
        request = StreamRequest(
            self._model,
            given,
            selections,
            extractor,
            objective=self._objective,
            interventions=self._interventions,
            variant=variant,
        )
        try:
            [(_, outcome)] = self._stream.extract([request])
        except LayertapError:
            self.close()
            raise
        if isinstance(outcome, LayertapError):
            raise outcome
        return _answer(outcome, outcome)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
