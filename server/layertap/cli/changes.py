"""``--set``: changes of a layer's values while the model runs, as texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from layertap.errors import InvalidInputError
from layertap.intervention import REPORT_PREFIX, Intervention, parse_interventions

if TYPE_CHECKING:
    import numpy as np

__all__ = ["changes_of", "described_changes", "set_option"]

F = TypeVar("F", bound=Callable[..., Any])


def set_option(function: F) -> F:
    """Add the flag ``--set`` to a command, whose texts are the argument ``changes``."""
    return click.option(
        "--set",
        "changes",
        multiple=True,
        metavar="LAYER[:input][:AXIS=INDICES]...:OPERATION",
        help="Change a layer's values while the model runs: layer4:channel=3:zero, "
        "layer1:y=0..8:scale=0.5, encoder.0:token=-1:add=2*@steer.npy. May be given several "
        "times; applied in order. See docs/interventions.md.",
    )(function)


def changes_of(texts: Sequence[str]) -> tuple[Intervention, ...]:
    """Return interventions; ``@FILE.npy`` in a text is an array in a file.

    Raises:
        InvalidInputError: A text or a file can't be read.
    """
    return parse_interventions([Intervention.parse(text, _array) for text in texts])


def described_changes(
    texts: Sequence[str], found: Mapping[str, np.ndarray[Any, np.dtype[Any]]]
) -> Iterator[str]:
    """Yield a line for each intervention: what it changed, as the reply reports it.

    Args:
        texts: The interventions.
        found: The tensors of the reply.
    """
    for index, text in enumerate(texts):
        calls, elements, changed = (
            int(found[f"{REPORT_PREFIX}{name}"][index]) for name in ("calls", "elements", "changed")
        )
        before, after = found[f"{REPORT_PREFIX}norm"][index].tolist()
        yield (
            f"{text}: {elements:,} elements in {calls} call{'s' * (calls != 1)}, "
            f"{changed:,} have another value now; their norm was {before:.4g} and is {after:.4g}"
        )


def _array(file: str) -> np.ndarray[Any, np.dtype[Any]]:
    import numpy as np

    try:
        array = np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"--set: {file}: can't be read as a .npy file: {error}") from None
    if not isinstance(array, np.ndarray):
        raise InvalidInputError(f"--set: {file}: got an archive, expected a single array in .npy")
    return array
