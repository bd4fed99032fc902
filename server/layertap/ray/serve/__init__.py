"""Ray Serve: deployments that serve ``layertap.v1.FeatureService``. Needs ``layertap[ray]``.

Ray's proxies import this module too, and they have no PyTorch, so it is imported by replicas only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from layertap.ray.serve.proxy import add_to_server

if TYPE_CHECKING:
    from ray.serve import Application

__all__ = ["add_to_server", "app"]


def app(args: Mapping[str, Any]) -> Application:
    """Return the application of ``serve run layertap.ray.serve:app``; see docs/ray.md.

    Args:
        args: What to serve.

            - ``config``: The path of a ``layertap.toml``, which is read where this runs.
            - ``models``: Instead of a file, a ``[NAME=]SOURCE``, or a list of tables with the keys
              of ``[[models]]``; ``server`` and ``limits`` are tables as in the file.
            - ``direct``: Whether each replica also listens at the address of ``[server]``.
            - ``deployment``: A table of options of Ray's deployment, such as ``num_replicas``.

    Raises:
        ConfigError: If an argument is wrong.
    """
    from layertap.ray.serve.application import application

    return application(args)
