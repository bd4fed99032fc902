"""The servicer of ``layertap.v1.AdminService``."""

from __future__ import annotations

from collections.abc import Callable

from layertap.services.caller import Caller
from layertap.services.methods import Methods, UnaryMethod
from layertap.services.parsing import parse
from layertap.services.reload_report import ReloadReport
from layertap.v1 import admin_service_pb2
from layertap.wire.enums import to_proto

__all__ = ["AdminService"]


class AdminService:
    """Administrative operations over gRPC.

    Args:
        reload: Reads the configuration and weights again; raises LayertapError on failure.
    """

    NAME = admin_service_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name

    def __init__(self, reload: Callable[[], ReloadReport]) -> None:
        self._reload = reload

    def reload(self, message: bytes, caller: Caller) -> bytes:
        """Reload the models and report the result for each of them."""
        parse(admin_service_pb2.ReloadRequest, message)
        return _to_proto(self._reload()).SerializeToString()

    def methods(self) -> Methods:
        """Return the methods by name."""
        return {"Reload": UnaryMethod(self.reload, to_owner=True)}


def _to_proto(report: ReloadReport) -> admin_service_pb2.ReloadResponse:
    return admin_service_pb2.ReloadResponse(
        models=[
            admin_service_pb2.ModelReload(
                name=model.name,
                action=to_proto(model.action, "RELOAD_ACTION"),
                reason=model.reason,
                serving=model.serving,
            )
            for model in report.models
        ],
        not_applied=report.not_applied,
    )
