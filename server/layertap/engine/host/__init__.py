"""What answers the requests of one model; docs/architecture.md has a picture of the parts."""

from layertap.engine.host.model_host import ModelHost, RefusedPlan

__all__ = ["ModelHost", "RefusedPlan"]
