"""Networks of the examples, without what makes them slow to load in a test."""

from __future__ import annotations

import torchvision
from torch import nn

__all__ = ["resnet10", "vgg16_bn"]


def resnet10() -> nn.Module:
    """Return a resnet18 with one block in each stage, which loads in half the time."""
    block = torchvision.models.resnet.BasicBlock
    return torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=10).eval()


def vgg16_bn() -> nn.Module:
    """Return vgg16_bn with its layers up to the classifier, which is one layer here.

    The classifier's 120 million weights take most of the time to make and to compare.
    """
    net = torchvision.models.vgg16_bn(init_weights=False, num_classes=10)
    net.classifier = nn.Linear(512 * 7 * 7, 10)
    return net.eval()
