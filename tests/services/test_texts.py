"""Texts through a server: tokenised there, with the values that transformers gives each alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
import transformers

import hfnets
from kept import kept
from layertap import Client, LayerSelection, Texts
from layertap.engine import Engine
from layertap.errors import InvalidInputError
from layertap.local import load
from layertap.models import ModelSpec
from layertap.settings import Limits
from layertap.v1 import feature_service_pb2
from serving import running_server

TEXTS = ["the cat sat on the mat.", "a bird flew", "unhappily, it was happy then"]
LAYER = "encoder.layer.0"
LLAMA = {**hfnets.TEXT, "num_hidden_layers": 2, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT with its tokenizer."""
    return hfnets.wordpiece(hfnets.bert(tmp_path_factory.mktemp("models") / "bert"))


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """A server of that BERT, of a decoder, and of a model without a tokenizer."""
    llama = hfnets.wordpiece(hfnets.saved(folder.parent / "llama", "LlamaModel", **LLAMA))
    engine = Engine(Limits(text_bytes=2000), plan_cache=kept())
    engine.load(ModelSpec(f"hf:{folder}"))
    engine.load(ModelSpec(f"hf:{llama}", attn_implementation="eager"))
    engine.load(ModelSpec(f"hf:{hfnets.bert(folder.parent / 'plain')}"))
    with running_server(engine) as address:
        yield address
    engine.close()


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Client]:
    with Client(address) as client:
        yield client


def alone(folder: Path, text: str, layer: int = 1) -> torch.Tensor:
    """Return the states of one text's tokens ``[L, C]``, by transformers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    result = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
    return result.hidden_states[layer][0]  # type: ignore[no-any-return]


def reduced(client: Client, reduction: str, texts: Any = None) -> np.ndarray:
    selection = LayerSelection(LAYER, reduction=reduction)
    return client.extract("bert", texts or Texts(TEXTS), [selection])[LAYER]


@pytest.mark.parametrize("extractor", ["auto", "hook"])
def test_tokens_have_the_values_of_each_text_alone(
    folder: Path, client: Client, extractor: str
) -> None:
    """Texts of different lengths in one request don't change each other's values."""
    features = client.extract("bert", Texts(TEXTS), LAYER, extractor=extractor)
    for row, text in zip(features[LAYER], TEXTS, strict=True):
        expected = alone(folder, text)
        assert np.allclose(row[: len(expected)], expected, atol=1e-5)


def test_the_reply_carries_the_tokens_on_request(folder: Path, client: Client) -> None:
    """Ids, mask, offsets and words come after the layers, as the tokenizer gives them."""
    features = client.extract("bert", Texts(TEXTS, return_tokens=True), LAYER)
    names = ["tokens.ids", "tokens.mask", "tokens.offsets", "tokens.words"]
    assert list(features) == [LAYER, *names]
    own = transformers.AutoTokenizer.from_pretrained(folder)
    expected = own(TEXTS, padding=True, return_tensors="np", return_offsets_mapping=True)
    assert np.array_equal(features["tokens.ids"], expected["input_ids"])
    assert np.array_equal(features["tokens.mask"], expected["attention_mask"])
    assert np.array_equal(features["tokens.offsets"], expected["offset_mapping"])
    words = [[-1 if word is None else word for word in expected.word_ids(row)] for row in range(3)]
    mask = features["tokens.mask"] == 1
    assert features["tokens.words"][mask].tolist() == np.array(words)[mask].tolist()


def test_reductions_leave_padding_out(folder: Path, client: Client) -> None:
    """Mean, maximum, first and last token of each text are those of the text alone."""
    whole = [alone(folder, text) for text in TEXTS]
    expected = {
        "global_average_pool": [tokens.mean(0) for tokens in whole],
        "token_max": [tokens.amax(0) for tokens in whole],
        "class_token": [tokens[0] for tokens in whole],
        "last_token": [tokens[-1] for tokens in whole],
    }
    for reduction, rows in expected.items():
        assert np.allclose(reduced(client, reduction), torch.stack(rows), atol=1e-5), reduction


def test_ragged_replies_have_no_padding(folder: Path, client: Client) -> None:
    """The tokens of all texts come one after the other; the mask says how many each has."""
    whole = [alone(folder, text) for text in TEXTS]
    assert np.allclose(reduced(client, "tokens"), torch.cat(whole), atol=1e-5)


def test_words_are_means_of_their_tokens(folder: Path, client: Client) -> None:
    """A word of several pieces is one row, and special tokens belong to no word."""
    own = transformers.AutoTokenizer.from_pretrained(folder)
    rows = []
    for text in TEXTS:
        states, words = alone(folder, text), own(text).word_ids()
        for number in dict.fromkeys(word for word in words if word is not None):
            pieces = [states[place] for place, word in enumerate(words) if word == number]
            rows.append(torch.stack(pieces).mean(0))
    assert "unhappily" in TEXTS[2]
    assert np.allclose(reduced(client, "words"), torch.stack(rows), atol=1e-5)


def test_a_mask_that_was_sent_counts_too(folder: Path, client: Client) -> None:
    """With ids and a mask padded on the left, the first and last tokens are those that count."""
    ids = np.array([[0, 0, 2, 7, 11, 3], [2, 6, 7, 8, 9, 3]])
    named = {"input_ids": ids, "attention_mask": (ids != 0).astype(np.int64)}
    whole = client.extract("bert", named, LAYER)[LAYER]
    assert np.array_equal(reduced(client, "class_token", named), whole[[0, 1], [2, 0]])
    assert np.array_equal(reduced(client, "last_token", named), whole[:, 5])
    assert np.allclose(
        reduced(client, "global_average_pool", named)[0], whole[0, 2:].mean(0), atol=1e-6
    )
    with pytest.raises(InvalidInputError, match="WORDS .*needs texts"):
        reduced(client, "words", named)
    named["attention_mask"][1] = 0
    with pytest.raises(InvalidInputError, match="item 1 counts no token"):
        reduced(client, "global_average_pool", named)


def test_truncation_is_asked_for(folder: Path, client: Client) -> None:
    """A text over the model's limit is refused, or cut where the request says so."""
    long = "the cat sat on the mat. " * 10
    with pytest.raises(InvalidInputError, match=r"texts\[1\]: got 72 tokens, expected at most 32"):
        client.extract("bert", Texts(["a", long]), LAYER)
    own = transformers.AutoTokenizer.from_pretrained(folder)
    given = Texts([long], truncation="end", max_tokens=9, return_tokens=True)
    expected = own(long, truncation=True, max_length=9)["input_ids"]
    assert client.extract("bert", given, LAYER)["tokens.ids"][0].tolist() == expected


@pytest.mark.parametrize(
    ("model", "given", "words"),
    [
        ("bert", Texts([]), "texts: got none"),
        ("bert", Texts(["a", ""]), r"texts\[1\]: got an empty text"),
        ("bert", Texts(["a " * 2000], truncation="end"), "got 4000 bytes in all, expected at most"),
        ("bert", {"attention_mask": Texts("a")}, "texts: got them for input 'attention_mask'"),
        (
            "bert",
            {"input_ids": Texts("a"), "attention_mask": np.ones((1, 3), np.int64)},
            "got 'attention_mask' and texts for 'input_ids'",
        ),
        (
            "bert",
            {"input_ids": Texts(["a", "b"]), "token_type_ids": np.zeros((1, 3), np.int64)},
            "batches of 1 of 'token_type_ids', 2 of the texts of 'input_ids'",
        ),
        (
            "bert",
            {"": np.ones((1, 3), np.int64), "input_ids": Texts("a")},
            "input 'input_ids': got a tensor and texts, expected it once",
        ),
        ("plain", Texts("a"), "model 'plain' takes none, as it has no tokenizer"),
    ],
)
def test_texts_that_can_not_be_taken(client: Client, model: str, given: Any, words: str) -> None:
    """Each error says what was sent and what was expected."""
    with pytest.raises(InvalidInputError, match=words):
        client.extract(model, given, LAYER)


def test_options_that_there_are_not() -> None:
    """The client refuses them before anything is sent."""
    with pytest.raises(InvalidInputError, match="truncation: got 'middle', expected one of none"):
        Texts("a", truncation="middle")
    with pytest.raises(InvalidInputError, match=r"texts\[1\]: got a lone surrogate"):
        Texts(["a", "\ud800"])
    with pytest.raises(InvalidInputError, match="texts: got a bytes, expected strings"):
        Texts([b"a"])  # type: ignore[list-item]
    with pytest.raises(InvalidInputError, match="max_tokens: got -1"):
        Texts("a", max_tokens=-1)


def test_bytes_that_are_no_utf8_are_refused(address: str) -> None:
    """The server answers INVALID_ARGUMENT, also to an unknown truncation."""
    layers = [feature_service_pb2.LayerSelection(layer=LAYER)]
    good = feature_service_pb2.ExtractRequest(
        model="bert", texts=[feature_service_pb2.TextBatch(texts=["a cat"])], layers=layers
    ).SerializeToString()
    odd = feature_service_pb2.ExtractRequest(
        model="bert", texts=[feature_service_pb2.TextBatch(texts=["a"], truncation=9)],
        layers=layers,
    ).SerializeToString()  # fmt: skip
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary("/layertap.v1.FeatureService/Extract")
        for message in (good.replace(b"a cat", b"a \xff\xfet"), odd):
            with pytest.raises(grpc.RpcError) as raised:
                call(message)
            assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        call(good)


def test_a_stream_takes_texts(folder: Path, client: Client) -> None:
    """Items of a stream are texts as those of a request are."""
    got = list(client.extract_many("bert", map(Texts, TEXTS), LAYER))
    for number, text in enumerate(TEXTS):
        assert np.allclose(got[number][LAYER][0], alone(folder, text), atol=1e-5)


def test_a_decoder_gives_states_and_attention_of_a_prompt(folder: Path, client: Client) -> None:
    """Hidden states and attention weights of any layer come from one pass, with ids and mask."""
    names = ["layers.0", "layers.1.self_attn.1", "output.last_hidden_state"]
    features = client.extract("llama", Texts(TEXTS), names)
    llama = folder.parent / "llama"
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    model = transformers.AutoModel.from_pretrained(llama, attn_implementation="eager").eval()
    for row, text in enumerate(TEXTS):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        result = model(ids, output_hidden_states=True, output_attentions=True)
        size = ids.shape[1]
        assert np.allclose(features["layers.0"][row, :size], result.hidden_states[1][0], atol=1e-5)
        attention = features["layers.1.self_attn.1"][row, :, :size, :size]
        assert np.allclose(attention, result.attentions[1][0], atol=1e-5)
        states = features["output.last_hidden_state"][row, :size]
        assert np.allclose(states, result.last_hidden_state[0], atol=1e-5)


def test_a_description_says_how_texts_are_taken(client: Client) -> None:
    """Clients see that the ids may be texts, the limit, and which inputs are optional."""
    ids, mask, *_ = client.describe_model("bert").model.inputs
    assert (ids.name, ids.texts, ids.optional) == ("input_ids", True, False)
    assert "at most 32 tokens" in ids.tokenization
    assert (mask.name, mask.texts, mask.optional) == ("attention_mask", False, True)


def test_a_tokenizer_can_be_given_to_any_model(folder: Path) -> None:
    """A factory's model of ids takes texts by the tokenizer that its settings name."""
    with load(
        "severalnets:optional", item_shape=(6,), tokenizer=str(folder / "tokenizer.json")
    ) as model:  # fmt: skip
        named = model.extract(Texts(["a cat", "a"], max_tokens=30), "head")
        ids = torch.tensor([[2, 6, 7, 3], [2, 6, 3, 0]])
        expected = model.extract({"input_ids": ids, "attention_mask": (ids != 0).long()}, "head")
    assert torch.allclose(named["head"], expected["head"], atol=1e-6)


def test_a_sentence_transformers_folder_embeds_texts(tmp_path: Path) -> None:
    """The model's result is the embedding of each text, as it is for the text alone."""
    folder = hfnets.sentence_transformer(tmp_path / "st", pooling_mode_mean_tokens=True)
    with load(f"hf:{folder}") as model:
        together = model.extract(Texts(TEXTS), ["output", "pooling"])
        each = [model.extract(Texts(text), "output")["output"][0] for text in TEXTS]
        description = model.describe().inputs[0].tokenization
    assert torch.allclose(together["output"], torch.stack(each), atol=1e-5)
    assert torch.allclose(together["output"].norm(dim=1), torch.ones(3), atol=1e-5)
    means = torch.stack([alone(folder, text).mean(0) for text in TEXTS])
    assert torch.allclose(together["pooling"], means, atol=1e-5)
    assert "at most 24 tokens" in description
