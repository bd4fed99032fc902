"""Where items come from: files, rows of arrays, texts, tar shards and Parquet."""

from layertap.dataset.sources.arrays import ArrayRows, NamedArrayRows
from layertap.dataset.sources.content import AudioContent, ImageContent
from layertap.dataset.sources.files import Files
from layertap.dataset.sources.gather import gather, joined
from layertap.dataset.sources.source import Joined, Part, Source
from layertap.dataset.sources.texts import TextItems, lines_of

__all__ = [
    "ArrayRows",
    "AudioContent",
    "Files",
    "ImageContent",
    "Joined",
    "NamedArrayRows",
    "Part",
    "Source",
    "TextItems",
    "gather",
    "joined",
    "lines_of",
]
