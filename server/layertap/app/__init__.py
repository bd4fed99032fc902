"""The server's life: configuration, start, health, warm-up, drain."""
