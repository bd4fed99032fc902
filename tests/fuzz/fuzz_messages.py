"""Fuzzes the whole decode path against upb; tools/fuzz.py starts it.

With atheris it is guided by the coverage of the Python code, in which the plain-Python decoder has
a branch for whatever the extension has one for: an input that takes the twin somewhere new is new
to the extension as well. Without atheris, which not every platform has, it changes the seeds at
random.

Arguments are libFuzzer's: ``-max_total_time=SECONDS``, ``-runs=COUNT``, ``-artifact_prefix=PREFIX``
and the folders of a corpus, the first of which takes what is found to be new. Files instead of
folders are replayed.
"""

from __future__ import annotations

import math
import sys
import time
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from random import Random

# Nothing of layertap is imported up here: atheris instruments modules as they are imported.


def by_coverage(arguments: list[str]) -> None:
    """Fuzz with atheris, which ends the process when it is done or has found something."""
    import atheris

    with atheris.instrument_imports(include=["layertap._pure", "layertap.wire"]):
        from differential import check
    from hostile import hostile_message, mutated

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        random = Random(seed)
        match random.randrange(8):
            case 0:
                return hostile_message(random)[:max_size]
            case 1 | 2 | 3 | 4:
                return mutated(random, data)[:max_size]
            case _:
                return bytes(atheris.Mutate(data, max_size))

    atheris.Setup([sys.argv[0], *arguments], check, custom_mutator=mutate)
    atheris.Fuzz()


def at_random(arguments: list[str]) -> None:
    """Fuzz without atheris; a finding is written to a file and raised."""
    from differential import check
    from hostile import mutated

    options = dict(a[1:].split("=", 1) for a in arguments if a.startswith("-"))
    folders = [Path(a) for a in arguments if not a.startswith("-")]
    corpus = [file.read_bytes() for folder in folders for file in sorted(folder.iterdir())]
    end = time.monotonic() + float(options.get("max_total_time", math.inf))
    random = Random()
    for done in count():
        if done >= float(options.get("runs", math.inf)) or time.monotonic() > end:
            break
        message = corpus[done] if done < len(corpus) else mutated(random, random.choice(corpus))
        try:
            check(message)
        except Exception:
            found = Path(options.get("artifact_prefix", "") + "crash-messages")
            found.write_bytes(message)
            print(f"Test unit written to {found}", file=sys.stderr)
            raise
    print(f"Done {done} runs", file=sys.stderr)


def replay(files: list[str]) -> None:
    """Check each file; the first disagreement is raised."""
    from differential import check

    for file in files:
        check(Path(file).read_bytes())
        print(f"{file}: read as upb reads it, or refused by a rule")


def main(arguments: list[str]) -> None:
    """Replay files, or fuzz with what is installed."""
    if arguments and all(Path(argument).is_file() for argument in arguments):
        replay(arguments)
    elif find_spec("atheris") is None:
        at_random(arguments)
    else:
        by_coverage(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
