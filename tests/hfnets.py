"""Small models and tokenizers of Hugging Face, made on the spot: nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

WORDS = [
    *("the", "a", "cat", "dog", "bird", "sat", "ran", "flew", "on", "under", "over", "mat", "rug"),
    *("tree", "and", "then", "it", "was", "happy", "sad", "un", "##happy", "##ing", "##ly", "."),
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 40,
}
"""One layer, as a test pays for each layer that it loads; tests that compare layers ask for two."""
VISION: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 37,
}


def built(name: str, **settings: Any) -> nn.Module:
    """Return a seeded model of a class of transformers, in eval mode."""
    found = getattr(transformers, name)
    config = found.config_class(**settings)
    with torch.inference_mode(False), torch.random.fork_rng():
        torch.manual_seed(0)
        return found(config).eval()  # type: ignore[no-any-return]


def saved(folder: Path, name: str, shards: str = "1GB", **settings: Any) -> Path:
    """Save a seeded model into a folder, and return the folder."""
    model: Any = built(name, **settings)
    model.save_pretrained(folder, max_shard_size=shards)
    return folder


def bert(folder: Path, name: str = "BertModel", shards: str = "1GB", **settings: Any) -> Path:
    """Save a small BERT into a folder."""
    return saved(folder, name, shards, **{**TEXT, **settings})


def wordpiece(folder: Path, max_tokens: int = 32) -> Path:
    """Save a tokenizer of BERT's kind into a folder."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=max_tokens,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    fast.save_pretrained(folder)
    return folder


def clip(folder: Path) -> Path:
    """Save a small CLIP with its tokenizer and image processor into a folder."""
    text = {**TEXT, "eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0}
    saved(folder, "CLIPModel", text_config=text, vision_config=VISION, projection_dim=16)
    wordpiece(folder)
    transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    return folder


def sentence_transformer(folder: Path, **pooling: Any) -> Path:
    """Save a folder of sentence-transformers: BERT, pooling, a dense layer and normalisation."""
    bert(folder)
    wordpiece(folder)
    package = "sentence_transformers.models"
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense"),
               ("3_Normalize", "Normalize")]  # fmt: skip
    rows = [
        {"idx": index, "name": str(index), "path": path, "type": f"{package}.{kind}"}
        for index, (path, kind) in enumerate(modules)
    ]
    for path, _ in modules[1:]:
        (folder / path).mkdir()
    write(folder / "modules.json", rows)
    write(folder / "sentence_bert_config.json", {"max_seq_length": 24, "do_lower_case": False})
    write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 32, **pooling})
    dense = {
        "in_features": 32,
        "out_features": 8,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }
    write(folder / "2_Dense" / "config.json", dense)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        weights = {"linear.weight": torch.randn(8, 32), "linear.bias": torch.randn(8)}
    torch.save(weights, folder / "2_Dense" / "pytorch_model.bin")
    return folder


def write(file: Path, content: Any) -> None:
    """Write JSON."""
    file.write_text(json.dumps(content), "utf-8")


def rewritten(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file."""
    write(file, {**json.loads(file.read_text("utf-8")), **changes})
