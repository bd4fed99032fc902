"""The servicers: they convert messages, call the engine, and map errors to status codes."""
