"""Bytes: the dtype table and messages with tensors, written and read in place."""
