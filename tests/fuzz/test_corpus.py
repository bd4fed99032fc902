from __future__ import annotations

from pathlib import Path

import pytest

from corpus import FOLDER, seeds
from differential import MALFORMED, Reading, by_upb, check
from layertap.v1.feature_service_pb2 import ExtractRequest, ExtractResponse

FILES = sorted(FOLDER.iterdir())


@pytest.mark.parametrize("name", sorted(seeds()))
def test_seed_is_fresh(name: str) -> None:
    """The committed seeds are what ``python tests/fuzz/corpus.py`` writes."""
    assert (FOLDER / name).read_bytes() == seeds()[name]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_corpus_is_decoded_as_upb_does(file: Path) -> None:
    """Each seed and each former finding is read like in upb, or refused by a rule."""
    check(file.read_bytes())


@pytest.mark.parametrize("name", sorted(seeds()))
def test_seed_is_what_its_name_says(name: str) -> None:
    """Replies and requests can be read, so that fuzzing starts after the first checks."""
    kind = ExtractRequest if name.startswith("request") else ExtractResponse
    assert isinstance(by_upb(seeds()[name], kind), Reading) != name.startswith("refused")


def test_every_rule_is_broken_by_a_seed() -> None:
    """Each rule of layertap's own has a seed, so that fuzzing starts close to it."""
    texts = {
        by_upb(message, ExtractResponse) for name, message in seeds().items() if "refused" in name
    }
    rules = {" ".join(text.split()[:4]) for text in texts}
    assert rules >= {
        MALFORMED,
        "tensor: dtype: got 0,",
        "tensor: dtype: got 11,",
        "tensor: shape: got rank",
        "tensor: shape: got a",
        "tensor: data: got 3",
        "tensor: data: got byte",
        "tensor: shared: got 2",
        "tensor: got both data",
    }


def test_corpus_is_small() -> None:
    """The corpus has a few dozen files with less than 200 KB in total."""
    assert sum(file.stat().st_size for file in FILES) < 200_000
