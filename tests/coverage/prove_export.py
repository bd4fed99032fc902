"""Does EXPORT return what the module returned, for every layer of every model that it claims?

``make test-export`` asks that. A package takes a minute to many.
"""

from __future__ import annotations

import sys

from one_extractor import command

from layertap.engine.contest import Entrant
from layertap.selection import Extractor

__all__ = ["COMMAND", "ENTRANT", "HEADER"]

ENTRANT = Entrant(Extractor.EXPORT)

HEADER = """## Packages of EXPORT

Every layer of every model above, by EXPORT, held against cloning hooks within the tolerance for
compiled plans. All layers of a model are one package (several where their values are over 3 GiB)
that is compiled for any number of items and run with two. A server would refuse a package with a
wrong value, as it compares each one before it serves; here wrong values are counted. Random
weights, the smallest of a few input sizes that the model takes. `make test-export` writes this
section.

{groups}: {values} values compared, {right} layers right, **{wrong} wrong**.

*refused* are layers that the catalogue refuses, with the reason, and packages that could not be
built, for the reason that a request would be told.

"""

COMMAND = command("export", __doc__ or "", ENTRANT, HEADER)


if __name__ == "__main__":
    sys.exit(COMMAND.run())
