"""Layers of whole data sets, written to files: resumable, in bounded memory.

``extract`` reads items from a `Source`, runs a model on them in this process or on a server, and
writes shards through a `Format`. A manifest says what the output was made of, so that the same call
continues where an interrupted one ended. Importing this package imports neither torch nor grpc.
"""

from layertap.dataset.run import Outcome, extract
from layertap.dataset.sources import Source, gather

__all__ = ["Outcome", "Source", "extract", "gather"]
