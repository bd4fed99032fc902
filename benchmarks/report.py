"""Writes README.md and its charts from whatever results there are.

Each benchmark calls ``write`` when it has saved its results; run as a program it does the same
without a benchmark.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
from sections import (
    branches,
    dataset,
    encode,
    extractors,
    first_runs,
    gpu_server,
    gradients,
    graphs,
    growth,
    hook,
    images,
    interventions,
    matrix,
    memory,
    packages,
    peers,
    plain_beside,
    races,
    ray_data,
    ray_serve,
    sentences,
    server,
    start,
    text,
    wire,
)

__all__ = ["write"]

Section = Callable[[dict[str, Any], Path], str]
"""Takes the results and where charts go, returns the text."""

TITLE = """# Benchmarks

`make bench` runs short versions of all benchmarks, and `make bench ARGS="--rounds 30"` longer ones.
Both write this page from [results](results); [cuda](cuda/README.md) and
[cuda_h200](cuda_h200/README.md) have the results for GPUs.
Times depend on the machine and its load, so quote the ratios, which are measured within one run.
Outputs are verified before timing.
"""

GPU_TITLE = """# Benchmarks on a GPU

`make bench-cuda PYTHON=python3` runs these benchmarks on a machine with a GPU and writes this page.
Quote the ratios, which are measured within one run. Outputs are verified before timing.
"""


def write(folder: Path = common.RESULTS) -> None:
    """Write the page and the charts of every benchmark that has results in the folder.

    The page stands beside this file, or in the folder where that is another than ``RESULTS``.
    """
    parts = [TITLE]
    for name, section in SECTIONS.items():
        if (results := common.load(name, folder)) is not None:
            parts.append(section(results, folder))
    page = "".join(parts)
    if folder == common.RESULTS:
        (common.HERE / "README.md").write_text(page, "utf-8")
    else:
        page = page.replace(TITLE, GPU_TITLE, 1).replace("](results/", "](")
        page = re.sub(r"\]\((bench_\w+\.py|\.\./docs/)", r"](../\1", page)
        (folder / "README.md").write_text(page, "utf-8")


SECTIONS: dict[str, Section] = {
    "extractors": extractors.section,
    "matrix": matrix.section,
    "matrix_tf32": matrix.section_tf32,
    "races": races.section,
    "packages": packages.section,
    "start": start.section,
    "first_runs": first_runs.section,
    "graphs": graphs.section,
    "server": server.section,
    "peers": peers.section,
    "gpu_server": gpu_server.section,
    "branches": branches.section,
    "text": text.section,
    "wire": wire.section,
    "encode": encode.section,
    "hook": hook.section,
    "gradients": gradients.section,
    "interventions": interventions.section,
    "plain_beside": plain_beside.section,
    "images": images.section,
    "memory": memory.section,
    "growth": growth.section,
    "sentences": sentences.section,
    "dataset": dataset.section,
    "ray_serve": ray_serve.section,
    "ray_data": ray_data.section,
}
"""The sections in the order of the page, by the name of their results."""


if __name__ == "__main__":
    write()
