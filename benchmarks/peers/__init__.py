"""Servers that users would otherwise choose, all of which serve the same thing.

Each module is one server and its client. It has ``serve(threads, announce)``, which serves until
standard input ends and calls ``announce`` with its address, and ``connect(address)``, which yields
an ``Ask`` on a connection of its own. They run in environments of their own, by ``peers.ends``.
"""
