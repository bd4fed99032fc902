"""What the C++ extension does: the codec, images and malloc; plain Python if it was not built."""

from __future__ import annotations

import warnings

__all__ = [
    "ACCELERATED",
    "MAX_MESSAGE_BYTES",
    "MAX_RANK",
    "ReplyBuilder",
    "ReplyLayout",
    "decode",
    "encode",
    "image_values",
    "malloc_usage",
    "map_large_blocks",
    "raw_layout",
    "set_malloc_bound",
    "split",
    "trim_memory",
]

try:
    from layertap import _core as _codec
except ImportError as error:
    from layertap import _pure as _codec  # type: ignore[no-redef]

    ACCELERATED: bool = False
    """Whether the C++ extension is used."""

    warnings.warn(
        f"the C++ extension is missing ({error}); "
        f"plain Python encodes and decodes instead, more slowly and holding the GIL",
        RuntimeWarning,
        stacklevel=2,
    )
else:
    ACCELERATED = True

MAX_MESSAGE_BYTES = _codec.MAX_MESSAGE_BYTES
MAX_RANK = _codec.MAX_RANK
ReplyBuilder = _codec.ReplyBuilder
ReplyLayout = _codec.ReplyLayout
decode = _codec.decode
encode = _codec.encode
image_values = _codec.image_values
malloc_usage = _codec.malloc_usage
map_large_blocks = _codec.map_large_blocks
raw_layout = _codec.raw_layout
set_malloc_bound = _codec.keep_memory
split = _codec.split
trim_memory = _codec.trim_memory
