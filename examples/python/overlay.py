"""Draw a class activation map over a generated image: overlay.py [FILE.png].

It makes the picture in docs/gradients.md. The network is written by hand, so that anyone can see
what the map should be: its score is the amount of orange less the amount of blue.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

import layertap

SIDE = 192
PICTURE = Path(__file__).resolve().parents[2] / "docs" / "gradients_overlay.png"


class Colours(nn.Module):
    """Scores ``[B, 1]`` of images ``[B, 3, H, W]`` with values from 0 to 1."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = nn.AvgPool2d(12)
        self.find = nn.Conv2d(3, 2, 1)
        self.act = nn.ReLU(inplace=True)
        self.score = nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            # Red without blue, and blue without red.
            self.find.weight.copy_(
                torch.tensor([[1.0, 0.5, -2.0], [-2.0, 0.5, 1.0]])[:, :, None, None]
            )
            self.find.bias.fill_(-0.2)  # type: ignore[union-attr] # there is one
            self.score.weight.copy_(torch.tensor([[1.0, -1.0]]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the scores."""
        return self.score(self.act(self.find(self.cut(x))).mean((2, 3)))


def image() -> Image.Image:
    """Return an orange disc and a blue square on gray that grows lighter."""
    gray = np.linspace(70, 190, SIDE).astype(np.uint8)
    made = Image.fromarray(np.broadcast_to(gray[None, :, None], (SIDE, SIDE, 3)).copy())
    draw = ImageDraw.Draw(made)
    draw.ellipse((24, 30, 94, 100), fill=(240, 140, 20))
    draw.rectangle((110, 104, 168, 162), fill=(30, 110, 235))
    return made


def main() -> None:
    """Write the image and its overlay, side by side."""
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE
    encoded = io.BytesIO()
    image().save(encoded, "PNG")
    with layertap.load(
        f"{__name__}:Colours",
        item_shape=(3, SIDE, SIDE),
        image_resize=[SIDE],
        image_crop=[SIDE],
        image_mean=[0.0, 0.0, 0.0],
        image_std=[1.0, 1.0, 1.0],
        device="cpu",
    ) as model:
        found = model.extract(
            encoded.getvalue(), "act:grad_cam:map=overlay=over", objective="score[0]"
        )
    both = np.concatenate([np.asarray(image()), found["over"].numpy()[0]], axis=1)
    Image.fromarray(both).save(file, optimize=True)
    print(f"{file}: score {float(found['objective.value'][0]):.3f}")


if __name__ == "__main__":
    main()
