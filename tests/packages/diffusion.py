"""diffusers' models, with the time step and the condition fixed where they take them."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from packages.subject import images, subject

latents = subject((4, 16, 16), images(4, 16, 16), package="diffusers")
pictures = subject((3, 32, 32), images(3, 32, 32), package="diffusers")


class AtOneTime(nn.Module):
    """A denoiser at time step 7, with a condition where it takes one."""

    def __init__(self, net: nn.Module, **given: Any) -> None:
        super().__init__()
        self.net = net
        self.given = given

    def forward(self, x: torch.Tensor) -> Any:
        given = {name: value.expand(len(x), *value.shape) for name, value in self.given.items()}
        return self.net(x, timestep=torch.full((len(x),), 7), **given)


@pictures
def autoencoder_kl() -> nn.Module:
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4,
    )  # fmt: skip


@pictures
def autoencoder_tiny() -> nn.Module:
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8)
    )


@pictures
def vq_model() -> nn.Module:
    return diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), norm_num_groups=4, num_vq_embeddings=16,
    )  # fmt: skip


@pictures
def unet_2d() -> nn.Module:
    net = diffusers.UNet2DModel(
        sample_size=32, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=4,
    )  # fmt: skip
    return AtOneTime(net)


@latents
def unet_2d_condition() -> nn.Module:
    net = diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=8,
        attention_head_dim=4,
    )  # fmt: skip
    return AtOneTime(net, encoder_hidden_states=torch.randn(5, 8))


@latents
def dit() -> nn.Module:
    net = diffusers.DiTTransformer2DModel(
        sample_size=16, num_layers=2, patch_size=4, attention_head_dim=8, num_attention_heads=2,
        in_channels=4, out_channels=4, num_embeds_ada_norm=10, dropout=0.1,
    )  # fmt: skip
    return AtOneTime(net, class_labels=torch.tensor(3))
