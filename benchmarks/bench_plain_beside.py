"""Are plain requests as fast and as right as before there were gradients and interventions?

Two servers take turns, each from a checkout of its own: one of the commit before gradients, and
this one. Both are asked by a caller of this checkout, which shows what the servers differ by; and
the other server by a caller of its own checkout as well, whose client has learnt nothing since,
such as to choose between servers. Before anything is timed, every plain reply of one server is
compared with the other's, bit for bit. In the end, eight threads mix plain requests with gradients
and interventions on this server, and every reply is compared with that of the same request alone.

It needs the other checkout, with its extension:

    git worktree add ../before 67a6b52
    (cd ../before && $OLDPWD/.venv/bin/python setup.py --quiet build_ext --inplace)
    PYTHONPATH=server .venv/bin/python -W ignore benchmarks/bench_plain_beside.py --before ../before
"""

from __future__ import annotations

import argparse
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import common
import report
from checkouts import Caller, Checkout

NET = "resnet18"
BEFORE, NOW, OLD_CALLER = "before", "now", "before, with its own client"
SIDES = (BEFORE, OLD_CALLER, NOW)
CALLS = 20
WAKING = 2
"""Calls at the beginning of a turn that are not counted: they wake up what slept meanwhile."""

WARMING = 3
"""Rounds that are not counted: a server goes on proving plans for a while after it is ready."""

# The last two compute next to nothing, so that what is timed is the way through the server.
PLAIN: dict[str, dict[str, Any]] = {
    "layer1, HOOK": {"side": 224, "layers": "layer1", "extractor": "hook"},
    "layer1, TORCHSCRIPT": {"side": 224, "layers": "layer1", "extractor": "torchscript"},
    "conv1 of 32 x 32 pixels, HOOK": {"side": 32, "layers": "conv1", "extractor": "hook"},
    "conv1 of 32 x 32 pixels, TORCHSCRIPT": {
        "side": 32, "layers": "conv1", "extractor": "torchscript",
    },
}  # fmt: skip
MIXED: list[dict[str, Any]] = [
    {"side": 64, "layers": ["layer1", "fc"], "extractor": "hook"},
    {"side": 64, "layers": ["layer4:gradient", "fc"], "objective": "fc[maximum]"},
    {"side": 64, "layers": "fc", "interventions": "layer1:channel=0..8:zero"},
    {"side": 64, "layers": "layer1", "extractor": "torchscript"},
    {"side": 64, "layers": ["layer4:grad_cam"], "objective": "fc[1]",
     "interventions": ["layer1:scale=0.5"]},
    {"side": 64, "layers": "fc", "interventions": [["layer1:channel=1:zero"], ["layer2:scale=2"]]},
]  # fmt: skip
THREADS = 8


def is_plain(request: dict[str, Any]) -> bool:
    """Return whether the checkout before gradients has the request."""
    return not {"objective", "interventions"} & request.keys()


def check(callers: dict[str, Caller]) -> int:
    """Return how many plain replies were compared; stop where the servers' bits differ."""
    requests = {**PLAIN, **{str(each): each for each in MIXED if is_plain(each)}}
    for name, request in requests.items():
        found = {side: callers[side].digests(request) for side in SIDES}
        if any(found[side] != found[NOW] for side in SIDES):
            raise SystemExit(f"{name}: the servers' values differ: {found}")
    return len(requests)


def latencies(callers: dict[str, Caller], rounds: int) -> dict[str, Any]:
    """Time a lone caller of each server, in turns."""
    times: dict[str, dict[str, list[float]]] = {
        name: {side: [] for side in SIDES} for name in PLAIN
    }
    ratios: dict[str, dict[str, list[float]]] = {
        name: {side: [] for side in SIDES if side != NOW} for name in PLAIN
    }
    for round_ in range(-WARMING, rounds):
        # The second side finds warm caches and perhaps a slower clock, so the order alternates.
        sides = SIDES if round_ % 2 else SIDES[::-1]
        for name, request in PLAIN.items():
            taken = {side: callers[side].times(request, CALLS)[WAKING:] for side in sides}
            if round_ < 0:
                continue
            for side in sides:
                times[name][side] += taken[side]
            medians = {side: statistics.median(taken[side]) for side in sides}
            for side, found in ratios[name].items():
                found.append(medians[NOW] / medians[side])
    return {name: _row(times[name], ratios[name]) for name in PLAIN}


def _row(times: dict[str, list[float]], ratios: dict[str, list[float]]) -> dict[str, Any]:
    """Return the milliseconds of each side, and how many times as many this server's calls take."""
    row = {side: common.quantiles(taken) for side, taken in times.items()}
    beside = {
        side: {
            "ratio of the medians": row[NOW]["p50"] / row[side]["p50"],
            "ratio, by round": common.quantiles(found),
        }
        for side, found in ratios.items()
    }
    return {**row, "now beside": beside}


def run(before: Path, rounds: int, mixed: int) -> dict[str, Any]:
    """Start both servers and their callers, compare, and time."""
    checkouts = {BEFORE: Checkout(before), NOW: Checkout(Path(__file__).parents[1])}
    with ExitStack() as closing:
        addresses = {
            side: closing.enter_context(
                checkout.serving(
                    NET, "--weights", "random", "--seed", "0", "--layers", "layer1,conv1"
                )
            )
            for side, checkout in checkouts.items()
        }
        callers = {
            side: closing.enter_context(checkouts[code].caller(addresses[server], NET))
            for side, code, server in (
                (BEFORE, NOW, BEFORE), (OLD_CALLER, BEFORE, BEFORE), (NOW, NOW, NOW),
            )
        }  # fmt: skip
        compared = check(callers)
        rows = latencies(callers, rounds)
        found = callers[NOW].mix(MIXED, mixed, THREADS)
    return {
        "commits": {side: checkout.commit for side, checkout in checkouts.items()},
        "plain replies of equal bits": compared,
        "rounds": rounds,
        "calls in a turn": CALLS - WAKING,
        "milliseconds": rows,
        "mixed": {"threads": THREADS, "kinds": len(MIXED), **found},
    }


def main() -> None:
    """Run the benchmark, and write its results and the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, required=True, help="the other checkout's root")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--mixed", type=int, default=5000, help="requests in the end")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    options = parser.parse_args()
    results = run(options.before, options.rounds, options.mixed)
    for name, row in results["milliseconds"].items():
        print(f"{name:38} " + " ".join(f"{side} {row[side]['p50']:.3f} ms" for side in SIDES))
        for side, found in row["now beside"].items():
            by_round = found["ratio, by round"]
            print(
                f"    now / {side}: {found['ratio of the medians']:.3f}"
                f" (by round {by_round['p25']:.3f} to {by_round['p75']:.3f})"
            )
    print(results["mixed"])
    common.save(
        "plain_beside",
        {"machine": common.machine("torch", "torchvision", "grpcio"), **results},
        options.results,
    )
    report.write(options.results)
    if results["mixed"]["wrong"]:
        raise SystemExit("replies of mixed requests differ from those of lone ones")


if __name__ == "__main__":
    main()
