"""The registry has the kind of every extractor, and kinds describe themselves consistently."""

from __future__ import annotations

import pytest
import torch

from layertap.extraction.kinds import fx, hook
from layertap.extraction.kinds.base import CompiledKind, DirectKind, ReferenceKind
from layertap.extraction.kinds.registry import KINDS, REFERENCE, kind_of
from layertap.extraction.verify import compiled_tolerance
from layertap.selection import Capture, Extractor


def test_each_extractor_has_its_kind_in_the_order_of_auto() -> None:
    """The enum's order is the registry's; AUTO, which chooses among kinds, has none."""
    assert [Extractor.AUTO, *KINDS] == list(Extractor)
    assert all(kind_of(extractor).id is extractor for extractor in KINDS)
    with pytest.raises(ValueError, match="AUTO is a choice"):
        kind_of(Extractor.AUTO)


def test_a_file_with_the_wrong_kind_is_refused(monkeypatch) -> None:
    """A KIND for another extractor can't be registered; the error names the file."""
    from layertap.extraction.kinds import registry

    monkeypatch.setattr(fx, "KIND", hook.KIND)
    with pytest.raises(TypeError, match=r"kinds/fx\.py: KIND is not the kind of"):
        registry._load(Extractor.FX)


def test_letters_are_one_character_and_different() -> None:
    """Tables distinguish the extractors by their letters."""
    letters = [kind.letter for kind in KINDS.values()]
    assert len(set(letters)) == len(letters)
    assert all(len(letter) == 1 for letter in letters)
    assert [kind.letter for kind in KINDS.values()] == [extractor.letter for extractor in KINDS]


def test_what_kinds_say_of_themselves_agrees_with_their_classes() -> None:
    """``compiled`` and ``reference`` follow from the class; exactly one kind is the reference."""
    for kind in KINDS.values():
        assert kind.compiled == isinstance(kind, CompiledKind)
        assert kind.compiled != isinstance(kind, DirectKind)
        assert kind.reference == isinstance(kind, ReferenceKind) == (kind is REFERENCE)
        assert Capture.OUTPUT in kind.captures


def test_only_compiled_kinds_have_a_tolerance() -> None:
    """The others must give the model's own bits."""
    for dtype in (torch.float32, torch.float64, torch.float16, torch.int64):
        value = torch.ones(2, dtype=dtype)
        for kind in KINDS.values():
            assert kind.tolerance(value) == (compiled_tolerance(value) if kind.compiled else 0.0)
