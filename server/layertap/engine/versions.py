"""The versions of the served models, and the requests that use each version.

Note [A version is unloaded when nobody uses it]
    In every protocol, a request takes one lease of its model's version (``Engine.lease``) and does
    everything with that version: it reads the declared layers and their aliases, resolves names,
    finds plans and computes. So no answer mixes two versions. Until the lease ends, the version
    counts the request, and its hooks stay. That count is not enough: a caller whose deadline has
    passed ends its lease while its forward pass continues. So a compute thread removes the hooks,
    while no forward pass runs (``layertap.engine.unloading``).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Generic, Protocol, TypeVar

from layertap.errors import ModelNotFoundError, UnavailableError

__all__ = ["LOADING", "Version", "Versions"]

LOADING = "it is being loaded"
"""The reason for an expected model that was neither loaded nor failed to load yet."""


class _Host(Protocol):
    """What serves a version: a ``layertap.engine.host.ModelHost``."""


H = TypeVar("H", bound=_Host)


class Version(Generic[H]):
    """One version of a model. ``Versions.lease`` adds a user; leaving the block removes it."""

    __slots__ = ("_host", "_news", "users")

    def __init__(self, host: H, news: threading.Condition) -> None:
        self._host: H | None = host
        self._news = news
        self.users = 0

    @property
    def host(self) -> H:
        """The host that serves this version."""
        if self._host is None:
            raise AssertionError("a version that was unloaded has no users")
        return self._host

    def take(self) -> H:
        """Wait until the version has no users, and return its host; the version drops it."""
        with self._news:
            self._news.wait_for(lambda: not self.users)
            host, self._host = self.host, None
            return host

    def __enter__(self) -> H:
        """Return the host that serves this version."""
        return self.host

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the user."""
        with self._news:
            self.users -= 1
            if not self.users:
                self._news.notify_all()


class Versions(Generic[H]):
    """The version that serves each model, or why none does. Safe to share between threads."""

    def __init__(self) -> None:
        self._news = threading.Condition(threading.Lock())
        self._slots: dict[str, Version[H] | str] = {}

    def __contains__(self, name: str) -> bool:
        """Return whether a version of the model is serving."""
        return isinstance(self._slots.get(name), Version)

    def expect(self, names: Sequence[str]) -> None:
        """Register the models that will be loaded, and fix the order in which they are listed.

        A request for one of them is UNAVAILABLE until it serves.
        """
        with self._news:
            kept = self._slots
            slots = {name: kept.get(name, LOADING) for name in names}
            self._slots = {**slots, **{name: kept[name] for name in kept if name not in slots}}

    def explain(self, name: str, reason: str) -> None:
        """Set why a model is not served; no effect on a served model."""
        with self._news:
            if not isinstance(self._slots.get(name), Version):
                self._slots[name] = reason

    def publish(self, name: str, host: H) -> Version[H] | None:
        """Serve a model with a host from now on; return the previous version, if any."""
        with self._news:
            former = self._slots.get(name)
            self._slots[name] = Version(host, self._news)
        return former if isinstance(former, Version) else None

    def withdraw(self, name: str) -> Version[H] | None:
        """Remove a model; return the version that served it, if any. Its requests continue.

        Raises:
            ModelNotFoundError: If there is no such model.
        """
        with self._news:
            former = self._slots.pop(name, None)
        if former is None:
            raise self._absent(name, former)
        return former if isinstance(former, Version) else None

    def lease(self, name: str) -> Version[H]:
        """Add a user to a version and return it; its block must be entered at once.

        Raises:
            ModelNotFoundError, UnavailableError: As ``host`` does.
        """
        with self._news:
            slot = self._slots.get(name)
            if isinstance(slot, Version):
                slot.users += 1
                return slot
        raise self._absent(name, slot)

    def host(self, name: str) -> H:
        """Return the host that serves a model.

        Raises:
            ModelNotFoundError: If no model has that name; the message lists those that serve.
            UnavailableError: If it is still loading or could not be loaded.
        """
        with self._news:
            slot = self._slots.get(name)
            if isinstance(slot, Version):
                return slot.host
        raise self._absent(name, slot)

    def hosts(self) -> list[H]:
        """Return the hosts of all served models, in the order of ``expect``."""
        with self._news:
            return [slot.host for slot in self._slots.values() if isinstance(slot, Version)]

    def states(self) -> list[tuple[str, str]]:
        """Return each model's name and why it is not served, in the order of ``expect``.

        The reason is empty for a served model, and ``LOADING`` for one that was not tried yet.
        """
        with self._news:
            slots = list(self._slots.items())
        return [(name, slot if isinstance(slot, str) else "") for name, slot in slots]

    def _absent(self, name: str, reason: str | None) -> ModelNotFoundError | UnavailableError:
        if reason is not None:
            return UnavailableError(f"model {name!r} is not ready: {reason}")
        slots = dict(self._slots)
        ready = [repr(key) for key, slot in slots.items() if isinstance(slot, Version)]
        return ModelNotFoundError(
            f"model: got {name!r}, served models: {', '.join(ready) or 'none'}"
        )
