"""How the server behaves on cores that it shares with others.

Note [Spinning]
    At the end of each parallel part of an operation a thread of an OpenMP team waits for the rest.
    GCC's OpenMP lets it spin for milliseconds first, which is best on cores of one's own. Where
    another process wants a core, a client on the same machine say, the spinning thread holds up the
    very thread that it waits for, at each of a hundred barriers a pass: resnet18's `layer1` took
    152 ms instead of 9 beside one busy process on two cores, and 21 ms with a short spin.
"""

from __future__ import annotations

from collections.abc import MutableMapping

__all__ = ["SPINS", "share_cores"]

SPINS = "3000"
"""Rounds of waiting before a thread goes to sleep: some microseconds. libgomp's own: 300,000."""


def share_cores(environment: MutableMapping[str, str]) -> None:
    """Have OpenMP's threads spin for a short time only, unless the user has said how they wait.

    Without effect once PyTorch is imported: its OpenMP reads the environment when it is loaded.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & environment.keys():
        environment["GOMP_SPINCOUNT"] = SPINS
