"""Shared memory, so that tensors reach a client on the same machine without the network.

There are two kinds, which are unrelated:

- The server's own regions (docs/shared_memory.md): anonymous files that the server makes, lends to
  a client for one reply or one input, and takes back. ``regions`` makes and maps them, ``pool``
  keeps them for reuse, ``leases`` records who may read which, and ``shared_memory`` lends them.
  ``packets`` is the protocol of the socket, ``broker`` the server's end of the socket and
  ``client_session`` the client's.
- The clients' regions of the Open Inference Protocol: files in ``/dev/shm`` that a client made and
  registers by name. ``client_regions`` reads and writes them.

Independent of PyTorch and gRPC.
"""
