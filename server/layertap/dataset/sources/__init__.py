"""Where items come from: image files, rows of arrays, texts."""

from layertap.dataset.sources.arrays import ArrayRows, NamedArrayRows
from layertap.dataset.sources.gather import gather, joined
from layertap.dataset.sources.images import ImageFiles
from layertap.dataset.sources.source import Joined, Part, Source
from layertap.dataset.sources.texts import TextItems, lines_of

__all__ = [
    "ArrayRows",
    "ImageFiles",
    "Joined",
    "NamedArrayRows",
    "Part",
    "Source",
    "TextItems",
    "gather",
    "joined",
    "lines_of",
]
