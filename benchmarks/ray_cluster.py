"""A local Ray cluster for benchmarks."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["cluster"]


@contextmanager
def cluster(cores: int) -> Iterator[None]:
    """Run a cluster of our own; Ray does not look how many cores there really are."""
    import ray

    with tempfile.TemporaryDirectory(prefix="layertap-ray-", ignore_cleanup_errors=True) as folder:
        ray.init(
            address="local",
            num_cpus=cores,
            include_dashboard=False,
            object_store_memory=1 << 30,
            logging_level=logging.ERROR,
            log_to_driver=False,
            _temp_dir=folder,
        )
        try:
            yield
        finally:
            ray.shutdown()
