"""Texts become the tokens that the model's own tokenizer makes of them."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

import hfnets
from layertap.errors import InvalidInputError, ModelLoadError
from layertap.models.text import TextTokenizer, bare, tokenizer_of_file
from layertap.texts import TextOptions, Truncation

TEXTS = ["the cat sat on the mat.", "a bird flew", "unhappily, it was happy"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small tokenizer of BERT's kind."""
    return hfnets.wordpiece(tmp_path_factory.mktemp("wordpiece"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> TextTokenizer:
    """That tokenizer, for a model that takes 32 tokens."""
    return tokenizer_of_file(folder, 32)


def test_tokens_are_those_of_transformers(folder: Path, tokenizer: TextTokenizer) -> None:
    """Ids, mask, types and offsets of a batch equal transformers' own, padded on the right."""
    own = transformers.AutoTokenizer.from_pretrained(folder)
    expected = own(TEXTS, padding=True, return_tensors="np", return_offsets_mapping=True)
    found = tokenizer.tokenize(TEXTS)
    assert np.array_equal(found.ids, expected["input_ids"])
    assert np.array_equal(found.mask, expected["attention_mask"])
    assert np.array_equal(found.types, expected["token_type_ids"])
    assert np.array_equal(found.offsets, expected["offset_mapping"])
    assert found.ids.dtype == found.mask.dtype == found.offsets.dtype == np.int64
    assert found.lengths.tolist() == [len(own(text)["input_ids"]) for text in TEXTS]


def test_offsets_are_characters_and_words_are_numbered(tokenizer: TextTokenizer) -> None:
    """A token says which characters it stands for, also behind characters of several bytes."""
    text = "unhappily\N{GRINNING FACE} the cat"
    found = tokenizer.tokenize([text])
    pieces = [text[begin:end] for begin, end in found.offsets[0]]
    assert pieces[-3:-1] == ["the", "cat"]
    assert found.words[0, 0] == found.words[0, -1] == -1
    numbers = found.words[0, 1:-1].tolist()
    assert numbers == sorted(numbers)
    assert numbers[-2] + 1 == numbers[-1]


@pytest.mark.parametrize("side", ["end", "start"])
@pytest.mark.parametrize("most", [0, 5])
def test_truncation_keeps_the_special_tokens(
    folder: Path, tokenizer: TextTokenizer, side: str, most: int
) -> None:
    """A long text is cut on the side that was asked for, as transformers cuts it."""
    own = transformers.AutoTokenizer.from_pretrained(folder)
    own.truncation_side = {"end": "right", "start": "left"}[side]
    text = " ".join(f"{noun} sat ." for noun in ["cat", "dog", "bird", "mat", "rug"] * 4)
    expected = own(text, truncation=True, max_length=most or 32, return_offsets_mapping=True)
    found = tokenizer.tokenize([text], TextOptions(Truncation(side), most))
    assert found.ids[0].tolist() == expected["input_ids"]
    assert found.offsets[0].tolist() == [list(pair) for pair in expected["offset_mapping"]]


def test_special_tokens_can_be_left_out(folder: Path, tokenizer: TextTokenizer) -> None:
    """Without them a text has its own tokens only, whole or cut."""
    own = transformers.AutoTokenizer.from_pretrained(folder)
    text = "the cat sat on the mat"
    plain = own(text, add_special_tokens=False)["input_ids"]
    options = TextOptions(special_tokens=False)
    assert tokenizer.tokenize([text], options).ids[0].tolist() == plain
    cut = TextOptions(Truncation.END, 3, special_tokens=False)
    assert tokenizer.tokenize([text], cut).ids[0].tolist() == plain[:3]


@pytest.mark.parametrize(
    ("texts", "options", "words"),
    [
        ([], {}, "texts: got none"),
        (["a cat", ""], {}, r"texts\[1\]: got an empty text"),
        (["the " * 40], {}, r"texts\[0\]: got 42 tokens, expected at most 32;.*truncation"),
        (["a b c d"], {"max_tokens": 3}, r"texts\[0\]: got 6 tokens, expected at most 3"),
        (["a"], {"max_tokens": 33}, "got max_tokens 33, expected 1 to 32"),
        (["a"], {"max_tokens": -1}, "got max_tokens -1"),
        (
            ["a cat"],
            {"max_tokens": 2, "truncation": Truncation.END},
            "max_tokens 2, expected more than the 2 special",
        ),
        (["  "], {"special_tokens": False}, "makes no token"),
    ],
)
def test_texts_that_can_not_be_taken(
    tokenizer: TextTokenizer, texts: list[str], options: dict[str, Any], words: str
) -> None:
    """Each error names the text, what it was and what was expected."""
    with pytest.raises(InvalidInputError, match=words):
        tokenizer.tokenize(texts, TextOptions(**options))


def test_truncation_needs_to_know_where(folder: Path) -> None:
    """Where nothing says how many tokens a model takes, the request has to."""
    tokenizer = tokenizer_of_file(folder)
    assert tokenizer.tokenize(["the " * 100]).ids.shape == (1, 102)
    with pytest.raises(InvalidInputError, match="truncation end without max_tokens"):
        tokenizer.tokenize(["the cat"], TextOptions(Truncation.END))


def test_a_files_own_truncation_and_padding_are_read_and_put_aside(
    folder: Path, tmp_path: Path
) -> None:
    """They say how many tokens there may be and what padding is, and cut and pad nothing."""
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(6)
    backend.enable_padding(pad_id=4, length=20, direction="left")
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = tokenizer_of_file(tmp_path / "tokenizer.json")
    assert (tokenizer.max_tokens, tokenizer.padding) == (6, 4)
    assert tokenizer.tokenize(["a cat", "a"]).ids.tolist() == [[2, 6, 7, 3], [2, 6, 3, 4]]
    with pytest.raises(InvalidInputError, match="got 8 tokens, expected at most 6"):
        tokenizer.tokenize(["the cat sat on the mat"])


def test_bytes_of_any_kind_have_tokens(tmp_path: Path) -> None:
    """A byte-level BPE without special tokens takes any text, and its offsets are characters."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["the cat sat on the mat"] * 5, trainer)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = tokenizer_of_file(tmp_path)
    text = "the caf\N{LATIN SMALL LETTER E WITH ACUTE} \N{SNOWMAN} mat"
    found = tokenizer.tokenize([text])
    assert text[slice(*found.offsets[0, -1])] in text
    assert found.offsets.max() == len(text)
    cut = tokenizer.tokenize([text], TextOptions(Truncation.START, 2))
    assert cut.ids[0].tolist() == found.ids[0, -2:].tolist()
    assert cut.offsets[0].tolist() == found.offsets[0, -2:].tolist()


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    """The error names the file."""
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelLoadError, match=r"tokenizer.json"):
        tokenizer_of_file(tmp_path)
    with pytest.raises(ModelLoadError, match="nowhere"):
        tokenizer_of_file(tmp_path / "nowhere")


def test_other_threads_run_while_a_long_text_is_tokenised(tokenizer: TextTokenizer) -> None:
    """The interpreter is not held for the time that a very long text takes."""
    long = bare(tokenizer.backend, 0, 0, "")
    text = "the cat sat on the mat . " * 80_000
    stalls: list[float] = []
    done = threading.Event()

    def tick() -> None:
        before = time.perf_counter()
        while not done.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            stalls.append(now - before)
            before = now

    ticker = threading.Thread(target=tick)
    ticker.start()
    began = time.perf_counter()
    (_,) = long.backend.encode_batch([text])
    took = time.perf_counter() - began
    done.set()
    ticker.join()
    assert max(stalls) < took / 2, (max(stalls), took, sys.version)


def test_a_deadline_is_looked_at_between_texts(tokenizer: TextTokenizer) -> None:
    """What the check raises ends the work."""
    seen = 0

    def check() -> None:
        nonlocal seen
        seen += 1
        if seen == 2:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        tokenizer.tokenize(["a cat"] * 5, check=check)
    assert seen == 2
