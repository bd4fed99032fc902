"""Models of public packages, each group in an environment of its own: ``make test-packages``."""
