"""The results of a model's races on disk, so that AUTO knows the winners after a restart.

A file for each model, whose name is a digest of all that its catalogue depends on: the weights, the
code, the versions, the processor, the threads of a pass (see ``kept_catalogue``). A result only
decides which of the proven plans answers, so a wrong one would cost time and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from typing import Any

from layertap.engine.contest import Contest, Entrant, Race
from layertap.errors import ConfigError
from layertap.extraction.plan_cache import PlanCache, remove
from layertap.selection import Extractor

__all__ = ["KeptRaces"]

_log = logging.getLogger(__name__)

MAX_KEPT = 256
"""Results in a file; the oldest ones are left out."""


class KeptRaces:
    """The file of one model's races, which may not exist yet.

    Args:
        cache: The folder; None if nothing is kept.
        facts: A digest of what the model's catalogue depends on; empty if that is not known, and
            then nothing is kept.
    """

    def __init__(self, cache: PlanCache | None, facts: str) -> None:
        self._cache = cache if facts else None
        self._path = cache.races(facts) if cache else None
        self._found = self._read()

    def find(self, contest: Contest) -> Race | None:
        """Return the result of an earlier start; None if there is none."""
        return self._found.get(_name(contest)) if self._found else None

    def store(self, contest: Contest, race: Race) -> None:
        """Keep a result; the log says why it can't be kept."""
        if self._cache is None or self._path is None:
            return
        # Another server of the same model may have written meanwhile.
        kept = {**self._read(), _name(contest): race}
        newest = list(kept.items())[-MAX_KEPT:]
        data = json.dumps({name: _record(each) for name, each in newest}).encode()
        try:
            self._cache.replace(self._path, memoryview(data))
        except (OSError, ConfigError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            _log.warning("the result of a race is not kept: %s", reason)
        else:
            self._cache.trim()

    def _read(self) -> dict[str, Race]:
        if self._cache is None or self._path is None:
            return {}
        try:
            kept = json.loads(self._path.read_bytes())
            found = {name: _race(record) for name, record in kept.items()}
        except FileNotFoundError:
            return {}
        except OSError as error:
            _log.warning("the results of earlier races can't be read: %s", error.strerror)
            return {}
        except Exception as error:  # noqa: BLE001 - reading damaged JSON may raise anything
            _log.warning("the results of earlier races are damaged: %s", type(error).__name__)
            remove(self._path)
            return {}
        self._cache.used(self._path)
        return found


def _name(contest: Contest) -> str:
    key = contest.key
    text = repr((key.extractor.name, key.pass_spec, key.batch_key, contest.bucket))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _record(race: Race) -> dict[str, Any]:
    return {
        "first": _text(race.first),
        "winner": _text(race.winner),
        "ratios": {_text(each): list(ratios) for each, ratios in race.ratios.items()},
        "where": race.where,
        "refused": sorted(map(_text, race.refused)),
    }


def _race(record: Mapping[str, Any]) -> Race:
    """Return a race from its record; raise any exception if it is damaged."""
    ratios = {_entrant(text): tuple(map(float, each)) for text, each in record["ratios"].items()}
    first, winner = _entrant(record["first"]), _entrant(record["winner"])
    refused = frozenset(map(_entrant, record["refused"]))
    race = Race(first, winner, ratios, str(record["where"]), refused)
    str(race)  # It needs as many ratios of each entrant.
    return race


def _text(entrant: Entrant) -> str:
    return "/".join(filter(None, (entrant.extractor.name, entrant.variant)))


def _entrant(text: str) -> Entrant:
    name, _, variant = text.partition("/")
    return Entrant(Extractor[name], variant)
