"""monai's networks, in two and three dimensions."""

from __future__ import annotations

from monai.networks import nets
from torch import nn

from packages.subject import images, subject

slices = subject((1, 64, 64), images(1, 64, 64), package="monai")
volumes = subject((1, 32, 32, 32), images(1, 32, 32, 32)[:3], package="monai")


@slices
def monai_unet() -> nn.Module:
    return nets.UNet(2, 1, 2, channels=(4, 8, 16), strides=(2, 2), num_res_units=1)


@slices
def basic_unet() -> nn.Module:
    return nets.BasicUNet(2, 1, 2, features=(4, 4, 8, 8, 16, 4))


@slices
def attention_unet() -> nn.Module:
    return nets.AttentionUnet(2, 1, 2, channels=(4, 8, 16), strides=(2, 2))


@slices
def segresnet() -> nn.Module:
    return nets.SegResNet(2, init_filters=8, in_channels=1, blocks_down=(1, 1), blocks_up=(1,))


@slices
def dynunet() -> nn.Module:
    return nets.DynUNet(
        2, 1, 2, kernel_size=(3, 3, 3), strides=(1, 2, 2), upsample_kernel_size=(2, 2),
        filters=(4, 8, 16), deep_supervision=True,
    )  # fmt: skip


@volumes
def unetr() -> nn.Module:
    return nets.UNETR(
        1, 2, img_size=(32, 32, 32), feature_size=4, hidden_size=24, mlp_dim=32, num_heads=2
    )


# In two dimensions: volumes that leave several voxels at the bottom make gigabytes of layers.
@slices
def swin_unetr() -> nn.Module:
    return nets.SwinUNETR(
        1, 2, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), spatial_dims=2
    )


@volumes
def vnet() -> nn.Module:
    return nets.VNet(3, 1, 2)


@slices
def densenet() -> nn.Module:
    return nets.DenseNet(2, 1, 3, init_features=8, growth_rate=4, block_config=(2, 2))


@slices
def autoencoder() -> nn.Module:
    return nets.AutoEncoder(2, 1, 1, channels=(4, 8), strides=(2, 2))


@subject((1, 64, 64), images(1, 64, 64), package="monai", draws=True)
def variational() -> nn.Module:
    return nets.VarAutoEncoder(2, (1, 64, 64), 1, 4, channels=(4, 8), strides=(2, 2))


@slices
def monai_vit() -> nn.Module:
    return nets.ViT(
        1, img_size=(64, 64), patch_size=(16, 16), hidden_size=16, mlp_dim=32, num_layers=2,
        num_heads=2, spatial_dims=2, classification=True,
    )  # fmt: skip


@slices
def highresnet() -> nn.Module:
    return nets.HighResNet(2, 1, 2)
