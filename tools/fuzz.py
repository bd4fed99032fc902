"""Fuzz the decoder for a while: its C++ core for memory safety, then the whole path against upb.

Run it by ``make fuzz``. Both fuzzers read the messages in ``tests/fuzz/corpus`` and keep what else
they find interesting under ``build/fuzz``, so that a later run goes on from there. What is wrong is
written to ``build/fuzz/found``, and the command that replays it is printed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
BUILD = Path("build") / "fuzz"
FOUND = BUILD / "found"
SEEDS = Path("tests") / "fuzz" / "corpus"
DECODER = BUILD / "decoder"
MESSAGES = Path("tests") / "fuzz" / "fuzz_messages.py"

SOURCES = ["csrc/fuzz/fuzz_decoder.cpp", "csrc/decoder.cpp", "csrc/wire.cpp"]
FLAGS = ["-std=c++17", "-g", "-O2", "-Wall", "-Wextra", "-fno-sanitize-recover=all"]
WITH_LIBFUZZER = ["-fsanitize=fuzzer,address,undefined"]
WITHOUT_LIBFUZZER = ["-fsanitize=address,undefined", "csrc/fuzz/mutate.cpp"]

# A seed of a bool tensor is longer than the block by which the decoder looks at one.
MAX_LENGTH = 8192
# Seconds for one input. What hangs does so at any limit, and a short one takes a machine that
# stands still for a while, as shared ones do, for a finding.
HANGS = 300

FINDING = re.compile(
    r"runtime error:|broke its promise|ERROR: |Uncaught Python exception|Traceback"
)
LINES_OF_A_FINDING = 25


def clangs() -> list[str]:
    """Return the clang compilers of this machine: the plain name, then by version, newest first."""
    names = ["clang++", *(f"clang++-{version}" for version in range(40, 10, -1))]
    return [path for name in names if (path := shutil.which(name))]


def compiles(compiler: str, flags: Sequence[str]) -> bool:
    """Build the decoder's fuzzer; say whether that worked."""
    command = [compiler, *FLAGS, *flags, *SOURCES, "-o", str(DECODER)]
    result = subprocess.run(command, cwd=HOME, capture_output=True, text=True, check=False)
    (HOME / BUILD / "compile.log").write_text(result.stderr, encoding="utf-8")
    return result.returncode == 0


def build_decoder() -> str:
    """Build the decoder's fuzzer as well as can be done here; return how in words."""
    for compiler in clangs():
        if compiles(compiler, WITH_LIBFUZZER):
            return f"libFuzzer of {Path(compiler).name}"
    compiler = os.environ.get("CXX", "g++")
    if not compiles(compiler, WITHOUT_LIBFUZZER):
        raise SystemExit(f"{compiler} can't build the fuzzer: see {BUILD / 'compile.log'}")
    print(
        "No clang with libFuzzer is here, so the decoder's fuzzer changes its seeds at random,\n"
        "without the guidance of coverage. For that install clang and its run-time library: on\n"
        "Debian `apt-get install clang-16 libclang-rt-16-dev`, or another version."
    )
    return f"random changes, built by {Path(compiler).name}"


def summary(log: str) -> str:
    """Return libFuzzer's figures in words."""
    runs = re.search(r"Done (\d+) runs", log)
    text = f"{int(runs[1]):,} inputs" if runs else "stopped"
    covered = re.findall(r"cov: (\d+) ft: \d+ corp: (\d+)", log)
    counters = re.search(r"\((\d+) inline 8-bit counters\)", log)
    if covered:
        edges, kept = covered[-1]
        out_of = f" of {counters[1]}" if counters else ""
        text += f", {edges}{out_of} edges, {kept} inputs kept"
    return text


def fuzz(name: str, command: Sequence[str], corpus: Sequence[Path], seconds: int) -> bool:
    """Run a fuzzer; say whether it found nothing."""
    for folder in (FOUND, corpus[0]):
        (HOME / folder).mkdir(parents=True, exist_ok=True)
    arguments = [
        f"-max_total_time={seconds}",
        f"-artifact_prefix={FOUND}/{name}-",
        f"-max_len={MAX_LENGTH}",
        f"-timeout={HANGS}",
        *map(str, corpus),
    ]
    path = [str(HOME / "server"), str(HOME / BUILD / "python"), os.environ.get("PYTHONPATH", "")]
    result = subprocess.run(
        [*command, *arguments],
        cwd=HOME,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    log = HOME / BUILD / f"{name}.log"
    log.write_text(result.stdout, encoding="utf-8")
    print(f"{name}: {summary(result.stdout)}")
    if result.returncode:
        tell(result.stdout, command)
    return result.returncode == 0


def tell(log: str, command: Sequence[str]) -> None:
    """Print what a fuzzer found, and how to see it again."""
    lines = log.splitlines()
    first = next((i for i, line in enumerate(lines) if FINDING.search(line)), -LINES_OF_A_FINDING)
    print("\n".join(lines[first:][:LINES_OF_A_FINDING]))
    if written := re.search(r"Test unit written to (\S+)", log):
        print(f"\nReplay it:  {' '.join(command)} {written[1]}")
        print(f"Keep it:    cp {written[1]} {SEEDS}/   (make test and make fuzz replay it)")


def main() -> int:
    """Fuzz, half of the time each; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="for both together")
    parser.add_argument("--only", choices=["decoder", "messages"], help="one of the fuzzers")
    options = parser.parse_args()
    (HOME / BUILD).mkdir(parents=True, exist_ok=True)
    seconds = max(1, options.seconds if options.only else options.seconds // 2)
    corpora = {name: BUILD / f"corpus-{name}" for name in ("decoder", "messages")}
    good = True
    if options.only != "messages":
        print(f"decoder: {seconds} s by {build_decoder()}, with sanitizers", flush=True)
        good &= fuzz("decoder", [f"./{DECODER}"], [corpora["decoder"], SEEDS], seconds)
    if options.only != "decoder":
        guided = (HOME / BUILD / "python" / "atheris").is_dir()
        how = "atheris" if guided else "random changes, as atheris is not installed"
        print(f"messages: {seconds} s by {how}, against upb", flush=True)
        # What was new to the decoder may be new to the rest of the path.
        (HOME / corpora["decoder"]).mkdir(exist_ok=True)
        corpus = [corpora["messages"], SEEDS, corpora["decoder"]]
        good &= fuzz("messages", [sys.executable, str(MESSAGES)], corpus, seconds)
    return not good


if __name__ == "__main__":
    sys.exit(main())
