"""One model of a server: what to load and how to serve it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from layertap.errors import ConfigError
from layertap.selection import LayerSelection
from layertap.settings import value_kinds as kinds
from layertap.settings.batch_policy import ALONE, BatchPolicy
from layertap.settings.definition import NO_FLAG, Setting
from layertap.settings.model_spec import ModelSpec

__all__ = ["HostOptions", "ServedModel"]


@dataclass(frozen=True, slots=True)
class HostOptions:
    """How a model is served."""

    require_finite: Annotated[
        bool,
        Setting(
            "Fail a request whose layers hold NaN or infinity, instead of sending them as they "
            "are.",
            kinds.TRUTH,
            flag=NO_FLAG,
        ),
    ] = False
    batching: BatchPolicy = ALONE
    cuda_graphs: Annotated[
        tuple[int, ...],
        Setting(
            "Batch sizes at which a CUDA graph serves the declared layers, if their pass can be "
            "recorded; no effect on a CPU.",
            kinds.BATCH_SIZES,
            flag=NO_FLAG,
        ),
    ] = ()
    race: Annotated[
        bool,
        Setting(
            "Let AUTO change from a compiled program to another extractor, or to another way to "
            "finish the program, that was measured to be faster on this machine, while requests "
            "are served.",
            kinds.TRUTH,
            flag=NO_FLAG,
        ),
    ] = True


@dataclass(frozen=True, slots=True)
class ServedModel:
    """``[[models]]``: a model, the layers to compile at the start, and how it is served.

    Attributes:
        spec: The model to load.
    """

    spec: ModelSpec
    layers: Annotated[
        tuple[LayerSelection, ...],
        Setting(
            "Layers to compile and warm before the server is ready; clients may request any other "
            "layer as well.",
            kinds.LAYERS,
        ),
    ] = ()
    device: Annotated[
        str,
        Setting(
            "What the model runs on, as in [server].",
            kinds.DEVICE,
            flag=NO_FLAG,
            default="the server's",
        ),
    ] = ""
    options: HostOptions = field(default_factory=HostOptions)

    @property
    def name(self) -> str:
        """The name that requests use."""
        return self.spec.name

    def check(self) -> None:
        """Raise ConfigError if settings contradict each other."""
        graphs = self.options.cuda_graphs
        if graphs and not self.layers:
            raise ConfigError(
                f"cuda_graphs of {self.name}: got {list(graphs)} without layers; expected the "
                f"layers whose passes are to be recorded"
            )
