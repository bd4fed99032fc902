"""Hugging Face architectures, whole and with all of their inputs, from small configurations.

No hub is accessed. Lengths, batch sizes and padding differ between the requests for a model, and
some requests leave out optional inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModel

from packages.subject import images, subject, texts, waves

TEXT: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 37, "max_position_embeddings": 64,
}  # fmt: skip
VISION: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "intermediate_size": 37,
}  # fmt: skip

SPEECH: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37,
    "conv_dim": [16, 16], "conv_stride": [5, 4], "conv_kernel": [10, 8],
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
TRANSLATION: dict[str, Any] = {
    "vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 37,
    "decoder_ffn_dim": 37, "max_position_embeddings": 64, "use_cache": False,
}  # fmt: skip


def _model(kind: str, **settings: Any) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(**settings)
    return AutoModel.from_config(config)


def _text(kind: str, **settings: Any) -> nn.Module:
    return _model(kind, **{**TEXT, **settings})


def _vision(kind: str, **settings: Any) -> nn.Module:
    return _model(kind, **{**VISION, **settings})


IDS = "int64 [sequence=12], ids=99"
MASK = "int64 [sequence=12], mask, optional"
KINDS = "int64 [sequence=12], ids=2, optional"

text = subject(
    None, texts(99), package="transformers", inputs={"input_ids": IDS, "attention_mask": MASK}
)
typed_text = subject(
    None,
    texts(99, "token_type_ids"),
    package="transformers",
    inputs={"input_ids": IDS, "attention_mask": MASK, "token_type_ids": KINDS},
)
image = subject((3, 32, 32), images(3, 32, 32), package="transformers")
image64 = subject((3, 64, 64), images(3, 64, 64), package="transformers")
wave = subject((4000,), waves(4000), package="transformers")


@typed_text
def bert() -> nn.Module:
    return _text("Bert")


@text
def roberta() -> nn.Module:
    return _text("Roberta")


@text
def distilbert() -> nn.Module:
    return _model("DistilBert", vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=37)


@typed_text
def albert() -> nn.Module:
    return _text("Albert", embedding_size=16)


@typed_text
def electra() -> nn.Module:
    return _text("Electra", embedding_size=16)


@text
def mpnet() -> nn.Module:
    return _text("MPNet")


@typed_text
def deberta_v2() -> nn.Module:
    return _text("DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"])


@typed_text
def convbert() -> nn.Module:
    return _text("ConvBert", embedding_size=32)


@typed_text
def funnel() -> nn.Module:
    config = transformers.FunnelConfig(
        vocab_size=99, block_sizes=[1, 1], block_repeats=[1, 1], num_decoder_layers=1, d_model=32,
        n_head=4,
        d_head=8, d_inner=37,
    )  # fmt: skip
    return transformers.FunnelModel(config)


@text
def gpt2() -> nn.Module:
    return _model("GPT2", vocab_size=99, n_positions=64, n_embd=32, n_layer=2, n_head=4)


@text
def gpt_neo() -> nn.Module:
    return _model(
        "GPTNeo", vocab_size=99, max_position_embeddings=64, hidden_size=32, num_layers=2,
        num_heads=4, attention_types=[[["global", "local"], 1]], window_size=4,
    )  # fmt: skip


@text
def gpt_neox() -> nn.Module:
    return _text("GPTNeoX")


@text
def opt() -> nn.Module:
    return _model(
        "OPT", vocab_size=99, hidden_size=32, num_hidden_layers=2, ffn_dim=37,
        num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=16,
    )  # fmt: skip


@text
def bloom() -> nn.Module:
    return _model("Bloom", vocab_size=99, hidden_size=32, n_layer=2, n_head=4)


@text
def llama() -> nn.Module:
    return _text("Llama", num_key_value_heads=2)


@text
def mistral() -> nn.Module:
    return _text("Mistral", num_key_value_heads=2, sliding_window=6)


@text
def mixtral() -> nn.Module:
    return _text("Mixtral", intermediate_size=40, num_key_value_heads=2, num_local_experts=3)


@text
def qwen3() -> nn.Module:
    return _text("Qwen3", num_key_value_heads=2, head_dim=8)


@text
def phi() -> nn.Module:
    return _text("Phi")


@text
def gemma2() -> nn.Module:
    return _text("Gemma2", num_key_value_heads=2, head_dim=8, sliding_window=6)


@text
def mamba() -> nn.Module:
    return _model("Mamba", vocab_size=99, hidden_size=32, num_hidden_layers=2, state_size=4)


@text
def t5_encoder() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4
    )
    return transformers.T5EncoderModel(config)


@text
def clip_text() -> nn.Module:
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT, eos_token_id=98))


@image
def clip_vision() -> nn.Module:
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION))


@image
def vit() -> nn.Module:
    return _vision("ViT")


@image
def deit() -> nn.Module:
    return _vision("DeiT")


@image
def beit() -> nn.Module:
    return _vision("Beit", use_relative_position_bias=True)


@image
def dinov2() -> nn.Module:
    return _vision("Dinov2", mlp_ratio=2)


@image64
def swin() -> nn.Module:
    return _model(
        "Swin", image_size=64, patch_size=4, embed_dim=16, depths=[1, 2], num_heads=[2, 2],
        window_size=4,
    )  # fmt: skip


@image64
def convnext() -> nn.Module:
    return _model("ConvNext", hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1])


@image64
def resnet() -> nn.Module:
    return _model("ResNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])


@image64
def segformer() -> nn.Module:
    return _model(
        "Segformer", hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 2], decoder_hidden_size=16,
    )  # fmt: skip


@image64
def mobilevit() -> nn.Module:
    return _model(
        "MobileViT", image_size=64, hidden_sizes=[16, 20, 24], neck_hidden_sizes=[8] * 7,
        num_attention_heads=2,
    )  # fmt: skip


@image64
def levit() -> nn.Module:
    return _model(
        "Levit", image_size=64, hidden_sizes=[16, 32, 48], num_attention_heads=[2, 2, 2],
        depths=[1, 1, 1], key_dim=[8, 8, 8],
    )  # fmt: skip


@image64
def poolformer() -> nn.Module:
    return _model("PoolFormer", hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1])


@image64
def dpt() -> nn.Module:
    return _vision("DPT", image_size=64, is_hybrid=False, backbone_out_indices=[0, 1, 0, 1])


@image64
def yolos() -> nn.Module:
    return _vision("Yolos", image_size=[64, 64], num_detection_tokens=5)


@wave
def wav2vec2() -> nn.Module:
    return _model("Wav2Vec2", **SPEECH)


@wave
def hubert() -> nn.Module:
    return _model("Hubert", **SPEECH)


@subject((1, 2000), waves(1, 2000), package="transformers")
def encodec() -> nn.Module:
    return _model("Encodec", num_filters=4, hidden_size=16, codebook_size=16, codebook_dim=16)


@text
def modernbert() -> nn.Module:
    return _text(
        "ModernBert", pad_token_id=0, cls_token_id=1, sep_token_id=2, bos_token_id=1,
        eos_token_id=2, global_attn_every_n_layers=2, local_attention=6,
    )  # fmt: skip


@typed_text
def esm() -> nn.Module:
    return _text("Esm", pad_token_id=0, mask_token_id=98)


def _pairs(first: dict[str, torch.Tensor], second: int) -> dict[str, torch.Tensor]:
    """Return the inputs of an encoder with as many short texts for its decoder."""
    size = len(first["input_ids"])
    generator = torch.Generator().manual_seed(second)
    return {**first, "decoder_input_ids": torch.randint(1, 99, (size, second), generator=generator)}


translated = subject(
    None,
    [_pairs(batch, length) for batch, length in zip(texts(99), (5, 3, 8, 1), strict=True)],
    package="transformers",
    inputs={
        "input_ids": IDS,
        "decoder_input_ids": "int64 [target=5], ids=99",
        "attention_mask": MASK,
    },
)


@translated
def t5() -> nn.Module:
    return _model(
        "T5", vocab_size=99, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, use_cache=False
    )


@translated
def bart() -> nn.Module:
    return _model("Bart", **TRANSLATION)


@translated
def marian() -> nn.Module:
    return _model("Marian", **TRANSLATION, pad_token_id=0)


def _with_images(
    batch: dict[str, torch.Tensor], side: int, channels: int = 3
) -> dict[str, torch.Tensor]:
    size = len(batch["input_ids"])
    generator = torch.Generator().manual_seed(side + size)
    return {**batch, "pixel_values": torch.randn(size, channels, side, side, generator=generator)}


CAPTIONED: dict[str, Any] = {
    "package": "transformers",
    "inputs": {"input_ids": IDS, "pixel_values": "float32 [3, 32, 32]", "attention_mask": MASK},
}
captions = [_with_images(batch, 32) for batch in texts(99)]
captioned = subject(None, captions, **CAPTIONED)


@captioned
def clip() -> nn.Module:
    config = transformers.CLIPConfig(
        text_config={**TEXT, "eos_token_id": 98}, vision_config=VISION, projection_dim=16
    )
    return transformers.CLIPModel(config)


@captioned
def siglip() -> nn.Module:
    config = transformers.SiglipConfig(text_config=TEXT, vision_config=VISION)
    return transformers.SiglipModel(config)


@captioned
def chinese_clip() -> nn.Module:
    config = transformers.ChineseCLIPConfig(
        text_config=TEXT, vision_config=VISION, projection_dim=16
    )
    return transformers.ChineseCLIPModel(config)


@subject(None, captions, draws=True, **CAPTIONED)
def vilt() -> nn.Module:
    # It draws the patches of an image at random, in another order each time.
    return _model("Vilt", **{**TEXT, "image_size": 32, "patch_size": 8})


@captioned
def flava() -> nn.Module:
    config = transformers.FlavaConfig(
        text_config=TEXT, image_config=VISION,
        multimodal_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
                           "intermediate_size": 37},
        hidden_size=32, projection_dim=16,
    )  # fmt: skip
    return transformers.FlavaModel(config)


@captioned
def blip() -> nn.Module:
    config = transformers.BlipConfig(
        text_config={**TEXT, "projection_dim": 16, "bos_token_id": 1, "eos_token_id": 2,
                     "sep_token_id": 2, "pad_token_id": 0},
        vision_config={**VISION, "projection_dim": 16}, projection_dim=16,
    )  # fmt: skip
    return transformers.BlipModel(config)


@captioned
def blip2() -> nn.Module:
    config = transformers.Blip2Config(
        vision_config=VISION,
        qformer_config={**TEXT, "encoder_hidden_size": 32, "cross_attention_frequency": 1,
                        "use_qformer_text_input": True},
        text_config={"model_type": "opt", "vocab_size": 99, "hidden_size": 32, "ffn_dim": 37,
                     "num_hidden_layers": 1, "num_attention_heads": 4, "word_embed_proj_dim": 32},
        num_query_tokens=4, image_text_hidden_size=16,
    )  # fmt: skip
    return transformers.Blip2ForImageTextRetrieval(config)


@subject(
    None,
    [_with_images(batch, 32) for batch in texts(99) if "attention_mask" in batch],
    package="transformers",
    inputs={
        "input_ids": IDS,
        "pixel_values": "float32 [3, 32, 32]",
        "attention_mask": "int64 [sequence=12], mask",
    },
)
def owlvit() -> nn.Module:
    config = transformers.OwlViTConfig(
        text_config={**TEXT, "max_position_embeddings": 16}, vision_config=VISION, projection_dim=16
    )
    return transformers.OwlViTModel(config)


def _boxes(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return texts with a box for each token, whose corners are in order."""
    size, length = batch["input_ids"].shape
    generator = torch.Generator().manual_seed(length)
    low = torch.randint(0, 500, (size, length, 2), generator=generator)
    extent = torch.randint(0, 400, (size, length, 2), generator=generator)
    return {**batch, "bbox": torch.cat([low, low + extent], -1)}


@subject(
    None,
    [_boxes(batch) for batch in texts(99)],
    package="transformers",
    inputs={"input_ids": IDS, "bbox": "int64 [sequence=12, 4], boxes=1000", "attention_mask": MASK},
)
def layoutlm() -> nn.Module:
    return _text("LayoutLM", max_2d_position_embeddings=1024)


@subject((2, 3, 32, 32), images(2, 3, 32, 32), package="transformers")
def videomae() -> nn.Module:
    return _vision("VideoMAE", num_frames=2, tubelet_size=2)


@subject((2, 3, 32, 32), images(2, 3, 32, 32), package="transformers")
def vivit() -> nn.Module:
    return _vision("Vivit", num_frames=2, tubelet_size=[2, 8, 8])


@subject((2, 3, 32, 32), images(2, 3, 32, 32), package="transformers")
def timesformer() -> nn.Module:
    return _vision("Timesformer", num_frames=2)


@image
def dinov2_with_registers() -> nn.Module:
    return _vision("Dinov2WithRegisters", mlp_ratio=2, num_register_tokens=4)


@image
def siglip_vision() -> nn.Module:
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION))


def _spectrograms() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        {
            "input_features": torch.randn(size, 16, 40, generator=generator),
            "decoder_input_ids": torch.randint(0, 99, (size, length), generator=generator),
        }
        for size, length in ((1, 5), (2, 3), (2, 9), (3, 1))
    ]


@subject(
    None,
    _spectrograms(),
    package="transformers",
    inputs={
        "input_features": "float32 [16, 40]",
        "decoder_input_ids": "int64 [target=5], ids=99",
    },
)
def whisper() -> nn.Module:
    return _model(
        "Whisper", vocab_size=99, num_mel_bins=16, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=37,
        decoder_ffn_dim=37, max_source_positions=20, max_target_positions=32, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, use_cache=False,
    )  # fmt: skip


def _masked_waves() -> list[dict[str, torch.Tensor]]:
    whole = [{"input_values": wave} for wave in waves(4000)]
    padded = dict(whole[1])
    padded["attention_mask"] = torch.ones(2, 4000, dtype=torch.int64)
    padded["attention_mask"][1, 2500:] = 0
    return [*whole[:3], padded]


masked_wave = subject(
    None,
    _masked_waves(),
    package="transformers",
    inputs={
        "input_values": "float32 [samples=4000]",
        "attention_mask": "int64 [samples=4000], mask, optional",
    },
)


@masked_wave
def unispeech() -> nn.Module:
    return _model("UniSpeech", **SPEECH)


def _detr_requests() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for size, masked in ((1, False), (2, True), (2, False)):
        batch = {"pixel_values": torch.randn(size, 3, 64, 64, generator=generator)}
        if masked:
            batch["pixel_mask"] = torch.ones(size, 64, 64, dtype=torch.int64)
            batch["pixel_mask"][1, :, 40:] = 0
        found.append(batch)
    return found


@subject(
    None,
    _detr_requests(),
    package="transformers",
    inputs={
        "pixel_values": "float32 [3, H=64, W=64]",
        "pixel_mask": "int64 [H=64, W=64], mask, optional",
    },
)
def detr() -> nn.Module:
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"]
    )
    config = transformers.DetrConfig(
        backbone_config=backbone, use_timm_backbone=False, use_pretrained_backbone=False,
        backbone=None, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=37, decoder_ffn_dim=37, num_queries=5,
    )  # fmt: skip
    return transformers.DetrModel(config)


def _points(size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    return {
        "pixel_values": torch.randn(size, 3, 32, 32, generator=generator),
        "input_points": torch.rand(size, 1, 2, 2, generator=generator) * 32,
    }


@subject(
    None,
    [_points(size) for size in (1, 2, 3)],
    package="transformers",
    inputs={"pixel_values": "float32 [3, 32, 32]", "input_points": "float32 [1, 2, 2]"},
)
def sam() -> nn.Module:
    config = transformers.SamConfig(
        vision_config={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                       "image_size": 32, "patch_size": 8, "mlp_dim": 37, "output_channels": 16,
                       "window_size": 2, "global_attn_indexes": [1], "num_pos_feats": 8},
        prompt_encoder_config={"hidden_size": 16, "image_size": 32, "patch_size": 8,
                               "image_embedding_size": 4, "mask_input_channels": 8},
        mask_decoder_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                             "mlp_dim": 37, "iou_head_hidden_dim": 16},
    )  # fmt: skip
    return transformers.SamModel(config)
