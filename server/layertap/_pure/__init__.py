"""The plain-Python equivalent of ``layertap._core``: same functions, same results, same errors.

The extension is tested against it, and it is used where the extension could not be built.
``_core.pyi`` documents the functions; this implements them in the simplest way.
"""

from layertap._pure._build import ReplyBuilder, ReplyLayout, encode
from layertap._pure._decode import decode
from layertap._pure._images import image_values
from layertap._pure._memory import (
    keep_memory,
    malloc_usage,
    map_large_blocks,
    trim_memory,
)
from layertap._pure._raw import raw_layout, split
from layertap._pure._wire import MAX_MESSAGE_BYTES, MAX_RANK

__all__ = [
    "MAX_MESSAGE_BYTES",
    "MAX_RANK",
    "ReplyBuilder",
    "ReplyLayout",
    "decode",
    "encode",
    "image_values",
    "keep_memory",
    "malloc_usage",
    "map_large_blocks",
    "raw_layout",
    "split",
    "trim_memory",
]
