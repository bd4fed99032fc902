"""The sizes of the inputs' free dimensions, by their names."""

from __future__ import annotations

from collections.abc import Mapping

from layertap.models.batch import BatchKey
from layertap.models.signature import Signature

__all__ = ["free_sizes", "resized"]


def free_sizes(signature: Signature, key: BatchKey) -> dict[str, int] | None:
    """Return the size of each named free dimension of a batch.

    Args:
        signature: The inputs that the model takes.
        key: The inputs and item shapes of a batch.

    Returns:
        Sizes by name; None if dimensions of one name have several sizes, so that the name says
        nothing.
    """
    specs = {spec.name: spec for spec in signature.inputs}
    sizes: dict[str, int] = {}
    for item in key.items:
        for size, (_, name) in zip(item.shape, specs[item.name].dimensions, strict=True):
            if name and sizes.setdefault(name, size) != size:
                return None
    return sizes


def resized(signature: Signature, key: BatchKey, sizes: Mapping[str, int]) -> BatchKey:
    """Return the key of batches of the same inputs with other sizes of their free dimensions."""
    specs = {spec.name: spec for spec in signature.inputs}
    return BatchKey(
        tuple(
            item._replace(
                shape=tuple(
                    sizes.get(name, size) if name else size
                    for size, (_, name) in zip(item.shape, specs[item.name].dimensions, strict=True)
                )
            )
            for item in key.items
        )
    )
