"""Each tower of CLIP and SigLIP runs by its own inputs, with the values of the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

import hfnets
import severalnets
from kept import kept
from layertap.engine import Engine
from layertap.errors import InvalidInputError, ModelLoadError
from layertap.local import load
from layertap.local.model import LocalModel
from layertap.models import ModelSpec
from layertap.selection import Extractor, LayerSelection
from layertap.texts import Texts

PHOTO = Path(__file__).parents[2] / "examples" / "images" / "grace_hopper.jpg"
IDS = torch.tensor([[2, 7, 11, 9, 3], [2, 6, 8, 3, 0]])
MASK = (IDS != 0).long()
TEXT_LAYERS = ["text_model.encoder.layers.0", "text_projection"]
IMAGE_LAYERS = ["vision_model.encoder.layers.0", "visual_projection"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hfnets.clip(tmp_path_factory.mktemp("nets") / "clip")


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[LocalModel]:
    with load(f"hf:{folder}") as model:
        yield model


@pytest.fixture
def plain(folder: Path) -> Any:
    """A fresh module of transformers."""
    return transformers.CLIPModel.from_pretrained(folder).eval()


def pixels(size: int = 2) -> torch.Tensor:
    return torch.rand((size, 3, 32, 32), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("extractor", [Extractor.HOOK, Extractor.TORCHSCRIPT, Extractor.AUTO])
def test_a_tower_runs_alone(model: LocalModel, plain: Any, extractor: Extractor) -> None:
    """With ids only, or pixels only, its layers are those of transformers' own methods."""
    got = model.extract(
        {"input_ids": IDS, "attention_mask": MASK}, TEXT_LAYERS, extractor=extractor
    )
    own = plain.get_text_features(IDS, MASK, output_hidden_states=True)
    assert torch.allclose(got[TEXT_LAYERS[0]], own.hidden_states[1], atol=1e-5)
    assert torch.allclose(got["text_projection"], own.pooler_output, atol=1e-5)
    got = model.extract({"pixel_values": pixels()}, IMAGE_LAYERS, extractor=extractor)
    own = plain.get_image_features(pixels(), output_hidden_states=True)
    assert torch.allclose(got[IMAGE_LAYERS[0]], own.hidden_states[1], atol=1e-5)
    assert torch.allclose(got["visual_projection"], own.pooler_output, atol=1e-5)


def test_only_its_modules_run(model: LocalModel) -> None:
    """The other tower is not called, nor anything behind both."""
    ran = []
    module = model.host.model.module
    hooks = [
        part.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, part in module.named_children()
    ]
    try:
        model.extract({"input_ids": IDS}, "text_projection", extractor=Extractor.HOOK)
    finally:
        for hook in hooks:
            hook.remove()
    assert set(ran) == {"text_model", "text_projection"}


@pytest.mark.parametrize("length", [4, 7, 11])
def test_texts_of_other_lengths(model: LocalModel, plain: Any, length: int) -> None:
    """HOOK serves a new length of the text tower without measuring it."""
    ids = torch.arange(2, 2 + length)[None]
    got = model.extract({"input_ids": ids}, TEXT_LAYERS[0], extractor=Extractor.HOOK)
    expected = plain.get_text_features(ids, output_hidden_states=True).hidden_states[1]
    assert torch.equal(got[TEXT_LAYERS[0]], expected)


def test_both_together_are_the_whole_model(model: LocalModel, plain: Any) -> None:
    """With the inputs of both towers, layers of both and the similarity are served."""
    given = {"input_ids": IDS, "attention_mask": MASK, "pixel_values": pixels()}
    names = [*TEXT_LAYERS, *IMAGE_LAYERS, "output.logits_per_image", "output.text_embeds"]
    got = model.extract(given, names, extractor=Extractor.HOOK)
    own = plain(**given)
    assert torch.allclose(got["output.logits_per_image"], own.logits_per_image, atol=1e-5)
    assert torch.allclose(got["output.text_embeds"], own.text_embeds, atol=1e-6)
    alone = model.extract({"pixel_values": pixels()}, IMAGE_LAYERS, extractor=Extractor.HOOK)
    assert all(torch.equal(alone[name], got[name]) for name in IMAGE_LAYERS)


@pytest.mark.parametrize(
    ("given", "layer", "words"),
    [
        ("ids", "visual_projection", r"'visual_projection' need 'pixel_values', but the request "
         r"has only 'input_ids'; send 'pixel_values' too"),
        ("pixels", "text_projection", "need 'input_ids', but the request has only 'pixel_values'"),
        ("pixels", "output.text_embeds", "need 'input_ids' and 'pixel_values', but"),
        ("ids", "output.logits_per_text", "send 'pixel_values' too"),
        ("ids", "**", r"and \d+ more need 'input_ids' and 'pixel_values'|need 'pixel_values'"),
        ("mask", "text_projection", "got 'attention_mask' without 'input_ids'"),
        ("both", "visual_projection", "got 'pixel_values', 'attention_mask' without 'input_ids'"),
    ],
)  # fmt: skip
def test_layers_of_a_tower_that_does_not_run(
    model: LocalModel, given: str, layer: str, words: str
) -> None:
    """The error says which input to send."""
    inputs = {
        "ids": {"input_ids": IDS},
        "pixels": {"pixel_values": pixels()},
        "mask": {"attention_mask": MASK},
        "both": {"pixel_values": pixels(), "attention_mask": MASK},
    }
    for extractor in (Extractor.AUTO, Extractor.HOOK):
        with pytest.raises(InvalidInputError, match=words):
            model.extract(inputs[given], layer, extractor=extractor)


def test_texts_and_images_take_their_towers(model: LocalModel, plain: Any, folder: Path) -> None:
    """Texts alone and image files alone go through the folder's tokenizer and processor."""
    processor = transformers.AutoProcessor.from_pretrained(folder)
    texts = ["the cat sat on the mat.", "a bird flew"]
    got = model.extract(Texts(texts), "text_projection")["text_projection"]
    own = processor.tokenizer(texts, padding=True, return_tensors="pt")
    own.pop("token_type_ids")
    assert torch.allclose(got, plain.get_text_features(**own).pooler_output, atol=1e-5)
    got = model.extract(PHOTO, "visual_projection")["visual_projection"]
    made = processor.image_processor(Image.open(PHOTO), return_tensors="pt")
    assert torch.allclose(got, plain.get_image_features(**made).pooler_output, atol=2e-2)


def test_reductions_know_each_tower(model: LocalModel, plain: Any) -> None:
    """Tokens of images have their grid and class token, and those of texts follow the mask."""
    layer = IMAGE_LAYERS[0]
    grid = LayerSelection(layer, reduction="token_grid", alias="grid")
    first = LayerSelection(layer, reduction="class_token", alias="first")
    given = {"input_ids": IDS, "attention_mask": MASK, "pixel_values": pixels()}
    states = plain.get_image_features(pixels(), output_hidden_states=True).hidden_states[1]
    for inputs in ({"pixel_values": pixels()}, given):
        got = model.extract(inputs, [grid, first], extractor=Extractor.HOOK)
        patches = states[:, 1:].transpose(1, 2).reshape(2, 32, 4, 4)
        assert torch.allclose(got["grid"], patches, atol=1e-5)
        assert torch.allclose(got["first"], states[:, 0], atol=1e-5)
    mean = LayerSelection(TEXT_LAYERS[0], reduction="global_average_pool")
    got = model.extract({"input_ids": IDS, "attention_mask": MASK}, mean)[TEXT_LAYERS[0]]
    texts = plain.get_text_features(IDS, MASK, output_hidden_states=True).hidden_states[1]
    assert torch.allclose(got[1], texts[1, :4].mean(0), atol=1e-5)


def test_declared_layers_are_compiled_for_their_tower(folder: Path, plain: Any) -> None:
    """AUTO serves them with a compiled plan, whether the other tower runs or not."""
    engine = Engine(plan_cache=kept())
    engine.load(ModelSpec(f"hf:{folder}"), (LayerSelection("visual_projection"),))
    ids = torch.randint(0, 60, (2, 16), generator=torch.manual_seed(2))
    try:
        model = LocalModel(engine, "clip")
        alone = model.extract({"pixel_values": pixels()}, "visual_projection")
        both = model.extract({"pixel_values": pixels(), "input_ids": ids}, "visual_projection")
    finally:
        engine.close()
    assert (alone.extractor, both.extractor) == (Extractor.TORCHSCRIPT, Extractor.TORCHSCRIPT)
    own = plain.get_image_features(pixels()).pooler_output
    assert torch.allclose(alone["visual_projection"], own, atol=1e-5)
    assert torch.allclose(both["visual_projection"], own, atol=1e-5)


def test_the_description_says_that_either_will_do(model: LocalModel) -> None:
    """Each tower's inputs may be left out, and a note says what runs then."""
    described = model.describe()
    optional = {each.name: each.optional for each in described.inputs}
    assert optional["input_ids"]
    assert optional["pixel_values"]
    assert any("only 'input_ids', or only 'pixel_values'" in note for note in described.notes)
    (layer,) = [each for each in described.layers if each.name == IMAGE_LAYERS[0]]
    assert (layer.grid, layer.stride, layer.front_tokens) == ((4, 4), 8.0, 1)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SigLIP, whose tokenizer names no mask."""
    folder = tmp_path_factory.mktemp("nets") / "siglip"
    text = {**hfnets.TEXT, "max_position_embeddings": 12, "projection_size": 32}
    hfnets.saved(folder, "SiglipModel", text_config=text, vision_config=hfnets.VISION)
    hfnets.wordpiece(folder, max_tokens=12)
    hfnets.rewritten(folder / "tokenizer_config.json", model_input_names=["input_ids"])
    return folder


def test_siglip_gets_its_texts_as_it_was_trained(siglip: Path) -> None:
    """All texts have the full length and no mask, so none depends on the others of its request."""
    texts = ["a bird flew", "the cat sat on the mat."]
    tokenizer = transformers.AutoTokenizer.from_pretrained(siglip)
    plain = transformers.SiglipModel.from_pretrained(siglip).eval()
    given = tokenizer(texts, padding="max_length", return_tensors="pt")
    assert list(given) == ["input_ids"]
    own = plain.get_text_features(**given).pooler_output
    with load(f"hf:{siglip}") as model:
        layer = "text_model.pooler_output"
        together = model.extract(Texts(texts), layer, extractor="hook")[layer]
        alone = model.extract(Texts(texts[0]), layer, extractor="hook")[layer]
        image = model.extract({"pixel_values": pixels()}, "vision_model.head", extractor="hook")
        (ids, *_) = model.describe().inputs
    assert torch.allclose(together, own, atol=1e-6)
    assert torch.allclose(alone, own[:1], atol=1e-6)
    expected = plain.get_image_features(pixels()).pooler_output
    assert torch.allclose(image["vision_model.head"], expected, atol=1e-6)
    assert "to 12 tokens, without a mask" in ids.tokenization


def test_a_factory_names_its_towers() -> None:
    """Its methods run alone, and their layers have the values of the methods."""
    net = severalnets.towers().eval()
    text = torch.tensor([[1, 2, 3], [4, 5, 6]])
    image = pixels()[:, :, :8, :8]
    with load("severalnets:towers") as model:
        got = model.extract({"text": text}, "project")["project"]
        assert torch.allclose(got, net.encode_text(text), atol=1e-6)
        got = model.extract({"image": image}, "visual")["visual"]
        assert torch.allclose(got.flatten(1), net.encode_image(image), atol=1e-6)
        got = model.extract({"image": image, "text": text}, "output")["output"]
        assert torch.allclose(got, net(image, text), atol=1e-6)
        with pytest.raises(InvalidInputError, match="'project' need 'text', but"):
            model.extract({"image": image}, "project")


@pytest.mark.parametrize(
    ("towers", "words"),
    [
        (["encode_image"], "expected a dict from at least two methods"),
        ({"encode_image": ["image"]}, "expected a dict from at least two methods"),
        ({"encode_image": "image", "encode_text": "text"}, "expected a dict from at least two"),
        ({"encode_image": ["image"], "encode_text": ["words"]}, "its towers take image, words"),
        ({"encode_image": ["image"], "encode_text": ["image"]}, "in one tower"),
        ({"encode_image": ["image"], "encode_texts": ["text"]}, "'encode_texts', which a Pair"),
        ({"encode_image": ["image", "text"], "encode_text": []}, "'encode_text' are optional"),
    ],
)
def test_towers_that_do_not_fit(monkeypatch: pytest.MonkeyPatch, towers: Any, words: str) -> None:
    """The error says what the attribute holds and what was expected."""
    monkeypatch.setattr(severalnets.towers, "towers", towers)
    with pytest.raises(ModelLoadError, match=words):
        load("severalnets:towers").close()


class Odd(torch.nn.Module):
    """Its method for images does something else than its forward does."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.image, self.norm = (torch.nn.Linear(4, 4) for _ in range(3))

    def get_text_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.text(x)

    def get_image_features(self, y: torch.Tensor) -> torch.Tensor:
        return self.norm(self.image(2 * y))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.text(x) + self.norm(self.image(y))


def test_a_method_with_other_values_serves_nothing() -> None:
    """Layers whose value differs when their tower runs alone need the whole model."""
    from dataclasses import replace

    from layertap.extraction.measure import measure
    from layertap.extraction.towers import check_tower
    from layertap.models import LoadedModel, Signature, Tower
    from layertap.models.arguments import Arguments, parameters_of
    from layertap.models.signature import InputSpec

    module = Odd().eval().requires_grad_(False)
    towers = (Tower(("x",), "get_text_features"), Tower(("y",), "get_image_features"))
    signature = Signature((InputSpec((4,), name="x"), InputSpec((4,), name="y")), towers)
    model = LoadedModel(
        "odd", "", "", module, torch.device("cpu"), signature,
        arguments=Arguments(tuple(parameters_of(module))),
    )  # fmt: skip
    with torch.inference_mode():
        catalogue = measure(model)
    served = {tower.method: {p.path for p in own if not p.member and p.capture == "output"}
              for tower, own in catalogue.towers.items()}  # fmt: skip
    assert served == {"get_text_features": {"text"}, "get_image_features": set()}
    key = signature.of_tower(towers[1]).key
    point = catalogue.entry("image").points["output"]
    with pytest.raises(InvalidInputError, match="'image' need 'x' and 'y'"):
        check_tower(signature, catalogue, [point], key)
    assert replace(signature, towers=()).tower_of(["x"]) is None
