"""The wire format: the dtype table, and messages whose tensors are read and written in place."""
