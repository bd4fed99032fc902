"""Ray's local cluster with Ray Serve and its gRPC proxy, for tests and checks."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import serve

from ports import free_port

__all__ = ["local_cluster", "replicas", "serving"]

# Ray kills a proxy that is not ready within 5 seconds, which a busy machine takes to start it.
PATIENCE = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120"}


@contextmanager
def local_cluster(cores: int = 8) -> Iterator[None]:
    """Run a cluster of our own; Ray does not look how many cores there really are."""
    with tempfile.TemporaryDirectory(prefix="layertap-ray-", ignore_cleanup_errors=True) as folder:
        os.environ.update(PATIENCE)
        ray.init(
            address="local",
            num_cpus=cores,
            include_dashboard=False,
            object_store_memory=200 << 20,
            logging_level="ERROR",
            log_to_driver=False,
            _temp_dir=folder,
            runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}},
        )
        try:
            yield
        finally:
            ray.shutdown()
            for name in PATIENCE:
                os.environ.pop(name, None)


@contextmanager
def serving() -> Iterator[str]:
    """Run Ray Serve in the cluster; yield the address of the gRPC proxy."""
    port = free_port()
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": "127.0.0.1", "port": free_port()},
        grpc_options={
            "port": port,
            "grpc_servicer_functions": ["layertap.ray.serve.add_to_server"],
        },
    )
    try:
        yield f"127.0.0.1:{port}"
    finally:
        serve.shutdown()


def replicas(application: str = "default") -> dict[str, Any]:
    """Return the handles of an application's replicas by name."""
    found = [
        each["name"]
        for each in ray.util.list_named_actors(all_namespaces=True)
        if each["namespace"] == "serve"
        and each["name"].startswith(f"SERVE_REPLICA::{application}#")
    ]
    return {name: ray.get_actor(name, namespace="serve") for name in found}
