"""TF32: whether CUDA may compute float32 convolutions and matrix products with 10-bit mantissas.

Note [TF32]
    On GPUs since Ampere, cuDNN and cuBLAS can round the operands of float32 convolutions and matrix
    products to TF32, which has the mantissa of float16 and the range of float32. PyTorch allows it
    for convolutions by default. Then a layer declared float32 carries errors of float16's size: on
    an H100, folding batch norms into convolutions moved resnet50's values by up to 1e-3 of the
    largest magnitude, ten times what a compiled plan may differ in float32.

    So the server turns TF32 off unless it is requested. If it is on, compiled plans are compared
    with the eager model within the tolerance of TF32 instead of float32's.

    PyTorch keeps the setting for the whole process, so all models of a server share it.

Source: https://docs.pytorch.org/docs/stable/notes/cuda.html, "TensorFloat-32 (TF32) on Ampere (and
later) devices".
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["allow_tf32", "tf32_allowed"]


def allow_tf32(allowed: bool) -> None:
    """Allow or forbid TF32 for every CUDA device of the process.

    Args:
        allowed: True for TF32 in float32 convolutions, recurrent layers and matrix products; False
            for IEEE float32.
    """
    # PyTorch's older setters keep both of its interfaces consistent. After the newer ones, a model
    # that reads the older setting raises RuntimeError.
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed


def tf32_allowed() -> bool:
    """Report whether any float32 operation on CUDA may use TF32."""
    backends: Any = torch.backends
    operations = backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn
    return any(operation.fp32_precision == "tf32" for operation in operations)
