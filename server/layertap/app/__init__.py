"""The server process: configuration, start, health, warm-up and drain."""
