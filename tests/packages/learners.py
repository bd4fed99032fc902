"""fastai's models."""

from __future__ import annotations

from fastai.text.models.awdlstm import AWD_LSTM
from fastai.vision.models.unet import DynamicUnet
from fastai.vision.models.xresnet import xresnet18
from torch import nn
from torchvision.models import resnet18

from packages.subject import images, subject, tokens

pictures = subject((3, 64, 64), images(3, 64, 64), package="fastai")


@pictures
def dynamic_unet() -> nn.Module:
    body = nn.Sequential(*list(resnet18().children())[:-2])
    return DynamicUnet(body, 2, (64, 64))


@pictures
def xresnet() -> nn.Module:
    return xresnet18(n_out=3)


@pictures
def xresnet_attention() -> nn.Module:
    return xresnet18(n_out=3, sa=True)


@subject((12,), tokens(12, 99), package="fastai")
def awd_lstm() -> nn.Module:
    return AWD_LSTM(99, 16, 16, 2)
