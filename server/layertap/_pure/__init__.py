"""The plain-Python twin of ``layertap._core``: same functions, same results, same errors.

It is the oracle that the extension is tested against, and takes its place where there was no
compiler. ``_core.pyi`` documents the functions; here stands how they can be done most plainly.
"""

from layertap._pure._build import ReplyBuilder, ReplyLayout, encode
from layertap._pure._decode import decode
from layertap._pure._memory import keep_memory, malloc_usage, trim_memory
from layertap._pure._raw import raw_layout, split
from layertap._pure._wire import MAX_MESSAGE_BYTES, MAX_RANK

__all__ = [
    "MAX_MESSAGE_BYTES",
    "MAX_RANK",
    "ReplyBuilder",
    "ReplyLayout",
    "decode",
    "encode",
    "keep_memory",
    "malloc_usage",
    "raw_layout",
    "split",
    "trim_memory",
]
