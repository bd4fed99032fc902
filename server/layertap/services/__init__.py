"""The servicers: convert, engine, convert; and the one map of errors to status codes."""
