"""Further inputs of Hugging Face models, and their processors, as transformers has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import hfnets
import layertap
from layertap import Texts
from layertap.errors import InvalidInputError
from layertap.models.image_config import config_of_folder

PHOTO = Path(__file__).parents[2] / "examples" / "images" / "grace_hopper.jpg"
TEXTS = ["the cat sat on the mat.", "a bird flew"]
IDS = torch.tensor([[2, 7, 11, 3], [2, 9, 20, 3]])


def boxes(batch: int, length: int) -> torch.Tensor:
    corners = torch.randint(0, 1001, (batch, length, 2, 2), generator=torch.manual_seed(3))
    return corners.sort(-2).values.flatten(-2)


@pytest.mark.parametrize(
    "name", ["LayoutLMModel", pytest.param("LiltModel", marks=pytest.mark.long)]
)
def test_documents_take_boxes(tmp_path: Path, name: str) -> None:
    """`bbox` is an optional input, of any length, with the values of transformers."""
    # LiLT has a sixth of its width for each of six numbers.
    settings = {**hfnets.TEXT, "max_2d_position_embeddings": 1024, "hidden_size": 48}
    folder = hfnets.saved(tmp_path / "net", name, **settings)
    plain: Any = getattr(transformers, name).from_pretrained(folder).eval()
    with layertap.load(f"hf:{folder}") as model:
        inputs = {each.name: each for each in model.signature.inputs}
        assert (inputs["bbox"].pattern, inputs["bbox"].optional) == ("[B, L, 4]", True)
        for length in (4, 7):
            ids = torch.arange(2, 2 + length).repeat(2, 1)
            given = {"input_ids": ids, "bbox": boxes(2, length)}
            got = model.extract(given, "output.last_hidden_state", extractor="hook")
            expected = plain(**given).last_hidden_state
            assert torch.allclose(got["output.last_hidden_state"], expected, atol=1e-6)
        layer = "output.last_hidden_state"
        alone = model.extract(IDS, layer, extractor="hook")[layer]
        assert torch.allclose(alone, plain(IDS).last_hidden_state, atol=1e-6)
        with pytest.raises(InvalidInputError, match="with L 7, expected 4"):
            model.extract({"input_ids": IDS, "bbox": boxes(2, 7)}, layer)


@pytest.mark.long
def test_detectors_take_a_mask_of_pixels(tmp_path: Path) -> None:
    """`pixel_mask` is an optional input, and says which pixels of a padded image count."""
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        backbone_config=transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1],
            out_features=["stage4"],
        ),
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=5,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.DetrModel(config).save_pretrained(tmp_path / "detr")
    plain = transformers.DetrModel.from_pretrained(tmp_path / "detr").eval()
    pixels = torch.rand((2, 3, 64, 96), generator=torch.manual_seed(1))
    mask = torch.ones((2, 64, 96), dtype=torch.int64)
    mask[1, :, 64:] = 0
    with layertap.load(f"hf:{tmp_path / 'detr'}", item_shape=(3, 64, 64)) as model:
        inputs = {each.name: each for each in model.signature.inputs}
        assert inputs["pixel_mask"].optional
        for given in ({"pixel_values": pixels}, {"pixel_values": pixels, "pixel_mask": mask}):
            got = model.extract(given, "output.last_hidden_state", extractor="hook")
            expected = plain(**given).last_hidden_state
            assert torch.allclose(got["output.last_hidden_state"], expected, atol=1e-5)
        small = {"pixel_values": pixels, "pixel_mask": mask[:, ::2, ::2].contiguous()}
        with pytest.raises(InvalidInputError, match=r"got items of \[32, 48\], expected \[64, 96"):
            model.extract(small, "output.last_hidden_state")
    with_mask, without = plain(pixels, mask), plain(pixels)
    assert not torch.allclose(with_mask.last_hidden_state[1], without.last_hidden_state[1])


def byte_level(folder: Path) -> Path:
    """Save a tokenizer of GPT-2's kind, without a padding token, into a folder."""
    letters = {token: number for number, token in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    tokenizer = Tokenizer(models.BPE({**letters, "<|endoftext|>": 256}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )
    fast.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "Qwen2Model", "Qwen3Model"])
def test_decoders_without_a_padding_token(tmp_path: Path, name: str) -> None:
    """Padding has the id of the end, and each text has the values that it has alone."""
    settings: dict[str, Any] = {**hfnets.TEXT, "vocab_size": 257, "max_position_embeddings": 64}
    settings |= {"num_key_value_heads": 2, "head_dim": 8, "eos_token_id": 256, "bos_token_id": 256}
    if name == "GPT2LMHeadModel":
        settings = {"vocab_size": 257, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64,
                    "eos_token_id": 256, "bos_token_id": 256}  # fmt: skip
    folder = byte_level(hfnets.saved(tmp_path / "net", name, **settings))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if name != "Qwen2Model":  # Qwen2's class pads with the end of the text by itself.
        assert tokenizer.pad_token is None
    plain: Any = getattr(transformers, name).from_pretrained(folder).eval()
    layer = "transformer.h.0" if name == "GPT2LMHeadModel" else "layers.0"
    with layertap.load(f"hf:{folder}") as model:
        got = model.extract(Texts(TEXTS, return_tokens=True), layer)
        assert "padded on the right with 256" in model.describe().inputs[0].tokenization
    assert got["tokens.ids"][1, -1] == 256
    part = plain.transformer if name == "GPT2LMHeadModel" else plain
    final = part.ln_f if name == "GPT2LMHeadModel" else part.norm
    for row, text in zip(got[layer], TEXTS, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        expected = part(ids).last_hidden_state[0]
        assert torch.allclose(final(row[: ids.shape[1]]), expected, atol=1e-5)


@pytest.mark.parametrize("nested", [True, False])
def test_processors_are_read_where_transformers_reads_them(tmp_path: Path, *, nested: bool) -> None:
    """An image processor within processor_config.json has priority over one of its own file."""
    folder = hfnets.clip(tmp_path / "clip")
    own = transformers.CLIPImageProcessor.from_pretrained(folder)
    if nested:
        settings = {**own.to_dict(), "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5]}
        hfnets.write(folder / "processor_config.json", {"image_processor": settings})
    else:
        hfnets.write(folder / "processor_config.json", {"processor_class": "CLIPProcessor"})
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    assert (list(processor.image_mean) == [0.1, 0.2, 0.3]) == nested
    found = config_of_folder(folder)
    assert found is not None
    assert ("processor_config.json" in found.origin.split()) == nested
    preprocess = found.preprocess((3, 32, 32))
    expected = processor(Image.open(PHOTO), return_tensors="pt")["pixel_values"][0]
    assert preprocess is not None
    assert torch.allclose(preprocess(Image.open(PHOTO).convert("RGB")), expected, atol=2e-2)


def test_a_saved_processor_is_read(tmp_path: Path) -> None:
    """What a whole processor of transformers saves holds the image settings."""
    folder = hfnets.clip(tmp_path / "clip")
    transformers.CLIPProcessor.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "processor_config.json").is_file()
    found = config_of_folder(tmp_path / "saved")
    assert found is not None
    assert found.shape == (3, 32, 32)


@pytest.fixture(scope="module")
def video_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small VideoMAE with its video processor."""
    folder = tmp_path_factory.mktemp("nets") / "videomae"
    hfnets.saved(folder, "VideoMAEModel", **hfnets.VISION, num_frames=4, tubelet_size=2)
    transformers.VideoMAEImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    return folder


def frames(count: int) -> list[Image.Image]:
    """Return parts of a photo that differ."""
    photo = Image.open(PHOTO).convert("RGB")
    return [photo.crop((7 * at, 5 * at, 7 * at + 200, 5 * at + 180)) for at in range(count)]


def test_videos_are_lists_of_frames(video_folder: Path) -> None:
    """A list of images is a video, and a list of such lists is a batch of them."""
    processor = transformers.VideoMAEImageProcessor.from_pretrained(video_folder)
    plain = transformers.VideoMAEModel.from_pretrained(video_folder).eval()
    first, second = frames(8)[:4], frames(8)[4:]
    with layertap.load(f"hf:{video_folder}") as model:
        layer = "output.last_hidden_state"
        one = model.extract(first, layer, extractor="hook")[layer]
        two = model.extract([first, second], layer, extractor="hook")[layer]
        (spec,) = model.describe().inputs
        for video, row in ((first, one[0]), (first, two[0]), (second, two[1])):
            pixels = processor(video, return_tensors="pt")["pixel_values"]
            expected = plain(pixels).last_hidden_state[0]
            assert torch.allclose(row, expected, atol=5e-2)
        assert one.shape[0] == 1
        assert not torch.allclose(two[0], two[1], atol=5e-2)
        assert spec.preprocessing.startswith("4 frames for each item, in their order; ")
        with pytest.raises(InvalidInputError, match="got 3 .* a multiple of 4, as an item is a"):
            model.extract(first[:3], layer)
        with pytest.raises(InvalidInputError, match="got videos of 3 to 4 frames"):
            model.extract([first, second[:3]], layer)
        reversed_ = model.extract(first[::-1], layer, extractor="hook")[layer]
        assert not torch.allclose(one, reversed_, atol=1e-3)


@pytest.mark.parametrize("size", [(200, 180), (181, 200), (64, 33), (20, 60)])
def test_crops_are_those_of_transformers(tmp_path: Path, size: tuple[int, int]) -> None:
    """An odd margin is cut as transformers does it, which is not as torchvision does."""
    folder = hfnets.clip(tmp_path / "clip")
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    photo = Image.open(PHOTO).convert("RGB").resize(size)
    expected = processor(photo, return_tensors="pt")["pixel_values"][0]
    found = config_of_folder(folder)
    preprocess = found and found.preprocess((3, 32, 32))
    assert preprocess is not None
    assert torch.allclose(preprocess(photo), expected, atol=2e-2)
    assert "edges rounded down" in preprocess.describe()
