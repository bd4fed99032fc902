"""The memory of a model is freed when the model is unloaded."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from layertap import Extractor, LayerSelection, errors
from layertap.engine import Call, Engine, ExtractionRequest, Inputs
from layertap.models import ModelSpec
from layertap.services.native_form import NativeForm
from layertap.wire.dtypes import of_array
from layertap.wire.tensors import TensorView
from tinynets import ITEM

ROUNDS, SETTLED = 12, 4
WEIGHTS_MIB = (768 * 4096 + 4096 * 8) * 4 / 2**20
LAYER = LayerSelection("wide")


def resident_mib() -> float:
    """Return the memory of this process that is in RAM."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096 / 2**20


def infer(engine: Engine) -> None:
    x = np.random.default_rng(0).random((4, *ITEM), dtype=np.float32)
    view = TensorView("", of_array(x), x.shape, memoryview(x.tobytes()))
    for extractor in (Extractor.TORCHSCRIPT, Extractor.HOOK, Extractor.FX):
        request = ExtractionRequest("heavy", Inputs((view,)), (LAYER,), extractor, form=NativeForm)
        engine.extract(request, Call())


@pytest.mark.long
def test_memory_levels_off_while_models_come_and_go(capsys) -> None:
    """Load, infer, unload, often: from some time on not a fifth of the loaded weights stays."""
    engine = Engine()
    resident = []
    for _ in range(ROUNDS):
        engine.load(ModelSpec("tinynets:heavy", item_shape=ITEM), [LAYER])
        infer(engine)
        engine.unload("heavy")
        resident.append(resident_mib())
    engine.close()
    figures = ", ".join(f"{n}: {resident[n - 1]:.0f}" for n in (1, 2, SETTLED, 8, ROUNDS))
    with capsys.disabled():
        sys.stdout.write(f"\nMiB resident after n models of {WEIGHTS_MIB:.0f} MiB: {figures}\n")
    # Where a block lands is malloc's choice, and may cost one model's weights more at any time.
    assert resident[-1] - resident[SETTLED - 1] < WEIGHTS_MIB * (ROUNDS - SETTLED) / 5


def test_an_unloaded_model_is_unknown() -> None:
    """An unloaded model is not served, and its name is free again."""
    engine = Engine()
    spec = ModelSpec("tinynets:heavy", item_shape=ITEM)
    host = engine.load(spec)
    engine.unload("heavy")
    assert not any(module._forward_hooks for module in host.model.module.modules())
    with pytest.raises(errors.ModelNotFoundError, match="'heavy', served models: none"):
        engine.unload("heavy")
    engine.load(spec)
    infer(engine)
    engine.close()
