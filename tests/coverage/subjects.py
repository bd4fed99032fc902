"""The models under proof: torchvision's, and one of each of timm's families that fit."""

from __future__ import annotations

import torchvision

__all__ = ["TIMM", "every_model", "torchvision_models"]

TIMM = (
    "beit_base_patch16_224", "botnet26t_256", "cait_xxs24_224", "coat_lite_tiny",
    "coatnet_nano_rw_224", "convit_tiny", "convmixer_768_32", "convnext_atto",
    "crossvit_9_240", "cs3darknet_s",
    "davit_tiny", "deit3_small_patch16_224", "dla46_c", "dpn48b", "edgenext_xx_small",
    "efficientformer_l1", "efficientformerv2_s0", "efficientvit_b0", "efficientvit_m0",
    "ese_vovnet19b_dw", "eva02_tiny_patch14_224", "fasternet_t0", "fastvit_t8", "focalnet_tiny_srf",
    "gcvit_xxtiny", "ghostnet_050", "hardcorenas_a", "hgnetv2_b0", "hiera_tiny_224",
    "hrnet_w18_small", "inception_next_atto", "lcnet_050", "legacy_seresnet18", "levit_128s",
    "mambaout_femto", "mixer_s32_224", "mixnet_s", "mobilevit_xxs", "mvitv2_tiny", "nest_tiny",
    "nf_regnet_b0", "pit_ti_224", "poolformer_s12", "pvt_v2_b0", "rdnet_tiny", "regnety_002",
    "repghostnet_050", "repvit_m0_9", "res2net50d", "resnest14d", "resnetv2_50", "rexnet_100",
    "selecsls42", "sequencer2d_s", "shvit_s1", "skresnet18", "starnet_s1", "swiftformer_xs",
    "swin_tiny_patch4_window7_224", "swinv2_cr_tiny_224", "tiny_vit_5m_224", "tnt_s_patch16_224",
    "twins_pcpvt_small", "visformer_tiny", "vit_tiny_patch16_224", "volo_d1_224", "xception41",
    "xcit_nano_12_p16_224",
)  # fmt: skip
"""One small model of each of 68 families of timm."""


def torchvision_models() -> list[str]:
    """Return every float builder of torchvision that takes one input, by kind."""
    names: list[str] = []
    kinds = (
        torchvision.models, torchvision.models.segmentation, torchvision.models.video,
        torchvision.models.detection,
    )  # fmt: skip
    for kind in kinds:
        names += torchvision.models.list_models(module=kind)
    return names


def every_model() -> list[str]:
    """Return the sources of all models under proof."""
    return [*torchvision_models(), *(f"timm:{name}" for name in TIMM)]
