"""Shortens the errors of models and compilers for messages to clients."""

from __future__ import annotations

__all__ = ["compiler_words", "own_words"]

MAX_CHARACTERS = 300
"""Maximum length of a message in characters."""


def own_words(error: BaseException) -> str:
    """Return an exception's class and message in one line, without a traceback.

    The message of a TorchScript program begins with the traceback of its code; the last line is
    the error that was raised there.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if any(line.startswith("Traceback") for line in lines):
        return _short(lines[-1])
    kind = type(error).__name__
    return _short(f"{kind}: {' '.join(lines)}" if lines else kind)


def compiler_words(error: BaseException) -> str:
    """Return the class and the first line of a compiler's error.

    The rest has code, values and file names, which other people should not see.
    """
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    line = line.split(' File "')[0].rstrip(" :=")
    kind = type(error).__name__
    return _short(f"{kind}: {line}" if line else kind)


def _short(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[: MAX_CHARACTERS - 1]}…"
