"""Does TORCHSCRIPT with channels last return what the module returned, for every layer?

``make test-channels-last`` asks that of every model.
"""

from __future__ import annotations

import sys

from one_extractor import command

from layertap.engine.contest import Entrant
from layertap.extraction.kinds.torchscript import CHANNELS_LAST
from layertap.selection import Extractor

__all__ = ["COMMAND", "ENTRANT", "HEADER"]

ENTRANT = Entrant(Extractor.TORCHSCRIPT, CHANNELS_LAST)

HEADER = """## Programs with channels last

Every layer of every model above, by TORCHSCRIPT [with channels last](extraction.md#channels-last),
held against cloning hooks within the tolerance for compiled plans. All layers of a model are in one
program (several where their values are over 3 GiB), which is run with two items. A server would
refuse a program with a wrong value, as it compares each one before it serves; here wrong values are
counted. Random weights, the smallest of a few input sizes that the model takes.
`make test-channels-last` writes this section.

{groups}: {values} values compared, {right} layers right, **{wrong} wrong**.

*refused* are layers that the catalogue refuses, with the reason, and programs that could not be
built or that fail, as where code needs the usual layout. With random weights, the softmax in the
last attention of visformer_tiny is so steep that rounding decides: there plain PyTorch with
channels last differs from plain PyTorch by up to 2e-03, and its float32 from float64 by 5e-04.

"""

COMMAND = command("channels_last", __doc__ or "", ENTRANT, HEADER)


if __name__ == "__main__":
    sys.exit(COMMAND.run())
