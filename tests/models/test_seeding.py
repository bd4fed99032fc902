from __future__ import annotations

import threading
from contextlib import suppress

import torch

from layertap.models.seeding import seeded


def test_same_seed_same_numbers() -> None:
    """The numbers in the block depend only on the seed."""
    draws = []
    for seed in (5, 5, 6):
        torch.rand(3)
        with seeded(seed):
            draws.append(torch.rand(4))

    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_the_global_state_is_untouched_even_by_an_exception() -> None:
    """The process's generator continues as if the block had not run."""
    before = torch.get_rng_state()

    with suppress(KeyError), seeded(0):
        torch.rand(10)
        raise KeyError

    assert torch.equal(torch.get_rng_state(), before)


def test_blocks_on_two_threads_do_not_mix() -> None:
    """A block waits for another thread's block, so each draws its own sequence."""
    entered, release = threading.Event(), threading.Event()
    drawn: list[torch.Tensor] = []

    def other() -> None:
        with seeded(1):
            entered.set()
            release.wait(10)
            drawn.append(torch.rand(4))

    def late() -> None:
        with seeded(2):
            torch.rand(4)

    first = threading.Thread(target=other)
    first.start()
    assert entered.wait(10)
    second = threading.Thread(target=late)
    second.start()
    second.join(0.05)
    assert second.is_alive()
    release.set()
    first.join(10)
    second.join(10)

    with seeded(1):
        assert torch.equal(drawn[0], torch.rand(4))
