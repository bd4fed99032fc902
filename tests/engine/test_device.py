"""Devices by name, on a machine that may have no GPU."""

from __future__ import annotations

import pytest
import torch

from layertap.engine import choose_device
from layertap.errors import ConfigError

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0


def test_auto_is_the_gpu_where_there_is_one() -> None:
    """Without a GPU it is the CPU, which may always be named."""
    assert choose_device("auto") == ("cuda" if GPUS else "cpu")
    assert choose_device("cpu") == "cpu"


def test_a_gpu_that_is_not_here_is_refused() -> None:
    """The message lists the existing devices."""
    with pytest.raises(ConfigError, match=f"got 'cuda:{GPUS}', "):
        choose_device(f"cuda:{GPUS}")


@pytest.mark.parametrize("device", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "CUDA"])
def test_other_names_are_refused(device) -> None:
    """An unknown name is an error."""
    with pytest.raises(ConfigError, match="expected 'auto', 'cpu', 'cuda' or 'cuda:1'"):
        choose_device(device)
