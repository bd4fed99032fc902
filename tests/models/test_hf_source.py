"""Hugging Face models load from folders with the values that transformers itself gives."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers

import hfnets
import layertap
from layertap.app.fingerprint import files_of
from layertap.errors import ConfigError, ModelLoadError, WeightsUnavailableError
from layertap.extraction.passes import KeptState
from layertap.models import LoadedModel, ModelSpec, load_model
from layertap.settings import ServedModel

IDS = torch.tensor([[2, 7, 11, 3, 9, 20, 8, 3]])


def loaded(folder: Path, **options: Any) -> LoadedModel:
    return load_model(ModelSpec(f"hf:{folder}", **options))


def states(model: LoadedModel, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model.module(ids).last_hidden_state  # type: ignore[no-any-return]


@pytest.mark.parametrize("shards", ["1GB", "20KB"])
def test_a_folder_gives_the_values_of_transformers(tmp_path: Path, shards: str) -> None:
    """The model has the bits of transformers' own, from one file or from several shards."""
    folder = hfnets.bert(tmp_path / "tiny-bert", shards=shards)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shards == "20KB")
    model = loaded(folder)
    expected = transformers.AutoModel.from_pretrained(folder).eval()
    assert torch.equal(states(model), expected(IDS).last_hidden_state)
    assert (model.name, model.source) == ("tiny-bert", "hf:tiny-bert")
    assert str(tmp_path) not in f"{model.source} {model.weights}"
    assert model.signature.main.name == "input_ids"
    assert model.signature.main.dtype is torch.int64


def test_every_layer_of_a_folder_is_served(tmp_path: Path) -> None:
    """Layers and members of the result have the values of a fresh model of transformers."""
    folder = hfnets.bert(tmp_path / "bert", num_hidden_layers=2)
    expected = transformers.AutoModel.from_pretrained(
        folder, attn_implementation="eager"
    )(IDS, output_hidden_states=True)  # fmt: skip
    names = ["encoder.layer.0", "encoder.layer.1", "output.last_hidden_state",
             "output.pooler_output"]  # fmt: skip
    with layertap.load(f"hf:{folder}", attn_implementation="eager") as model:
        features = model.extract(IDS, names, extractor="hook")
    wanted = [*expected.hidden_states[1:], expected.last_hidden_state, expected.pooler_output]
    for name, value in zip(names, wanted, strict=True):
        assert torch.equal(features[name], value), name


def test_another_models_entry_in_a_table_of_transformers_is_no_state(tmp_path: Path) -> None:
    """A model that is made later writes into it, and no pass of an earlier one takes that away."""
    from transformers import modeling_utils

    registry = modeling_utils._CAN_RECORD_REGISTRY
    with layertap.load(f"hf:{hfnets.bert(tmp_path / 'bert')}") as model:
        key = str(transformers.GPT2Model)
        registry.pop(key, None)
        hfnets.built("GPT2Model", vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=40)
        assert key in registry
        assert model.host.catalogue.scope.snapshot.deep_changes() == []
        model.extract(IDS.repeat(3, 1), "encoder.layer.0", extractor="torchscript")
        assert model.host.catalogue.scope.rules.state is KeptState.NONE
        assert key in registry


def test_attention_weights_are_layers_with_eager_attention(tmp_path: Path) -> None:
    """Eager attention shows the weights, which are those that transformers returns."""
    folder = hfnets.bert(tmp_path / "bert")
    expected = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager")(
        IDS, output_attentions=True
    ).attentions[0]
    with layertap.load(f"hf:{folder}", attn_implementation="eager") as model:
        features = model.extract(IDS, "encoder.layer.0.attention.self.1", extractor="hook")
    assert torch.equal(features["encoder.layer.0.attention.self.1"], expected)


def test_the_class_that_the_folder_names_is_built(tmp_path: Path) -> None:
    """A classifier comes with its head; AutoModel is the same model without it."""
    folder = hfnets.bert(tmp_path / "bert", "BertForSequenceClassification", num_labels=3)
    whole = loaded(folder)
    expected = transformers.BertForSequenceClassification.from_pretrained(folder)
    assert torch.equal(whole.module(IDS).logits, expected(IDS).logits)
    bare = loaded(folder, architecture="AutoModel")
    assert type(bare.module).__name__ == "BertModel"
    assert torch.equal(states(bare), expected.bert(IDS).last_hidden_state)


def test_missing_weights_are_never_made_up(tmp_path: Path) -> None:
    """A head without weights is refused by name; a pooler without weights is left out."""
    folder = hfnets.bert(tmp_path / "bert", "BertForMaskedLM")
    with pytest.raises(WeightsUnavailableError, match=r"lacks .*classifier.*makes up no weights"):
        loaded(folder, architecture="BertForSequenceClassification")
    model = loaded(folder, architecture="AutoModel")
    assert model.module.pooler is None
    expected = transformers.BertForMaskedLM.from_pretrained(folder)
    assert torch.equal(states(model), expected.bert(IDS).last_hidden_state)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    """A configuration that does not fit the weights is told by the tensors that differ."""
    folder = hfnets.bert(tmp_path / "bert")
    hfnets.rewritten(folder / "config.json", vocab_size=70)
    with pytest.raises(WeightsUnavailableError, match=r"word_embeddings.*\[64, 32\].*\[70, 32\]"):
        loaded(folder)


def test_random_weights_depend_on_the_seed(tmp_path: Path) -> None:
    """One seed gives one model, without the folder's weights, and the weights say so."""
    folder = hfnets.bert(tmp_path / "bert")
    source = f"hf-config:{folder}"
    one, again, other = (load_model(ModelSpec(source, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(states(one), states(again))
    assert not torch.equal(states(one), states(other))
    assert not torch.equal(states(one), states(loaded(folder)))
    assert (one.source, one.weights) == ("hf-config:bert", "random (seed 1)")
    assert loaded(folder, weights="random", seed=1).weights == "random (seed 1)"


def test_random_weights_need_no_weights_file(tmp_path: Path) -> None:
    """A configuration alone is enough, given as a file or as its folder."""
    folder = hfnets.bert(tmp_path / "bert")
    (folder / "model.safetensors").unlink()
    for target in (folder, folder / "config.json"):
        assert load_model(ModelSpec(f"hf-config:{target}", name="x")).source == "hf-config:bert"
    with pytest.raises(WeightsUnavailableError, match="model.safetensors"):
        loaded(folder)


def test_precision_and_the_weights_own_type(tmp_path: Path) -> None:
    """Weights keep the type that they were saved in, unless a precision is set."""
    model = hfnets.built("BertModel", **hfnets.TEXT).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "bert")
    assert loaded(tmp_path / "bert").module.dtype is torch.bfloat16
    assert loaded(tmp_path / "bert", precision="float32").module.dtype is torch.float32


def test_a_pass_keeps_no_cache(tmp_path: Path) -> None:
    """A decoder's result has no cache of keys and values, whatever its configuration says."""
    folder = hfnets.saved(tmp_path / "llama", "LlamaForCausalLM", use_cache=True, return_dict=False,
                          num_key_value_heads=2, **hfnets.TEXT)  # fmt: skip
    result = loaded(folder).module(IDS)
    assert list(result) == ["logits"]


def test_code_of_the_model_runs_only_where_that_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder with its own code is refused until trust_remote_code is set."""
    folder = tmp_path / "custom"
    folder.mkdir()
    (folder / "ours.py").write_text(
        "import pathlib, torch, transformers\n"
        f"pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class OurConfig(transformers.PretrainedConfig):\n"
        "    model_type = 'ours'\n"
        "class OurModel(transformers.PreTrainedModel):\n"
        "    config_class = OurConfig\n"
        "    def __init__(self, config):\n"
        "        super().__init__(config)\n"
        "        self.embed = torch.nn.Embedding(10, 4)\n"
        "        self.post_init()\n"
        "    def get_input_embeddings(self):\n"
        "        return self.embed\n"
        "    def forward(self, input_ids):\n"
        "        return {'last_hidden_state': self.embed(input_ids)}\n"
    )
    own = {"AutoConfig": "ours.OurConfig", "AutoModel": "ours.OurModel"}
    content = {"model_type": "ours", "architectures": ["OurModel"], "auto_map": own}
    hfnets.write(folder / "config.json", content)
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "c"))
    source = f"hf-config:{folder}"
    with pytest.raises(ModelLoadError, match="Python code of its own.*trust_remote_code = true"):
        load_model(ModelSpec(source))
    assert not (tmp_path / "ran").exists()
    model = load_model(ModelSpec(source, trust_remote_code=True))
    assert type(model.module).__name__ == "OurModel"
    assert (tmp_path / "ran").exists()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_name_of_the_hub_is_found_in_its_cache(cache: Path, tmp_path: Path) -> None:
    """A model that was downloaded before loads without a network, and clients read its name."""
    repository = cache / "models--someone--tiny"
    hfnets.bert(repository / "snapshots" / "0123abcd")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    model = load_model(ModelSpec("hf:someone/tiny"))
    assert (model.name, model.source) == ("tiny", "hf:someone/tiny")
    assert states(model).shape == (1, 8, 32)


@pytest.mark.usefixtures("cache")
def test_a_name_that_is_not_in_the_cache_says_what_to_do() -> None:
    """Offline, the error names the model, the cache, and the way to give a folder."""
    with pytest.raises(WeightsUnavailableError, match="someone/tiny.*cache.*hf:FOLDER"):
        load_model(ModelSpec("hf:someone/tiny"))
    with pytest.raises(ModelLoadError, match="no such folder"):
        load_model(ModelSpec("hf:./nowhere", name="x"))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    """A folder without config.json is told by what it holds, an unknown class by its name."""
    folder = hfnets.bert(tmp_path / "bert")
    with pytest.raises(ModelLoadError, match="no model class 'BertModle'; did you mean 'BertModel"):
        loaded(folder, architecture="BertModle")
    (folder / "config.json").write_text("{}")
    with pytest.raises(ModelLoadError, match="transformers:"):
        loaded(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelLoadError, match=r"no config.json; it holds .*model.safetensors"):
        loaded(folder)


def test_an_adapter_is_not_a_model(tmp_path: Path) -> None:
    """The error says what the folder holds, and two ways to serve it."""
    (tmp_path / "adapter_config.json").write_text("{}", "utf-8")
    with pytest.raises(ModelLoadError, match="adapter of PEFT.*a factory that builds both.*merge"):
        load_model(ModelSpec(f"hf:{tmp_path}"))


def test_loaded_weights_are_no_longer_the_file(tmp_path: Path) -> None:
    """What is written over the file later does not reach the model."""
    folder = hfnets.bert(tmp_path / "bert")
    model = loaded(folder)
    before = states(model)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")  # Behind the header.
    with file.open("r+b") as opened:
        opened.seek(begin)
        opened.write(bytes(len(whole) - begin))
    assert torch.equal(states(model), before)


def test_images_are_preprocessed_as_the_folder_says(tmp_path: Path, photo_bytes: bytes) -> None:
    """A photograph becomes what transformers' own image processor makes of it."""
    folder = hfnets.saved(tmp_path / "vit", "ViTForImageClassification", **hfnets.VISION)
    processor = transformers.ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.4] * 3, image_std=[0.6] * 3
    )
    hfnets.write(folder / "preprocessor_config.json", processor.to_dict())
    (tmp_path / "photo.jpg").write_bytes(photo_bytes)
    with layertap.load(f"hf:{folder}") as model:
        assert model.signature.main.pattern == "[B, 3, 32, 32]"
        features = model.extract(
            tmp_path / "photo.jpg", ["output.logits", "vit.embeddings.patch_embeddings:input=x"]
        )
        description = model.describe().inputs[0].preprocessing
    assert "mean [0.4, 0.4, 0.4]" in description
    assert "defaults" not in description
    expected = transformers.ViTForImageClassification.from_pretrained(folder)
    assert torch.allclose(features["output.logits"], expected(features["x"]).logits, atol=1e-6)


POOLS = ["cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens",
         "lasttoken"]  # fmt: skip


@pytest.mark.parametrize("mode", POOLS)
def test_a_sentence_transformers_folder(tmp_path: Path, mode: str) -> None:
    """Pooling, the dense layer and normalisation are layers, with the values of their formulas."""
    folder = hfnets.sentence_transformer(tmp_path / "st", **{f"pooling_mode_{mode}": True})
    model = loaded(folder)
    hidden = transformers.AutoModel.from_pretrained(folder)(IDS, torch.tensor([[1] * 5 + [0] * 3]))
    tokens = hidden.last_hidden_state[0, :5]
    numbers = torch.arange(1.0, 6.0)[:, None]
    expected = {
        "cls_token": tokens[0],
        "max_tokens": tokens.amax(0),
        "mean_tokens": tokens.mean(0),
        "mean_sqrt_len_tokens": tokens.sum(0) / 5**0.5,
        "weightedmean_tokens": (tokens * numbers).sum(0) / 15,
        "lasttoken": tokens[4],
    }[mode]
    weights = torch.load(folder / "2_Dense" / "pytorch_model.bin")
    dense = torch.tanh(expected @ weights["linear.weight"].T + weights["linear.bias"])
    vector = model.module(IDS, torch.tensor([[1] * 5 + [0] * 3]))
    assert torch.allclose(vector[0], dense / dense.norm(), atol=1e-6)
    assert [name for name, _ in model.module.named_children()] == [
        *("transformer", "pooling", "dense", "normalize")
    ]


def test_a_sentence_transformers_module_that_is_not_known_is_refused(tmp_path: Path) -> None:
    """A module of another kind is named; with an architecture the transformer alone loads."""
    folder = hfnets.sentence_transformer(tmp_path / "st", pooling_mode_mean_tokens=True)
    modules = (folder / "modules.json").read_text().replace("models.Dense", "models.LSTM")
    (folder / "modules.json").write_text(modules)
    with pytest.raises(ModelLoadError, match="module LSTM of sentence-transformers"):
        loaded(folder)
    assert type(loaded(folder, architecture="AutoModel").module).__name__ == "BertModel"


def test_the_settings_are_for_hugging_face_models_only() -> None:
    """Another source refuses them, and an unknown implementation of attention is refused."""
    with pytest.raises(ConfigError, match="architecture of resnet18.*Hugging Face"):
        ModelSpec("resnet18", architecture="AutoModel")
    with pytest.raises(ConfigError, match="attn_implementation.*eager, sdpa"):
        ModelSpec("hf:bert", attn_implementation="fast")


CLIP: dict[str, Any] = {
    "text_config": {**hfnets.TEXT, "eos_token_id": 3, "projection_dim": 16},
    "vision_config": {**hfnets.VISION, "projection_dim": 16},
    "projection_dim": 16,
}


def test_an_image_and_text_model_takes_both(tmp_path: Path, photo_bytes: bytes) -> None:
    """CLIP takes texts and images in one request, with the values of transformers."""
    folder = hfnets.wordpiece(hfnets.saved(tmp_path / "clip", "CLIPModel", **CLIP))
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    hfnets.write(folder / "preprocessor_config.json", processor.to_dict())
    with layertap.load(f"hf:{folder}") as model:
        given = {"input_ids": layertap.Texts("the cat", return_tokens=True),
                 "pixel_values": [photo_bytes]}  # fmt: skip
        names = ["output.text_embeds", "output.image_embeds",
                 "vision_model.embeddings.patch_embedding:input=x"]  # fmt: skip
        features = model.extract(given, names)
        named = [each.name for each in model.signature.inputs]
    assert {"input_ids", "attention_mask", "pixel_values"} <= set(named)
    expected = transformers.CLIPModel.from_pretrained(folder)(
        features["tokens.ids"], features["x"], features["tokens.mask"]
    )
    assert torch.allclose(features["output.text_embeds"], expected.text_embeds, atol=1e-5)
    assert torch.allclose(features["output.image_embeds"], expected.image_embeds, atol=1e-5)


def test_a_tower_is_a_model_of_its_own(tmp_path: Path) -> None:
    """The class of a tower loads its part of the folder, and takes that tower's input alone."""
    folder = hfnets.saved(tmp_path / "clip", "CLIPModel", **CLIP)
    whole = transformers.CLIPModel.from_pretrained(folder)
    text = loaded(folder, architecture="CLIPTextModelWithProjection")
    pixels = torch.rand(1, 3, 32, 32)
    vision = loaded(folder, architecture="CLIPVisionModelWithProjection")
    both = whole(IDS, pixels)
    assert torch.allclose(
        torch.nn.functional.normalize(text.module(IDS).text_embeds), both.text_embeds, atol=1e-6
    )
    assert torch.allclose(
        torch.nn.functional.normalize(vision.module(pixels).image_embeds),
        both.image_embeds,
        atol=1e-6,
    )
    assert [each.name for each in vision.signature.inputs] == ["pixel_values"]


def test_an_encoder_and_decoder_takes_two_lengths(tmp_path: Path) -> None:
    """T5 takes ids for both, of different lengths, with the values of transformers."""
    sizes = {
        "vocab_size": 64,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 37,
        "num_layers": 2,
        "num_heads": 4,
    }
    folder = hfnets.saved(tmp_path / "t5", "T5Model", decoder_start_token_id=0, **sizes)
    given = {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]}
    with layertap.load(f"hf:{folder}") as model:
        features = model.extract(given, ["encoder.block.1.0", "output.last_hidden_state"])
        assert "(optional)" in model.signature.pattern
    expected = transformers.T5Model.from_pretrained(folder)(**given)
    assert torch.allclose(
        features["output.last_hidden_state"], expected.last_hidden_state, atol=1e-5
    )


def test_a_reload_sees_that_a_file_changed(tmp_path: Path) -> None:
    """The folder's configuration, weights and tokenizer are watched."""
    folder = hfnets.wordpiece(hfnets.bert(tmp_path / "bert"))
    names = {file.name for file in files_of(ServedModel(ModelSpec(f"hf:{folder}")))}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert files_of(ServedModel(ModelSpec("hf:someone/tiny"))) == ()


MEASURE = """
import json, os, sys, threading
from layertap.models import ModelSpec, load_model
import transformers, torch

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024

def measured(precision):
    seen, over = [before := anonymous()], threading.Event()

    def watch():
        while not over.wait(0.001):
            seen.append(anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_model(ModelSpec("hf:" + sys.argv[2], precision=precision))
    over.set()
    watcher.join()
    return model.weight_bytes() / 2**20, max(seen) - before, len(seen)

load_model(ModelSpec("hf-config:" + sys.argv[1]))
# Each in a process of its own, which has imported everything.
for precision in sys.argv[3:]:
    child = os.fork()
    if not child:
        print(json.dumps([precision, *measured(precision)]), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.fixture(scope="module")
def loading(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """What loading a BERT of 150 MB took, by precision: MiB of weights and at most, and samples."""
    folder = tmp_path_factory.mktemp("memory")
    hfnets.bert(folder / "small")
    sizes = {**hfnets.TEXT, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}
    hfnets.saved(folder / "large", "BertModel", "40MB", **sizes)
    shard = max(file.stat().st_size for file in (folder / "large").glob("*.safetensors")) / 2**20
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, folder / "small", folder / "large", "float32", "bfloat16"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    shutil.rmtree(folder / "large")
    assert done.returncode == 0, done.stderr
    rows = map(json.loads, done.stdout.splitlines())
    return {precision: [shard, *figures] for precision, *figures in rows}


@pytest.mark.long
@pytest.mark.parametrize(("precision", "least"), [("float32", 140), ("bfloat16", 70)])
def test_weights_are_never_in_memory_twice(
    loading: dict[str, list[float]], precision: str, least: int
) -> None:
    """Loading shards takes the memory of the weights and at most one shard more.

    Pages of the mapped files are not counted, as the system drops them when memory is short. The
    peak that the system reports (``ru_maxrss``) would count them, and children inherit it.
    """
    shard, weights, peak, samples = loading[precision]
    assert samples > 10
    assert weights > least
    assert 0.9 * weights < peak < weights + shard + 16
