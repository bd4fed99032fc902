"""Shared fixtures."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile

# Before torch is imported, and for the servers that tests start. Their callers are busy on the same
# cores, where teams of OpenMP threads wait for one another (docs/performance.md).
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test may ask the hub of Hugging Face for anything; its client reads this at its import.
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" not in os.environ:
    # A cache for this run only, which all its processes share; see kept.py.
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="layertap-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

from collections.abc import Callable

import pytest
import torch

from layertap.extraction.tf32 import tf32_allowed
from layertap.models import LoadedModel, ModelSpec, load_model
from tinynets import ITEM

TF32_AT_FIRST = tf32_allowed()
LoadNet = Callable[[str], LoadedModel]

LONGEST = (
    *(
        "extraction/test_export.py",
        "zoo/test_zoo.py",
        "engine/test_sharing.py",
        "soak/test_soak.py",
    ),
    *("test_readme.py", "coverage/test_prove.py", "chaos/test_chaos.py"),
    *("engine/test_optional_inputs.py", "services/test_audio.py", "models/test_hf_source.py"),
    *("services/test_mission.py", "dataset/test_resume.py", "engine/test_stateful_models.py"),
    *("engine/test_promotion.py", "extraction/test_claims.py"),
    *("extraction/test_hazards.py", "app/test_reload.py", "extraction/test_padding.py"),
    *("engine/test_versions.py", "extraction/test_gradients_of_models.py", "engine/test_work.py"),
    *("extraction/test_several_inputs.py", "engine/test_lengths.py", "engine/test_engine.py"),
    *("cli/test_extract.py", "app/test_lifecycle.py", "engine/test_outcomes.py"),
    *("engine/test_towers.py", "extraction/test_sixth_kind.py", "test_architecture.py"),
    *("test_mutants.py", "app/test_full_disk.py", "services/test_extract_stream.py"),
    *("test_security_docs.py", "models/test_hf_inputs.py", "app/test_logs.py"),
    *("engine/test_memory.py", "app/test_no_more_threads.py", "local/test_imports.py"),
    *("test_recipes.py", "test_ray_data.py", "test_bench_peers.py"),
)
"""Files that take longest. One of them begun last would keep one process busy alone."""


def pytest_collection_finish() -> None:
    """Let the garbage collector skip what is imported by now, and look at the rest less often.

    Each full collection took a third of a second before, and all of them still 5 % of all tests.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 20, 20)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slowest files if several processes share the files."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        ranks = {f"tests/{file}": rank for rank, file in enumerate(LONGEST)}
        items.sort(key=lambda item: ranks.get(item.nodeid.partition("::")[0], len(ranks)))


@pytest.fixture
def load_net() -> LoadNet:
    """Load one of the nets of ``tinynets`` by its factory's name."""

    def load(factory: str) -> LoadedModel:
        return load_model(ModelSpec(f"tinynets:{factory}", item_shape=ITEM), "cpu")

    return load


@pytest.fixture
def tf32_at_first() -> bool:
    """Whether PyTorch allows TF32 before anybody has set anything."""
    return TF32_AT_FIRST


@pytest.fixture(autouse=True)
def _no_gradients() -> object:
    """Run every test like a compute thread runs models."""
    with torch.inference_mode():
        yield
