"""A server's threads don't spin for long, unless its user wants them to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from layertap.cli.cores import SPINS, share_cores
from processes import serving


def test_the_spin_is_short_by_default() -> None:
    """Nothing said means the short spin."""
    environment: dict[str, str] = {}
    share_cores(environment)
    assert environment == {"GOMP_SPINCOUNT": SPINS}


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_what_the_user_says_is_kept(name: str) -> None:
    """Either of OpenMP's own settings wins."""
    environment = {name: "ACTIVE"}
    share_cores(environment)
    assert environment == {name: "ACTIVE"}


def test_it_is_set_before_pytorch_is_loaded() -> None:
    """In a real server the OpenMP that PyTorch brings says that it has read the setting."""
    script = (
        "import os, sys; from layertap.cli.cores import share_cores; share_cores(os.environ);"
        "assert 'torch' not in sys.modules; import torch"
    )
    shown = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env={**os.environ, "OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    if "GOMP_SPINCOUNT" not in shown.stderr:
        pytest.skip("this PyTorch's OpenMP is not GCC's")
    assert f"GOMP_SPINCOUNT = '{SPINS}'" in shown.stderr
    with serving("tinynets:residual", "--item-shape", "3,16,16") as server:
        assert server.address
        text = Path(f"/proc/{server.process.pid}/environ").read_bytes().decode()
        assert "GOMP_SPINCOUNT" not in text  # Set by the server itself, not handed to it.
