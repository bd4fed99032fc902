"""Start a layertap server, ask it for layers from another process, stop it: `make demo`."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from layertap import Client

CLIENT = Path(__file__).with_name("client.py")
ADDRESS = re.compile(r"serving .+ on (\S+)$")
SERVE = [
    *("serve", "resnet18", "--weights", "random", "--layers", "layer1,avgpool"),
    *("--port", "0", "--metrics-port", "-1"),
]
STOP_SECONDS = 30


@contextmanager
def server() -> Iterator[str]:
    """Run a server on a free port; yields its address."""
    command = [sys.executable, "-m", "layertap", *SERVE]
    print(f"$ layertap {' '.join(SERVE)}", flush=True)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield address_of(process)
    finally:
        process.terminate()
        _, rest = process.communicate(timeout=STOP_SECONDS)
        print(rest, end="", flush=True)
    if process.returncode:
        sys.exit(f"the server ended with code {process.returncode}")


def address_of(process: subprocess.Popen[str]) -> str:
    """Read what the server says until it says where it listens."""
    assert process.stderr is not None
    for line in process.stderr:
        print(line, end="", flush=True)
        if found := ADDRESS.search(line):
            return found[1]
    sys.exit("the server ended before it was ready")


def main() -> None:
    """Show it all."""
    print(
        "Weights are random, from a fixed seed: nothing is downloaded, and shapes and times are\n"
        "the same. Real ones: leave out `--weights random`, or name a file with `--weights`.\n"
    )
    with server() as address:
        with Client(address) as client:
            client.wait_ready()
        print(f"\n$ python {CLIENT.name} {address}", flush=True)
        subprocess.run([sys.executable, str(CLIENT), address], check=True)


if __name__ == "__main__":
    main()
