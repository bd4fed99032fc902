"""How many sentences of mixed length a second, compared with sentence-transformers in process?

A sentence encoder of the shape of all-MiniLM-L6-v2 (6 layers, 384 channels, mean pooling,
normalisation) with random weights embeds 1,000 sentences. They come from this repository's
documentation and from Python's own, and a WordPiece vocabulary is made of these texts, so nothing
is downloaded. sentence-transformers sorts them by length and runs them in this process. The servers
run in processes of their own and get them over gRPC on 127.0.0.1. All use the same cores, and take
turns. The embeddings are compared before anything is timed.

sentence-transformers is no dependency of layertap: `make bench-sentences` makes an environment.
"""

from __future__ import annotations

import argparse
import json
import os
import pydoc_data.topics
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import common
import report
from layertap import Client, LayerSelection, Texts, keep_memory

HOME = Path(__file__).resolve().parent.parent
COUNT = 1000
LONGEST = 256
ROWS = 30522
LAYER = "normalize"
NAME = "sentences"
TOLERANCE = 1e-5
IN_FLIGHT = 32

BASELINE = "sentence-transformers in process"
ONE_REQUEST = "one Extract of 1,000 texts"
STREAM = "ExtractStream, a text an item"


def sentences() -> list[str]:
    """Return sentences of all lengths from the documentation of this repository and of Python."""
    pages = [file.read_text("utf-8") for file in sorted((HOME / "docs").glob("*.md"))]
    pages += pydoc_data.topics.topics.values()
    found: dict[str, None] = {}
    for page in pages:
        for paragraph in re.split(r"\n\s*\n", page):
            if paragraph.lstrip().startswith(("|", "```", "#", "--")):
                continue
            text = " ".join(paragraph.split())
            found.update(dict.fromkeys(re.split(r"(?<=[.!?:;])\s+(?=[A-Z\"'`*])", text)))
    real = [text for text in found if 3 <= len(text.split()) <= 150]
    return random.Random(0).sample(real, COUNT)


def encoder(folder: Path, texts: list[str]) -> Path:
    """Make the folder of a sentence encoder with random weights."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=ROWS, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=ends
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]", model_max_length=LONGEST,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=ROWS, hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
        intermediate_size=1536, max_position_embeddings=512,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    rows = [
        {"idx": index, "name": str(index), "path": path,
         "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(modules)
    ]  # fmt: skip
    _write(folder / "modules.json", rows)
    _write(folder / "sentence_bert_config.json", {"max_seq_length": LONGEST})
    pooling = {"word_embedding_dimension": 384, "pooling_mode_mean_tokens": True}
    _write(folder / "1_Pooling" / "config.json", pooling)
    (folder / "2_Normalize").mkdir()
    return folder


def _write(file: Path, content: Any) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content), "utf-8")


@contextmanager
def serving(folder: Path, mode: str, tokens: int) -> Iterator[Client]:
    """Serve the encoder from a process of its own; yield a client once it is ready."""
    command = [sys.executable, "-W", "ignore", "-m", "layertap", "serve", f"{NAME}=hf:{folder}"]
    command += ["--port", "0", "--metrics-port", "-1", "--plan-cache", "off", "--mode", mode]
    command += ["--max-tokens-per-pass", str(tokens), "--max-batch-size", str(IN_FLIGHT)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            address = next(line for line in process.stderr if "serving" in line).split()[-1]
            with Client(address) as client:
                yield client
        finally:
            process.terminate()


def one_request(client: Client, texts: list[str]) -> np.ndarray:
    """Return the embeddings ``[1000, 384]`` from one call."""
    given = Texts(texts, truncation="end")
    return client.extract(NAME, given, LAYER, timeout=300)[LAYER]


def streamed(client: Client, texts: list[str]) -> np.ndarray:
    """Return the embeddings from a stream of single texts, with several in flight."""
    items = [Texts(text, truncation="end") for text in texts]
    layers = [LayerSelection(LAYER)]
    found = client.extract_many(NAME, items, layers, max_in_flight=IN_FLIGHT)
    return np.concatenate([item[LAYER] for item in found])


def run(
    turns: int, budgets: list[int], modes: list[str], baseline_batches: list[int]
) -> dict[str, Any]:
    """Compare the ways in turns."""
    import sentence_transformers
    import torch

    texts = sentences()
    with tempfile.TemporaryDirectory() as home, ExitStack() as closing:
        folder = encoder(Path(home) / NAME, texts)
        model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
        lengths = [len(ids) for ids in model.tokenizer(texts, truncation=True)["input_ids"]]

        def embed(batch: int) -> np.ndarray:
            return model.encode(texts, batch_size=batch, show_progress_bar=False)

        ways: dict[str, Callable[[], np.ndarray]] = {
            f"{BASELINE}, batches of {batch}": lambda batch=batch: embed(batch)
            for batch in baseline_batches
        }
        for mode in modes:
            for tokens in budgets:
                client = closing.enter_context(serving(folder, mode, tokens))
                title = f"{mode} mode, {tokens} tokens a pass"
                ways[f"{ONE_REQUEST}, {title}"] = lambda c=client: one_request(c, texts)
                if mode == "throughput":
                    ways[f"{STREAM}, {title}"] = lambda c=client: streamed(c, texts)
        expected = embed(32)
        errors = {}
        for way, call in ways.items():
            errors[way] = float(np.abs(call() - expected).max())
            if errors[way] > TOLERANCE:
                raise SystemExit(f"{way}: embeddings differ by {errors[way]:.1e}")
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(turns):
            for way, call in ways.items():
                times[way] += common.timed(call, 1)
    best = min(np.median(t) for way, t in times.items() if way.startswith(BASELINE))
    return {
        "machine": common.machine("torch", "transformers", "sentence-transformers"),
        "threads": torch.get_num_threads(),
        "turns": turns,
        "tokens": {"all": sum(lengths), "shortest": min(lengths), "longest": max(lengths)},
        "ways": {
            way: {
                "items a second": round(COUNT * 1000 / float(np.median(each)), 1),
                "relative": round(float(best / np.median(each)), 3),
                "largest difference": errors[way],
                "seconds": [round(value / 1000, 3) for value in each],
            }
            for way, each in times.items()
        },
    }


def main() -> None:
    """Run, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024], help="tokens of a pass")
    parser.add_argument("--modes", nargs="+", default=["latency", "throughput"])
    parser.add_argument("--batches", type=int, nargs="+", default=[32], help="of the baseline")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    keep_memory()
    results = run(options.turns, options.tokens, options.modes, options.batches)
    common.save("sentences", results)
    report.write()
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
