"""Values of one pass that are kept to compare other passes with, in bounded memory.

Note [Values that are not kept whole]
    All values of all layers of a large model take several times the memory of its weights: 3 GB for
    one image in efficientnet_v2_l, whose weights take half a GB. So whole values are kept up to
    ``WHOLE_BYTES``. Of any further value a digest is kept: its shape and dtype, a checksum of all
    of its elements, and some of the elements. The checksum tells whether another value is equal.
    How far two values differ is measured on these elements.

    The checksum is the sum of all elements' bits, each times a random number that belongs to the
    place in the value, modulo 2^64: two different values have the same one by a chance of less than
    1 in 2^31.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from layertap.extraction.digest import Digest
from layertap.extraction.verify import difference, same

__all__ = ["KeptValue", "KeptValues"]

WHOLE_BYTES = 32 << 20
"""Bytes of values that are kept whole, for each pass."""

SAMPLED = 4096
"""Elements that are kept of any other value."""

SMALL = 4 * SAMPLED
"""Values of so many elements are kept whole in any case."""

_PIECE = 1 << 16
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class KeptValue:
    """One value, or what is kept of it.

    Attributes:
        whole: A copy of the value; None if only the digest is kept.
        digest: The digest; None if the value is kept whole.
        checksum: With a digest: the checksum of the whole value.
        finite: Whether all of its elements are finite.
    """

    whole: torch.Tensor | None
    digest: Digest | None
    checksum: int
    finite: bool

    def same(self, value: torch.Tensor) -> bool:
        """Return whether a value equals the kept one in shape, dtype and every element."""
        if self.whole is not None:
            return same(value, self.whole)
        return self._fits(value) and _checksum(value) == self.checksum

    def difference(self, value: torch.Tensor) -> float:
        """Return how far a value is from the kept one; see ``verify.difference``."""
        if self.whole is not None:
            return difference(value, self.whole)
        digest = self.digest
        if digest is None or not self._fits(value):
            return float("inf")
        return difference(value.reshape(-1)[:: digest.step], digest.elements)

    def equals(self, other: KeptValue) -> bool:
        """Return whether two kept values are equal."""
        if self.whole is not None and other.whole is not None:
            return same(self.whole, other.whole)
        if self.whole is not None:
            return other.same(self.whole)
        return other.same_digest(self) if other.whole is None else self.same(other.whole)

    def same_digest(self, other: KeptValue) -> bool:
        """Return whether two values of which digests are kept are equal."""
        mine, theirs = self.digest, other.digest
        return (
            mine is not None
            and theirs is not None
            and (mine.shape, mine.elements.dtype) == (theirs.shape, theirs.elements.dtype)
            and self.checksum == other.checksum
        )

    def _fits(self, value: torch.Tensor) -> bool:
        digest = self.digest
        return (
            digest is not None
            and tuple(value.shape) == digest.shape
            and value.dtype == digest.elements.dtype
        )


class KeptValues:
    """Keeps values, the first ones whole; see Note [Values that are not kept whole]."""

    def __init__(self) -> None:
        self._left = WHOLE_BYTES

    def keep(self, value: torch.Tensor) -> KeptValue:
        """Return a value to keep; it copies what it needs."""
        finite = bool(value.isfinite().all())
        if value.numel() <= SMALL or value.nbytes <= self._left or not _has_bits(value):
            self._left -= value.nbytes
            return KeptValue(value.clone(), None, 0, finite)
        step = max(1, value.numel() // SAMPLED) | 1  # Odd, as most sizes are even.
        return KeptValue(None, Digest.of(value, step), _checksum(value), finite)


def _has_bits(value: torch.Tensor) -> bool:
    return value.dtype.itemsize in _BITS and not value.is_complex()


def _checksum(value: torch.Tensor) -> int:
    total = 0
    flat = value.reshape(-1)
    for number, piece in enumerate(flat.split(_PIECE)):
        # Adding zero makes -0.0 the same as 0.0, as they are equal.
        plain = piece + 0 if piece.is_floating_point() and piece.dtype.itemsize > 1 else piece
        bits = plain.contiguous().view(_BITS[plain.dtype.itemsize]).to(torch.int64)
        weights = _weights(value.device)[: len(bits)]
        # Each piece has factors of its own.
        total += (2 * number + 1) * int((bits * weights).sum())
    return total % 2**64


_made: dict[torch.device, torch.Tensor] = {}


def _weights(device: torch.device) -> torch.Tensor:
    """Return random odd numbers, one for each place in a piece, the same in every process."""
    if device not in _made:
        generator = torch.Generator().manual_seed(0)
        numbers = torch.randint(-(2**62), 2**62, (_PIECE,), generator=generator, dtype=torch.int64)
        _made[device] = (2 * numbers + 1).to(device)
    return _made[device]
