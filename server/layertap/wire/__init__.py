"""Bytes: the dtype table, messages written and read in place, the allocator."""
