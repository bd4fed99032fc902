"""The engine: models, plans and compute threads, independent of any transport."""

from layertap.call import Call
from layertap.engine.admission import Reservation
from layertap.engine.batch import AudioFiles, ImageFiles, Inputs, TextBatch
from layertap.engine.describe import describe, summarize
from layertap.engine.device import choose_device
from layertap.engine.engine import Engine
from layertap.engine.host import ModelHost
from layertap.engine.pipeline import Extraction, ExtractionRequest
from layertap.engine.sent_spec import sent_spec
from layertap.engine.tensor_form import TensorForm
from layertap.extraction.tf32 import allow_tf32
from layertap.settings import HostOptions, Limits

__all__ = [
    "AudioFiles",
    "Call",
    "Engine",
    "Extraction",
    "ExtractionRequest",
    "HostOptions",
    "ImageFiles",
    "Inputs",
    "Limits",
    "ModelHost",
    "Reservation",
    "TensorForm",
    "TextBatch",
    "allow_tf32",
    "choose_device",
    "describe",
    "sent_spec",
    "summarize",
]
