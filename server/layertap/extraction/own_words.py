"""Extracts the model's own error message for an input that it rejects."""

from __future__ import annotations

__all__ = ["compiler_words", "own_words"]

MOST = 300
"""Characters of a model's message that are passed on."""


def own_words(error: BaseException) -> str:
    """Return an exception's class and message in one line, without any trace.

    A TorchScript program's message has the trace of its code in front; the last line is what was
    raised there.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if any(line.startswith("Traceback") for line in lines):
        return _short(lines[-1])
    kind = type(error).__name__
    return _short(f"{kind}: {' '.join(lines)}" if lines else kind)


def compiler_words(error: BaseException) -> str:
    """Return the class and the first line of what a compiler raised.

    Behind it stand code, values and the names of files, which are nobody else's business.
    """
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    line = line.split(' File "')[0].rstrip(" :=")
    kind = type(error).__name__
    return _short(f"{kind}: {line}" if line else kind)


def _short(text: str) -> str:
    return text if len(text) <= MOST else f"{text[: MOST - 1]}…"
