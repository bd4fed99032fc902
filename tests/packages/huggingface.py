"""Hugging Face architectures, from small configurations, without access to a hub."""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn
from transformers import AutoModel

from packages.subject import images, subject, tokens, waves

TEXT: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 37, "max_position_embeddings": 64,
}  # fmt: skip
VISION: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "intermediate_size": 37,
}  # fmt: skip


def _model(kind: str, **settings: Any) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(**settings)
    return AutoModel.from_config(config)


def _text(kind: str, **settings: Any) -> nn.Module:
    return _model(kind, **{**TEXT, **settings})


def _vision(kind: str, **settings: Any) -> nn.Module:
    return _model(kind, **{**VISION, **settings})


text = subject((12,), tokens(12, 99), package="transformers")
image = subject((3, 32, 32), images(3, 32, 32), package="transformers")
image64 = subject((3, 64, 64), images(3, 64, 64), package="transformers")
wave = subject((4000,), waves(4000), package="transformers")


@text
def bert() -> nn.Module:
    return _text("Bert")


@text
def roberta() -> nn.Module:
    return _text("Roberta")


@text
def distilbert() -> nn.Module:
    return _model("DistilBert", vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=37)


@text
def albert() -> nn.Module:
    return _text("Albert", embedding_size=16)


@text
def electra() -> nn.Module:
    return _text("Electra", embedding_size=16)


@text
def mpnet() -> nn.Module:
    return _text("MPNet")


@text
def deberta_v2() -> nn.Module:
    return _text("DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"])


@text
def convbert() -> nn.Module:
    return _text("ConvBert", embedding_size=32)


@text
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
    return _model(
        "Wav2Vec2", hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=37, conv_dim=[16, 16], conv_stride=[5, 4], conv_kernel=[10, 8],
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
    )  # fmt: skip


@wave
def hubert() -> nn.Module:
    return _model(
        "Hubert", hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=37, conv_dim=[16, 16], conv_stride=[5, 4], conv_kernel=[10, 8],
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
    )  # fmt: skip


@subject((1, 2000), waves(1, 2000), package="transformers")
def encodec() -> nn.Module:
    return _model("Encodec", num_filters=4, hidden_size=16, codebook_size=16, codebook_dim=16)
