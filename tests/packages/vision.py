"""segmentation_models_pytorch, kornia, segment_anything, open_clip, and timm's odd families."""

from __future__ import annotations

from typing import Any

import kornia
import segmentation_models_pytorch as smp
import timm
from kornia.models.dexined import DexiNed
from open_clip import modified_resnet, transformer
from segment_anything import modeling
from torch import nn

from packages.subject import images, subject, tokens

segments = subject((3, 64, 64), images(3, 64, 64), package="segmentation_models_pytorch")
patches = subject((1, 32, 32), images(1, 32, 32), package="kornia")
pictures = subject((3, 64, 64), images(3, 64, 64), package="kornia")
clip_images = subject((3, 32, 32), images(3, 32, 32), package="open_clip")
timm_images = subject((3, 64, 64), images(3, 64, 64), package="timm")


def _segmenter(kind: str, **settings: Any) -> nn.Module:
    return smp.create_model(kind, "resnet18", encoder_weights=None, classes=2, **settings)


@segments
def smp_unet() -> nn.Module:
    return _segmenter("unet")


@segments
def smp_unet_attention() -> nn.Module:
    return _segmenter("unet", decoder_attention_type="scse")


@segments
def smp_unetplusplus() -> nn.Module:
    return _segmenter("unetplusplus")


@segments
def smp_manet() -> nn.Module:
    return _segmenter("manet")


@segments
def smp_linknet() -> nn.Module:
    return _segmenter("linknet")


@segments
def smp_fpn() -> nn.Module:
    return _segmenter("fpn")


@segments
def smp_pspnet() -> nn.Module:
    return _segmenter("pspnet")


@segments
def smp_deeplabv3plus() -> nn.Module:
    return _segmenter("deeplabv3plus")


@segments
def smp_upernet() -> nn.Module:
    return _segmenter("upernet")


@segments
def smp_segformer() -> nn.Module:
    return _segmenter("segformer")


@patches
def kornia_hardnet() -> nn.Module:
    return kornia.feature.HardNet(False)


@patches
def kornia_sosnet() -> nn.Module:
    return kornia.feature.SOSNet(False)


@patches
def kornia_tfeat() -> nn.Module:
    return kornia.feature.TFeat(False)


@patches
def kornia_hynet() -> nn.Module:
    return kornia.feature.HyNet(False)


@pictures
def kornia_dexined() -> nn.Module:
    return DexiNed(pretrained=False)


@subject((1, 32, 32), images(1, 32, 32), package="kornia")
def kornia_keynet() -> nn.Module:
    return kornia.feature.KeyNet(False)


@subject((3, 64, 64), images(3, 64, 64), package="segment_anything")
def sam_encoder() -> nn.Module:
    return modeling.ImageEncoderViT(
        img_size=64, patch_size=8, embed_dim=32, depth=2, num_heads=2, out_chans=16,
        use_rel_pos=True, window_size=3, global_attn_indexes=(1,),
    )  # fmt: skip


@clip_images
def clip_vision_tower() -> nn.Module:
    return transformer.VisionTransformer(
        image_size=32, patch_size=8, width=32, layers=2, heads=2, mlp_ratio=2, output_dim=16
    )


@subject((3, 64, 64), images(3, 64, 64), package="open_clip")
def clip_resnet_tower() -> nn.Module:
    return modified_resnet.ModifiedResNet(
        layers=(1, 1, 1, 1), output_dim=16, heads=2, image_size=64, width=8
    )


@subject((12,), tokens(12, 99), package="open_clip")
def clip_text_tower() -> nn.Module:
    return transformer.TextTransformer(
        context_length=12, vocab_size=99, width=32, heads=2, layers=2, output_dim=16
    )


@timm_images
def timm_features_only() -> nn.Module:
    return timm.create_model("resnet18", features_only=True)


@timm_images
def timm_features_by_hooks() -> nn.Module:
    return timm.create_model("resnet18", features_only=True, feature_cls="hook")


@timm_images
def timm_dynamic_positions() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=64, dynamic_img_size=True, features_only=True
    )


@subject((3, 56, 56), images(3, 56, 56), package="timm")
def timm_rotary() -> nn.Module:
    return timm.create_model("eva02_tiny_patch14_224", img_size=56, dynamic_img_size=False)


@timm_images
def timm_group_norm() -> nn.Module:
    return timm.create_model("resnetv2_50x1_bit", num_classes=3)


@timm_images
def timm_split_batch_norm() -> nn.Module:
    net = timm.create_model("resnet18")
    return timm.layers.convert_splitbn_model(net, 2)


@timm_images
def timm_anti_aliased() -> nn.Module:
    return timm.create_model("resnetblur50", num_classes=3)


@timm_images
def timm_test_time_pool() -> nn.Module:
    return timm.layers.TestTimePoolHead(timm.create_model("resnet18"), original_pool=2)
