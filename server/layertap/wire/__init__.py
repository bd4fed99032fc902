"""The wire format: the dtype table, and messages with tensors, read and written in place."""
