"""Shared memory between a server and clients on its machine; docs/shared_memory.md.

``regions`` makes and maps the memory, ``packets`` are what the socket carries, ``pool`` keeps
regions for reuse, ``leases`` says who may read which, ``broker`` is the server's end of the socket,
``connection`` the client's.
"""
