"""What does a hook that writes into the reply save over one that clones?

Every layer of resnet50 in one request, by HOOK, from the batch to the finished message. One way
keeps a clone of each value and lays them out when the pass is over; the other writes each value
into its place in the unpublished message as it comes. Each way has a process of its own, so that
its peak of memory is its own; both messages are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import common
import peaks
import report

NET = "resnet50"
CLONE, BUILDER = "clone, then lay out", "write into the reply"


def child(way: str, calls: int) -> None:
    """Run one way, and print its times, its peak and the digest of its message."""
    import torch

    from layertap.engine.pipeline import publish
    from layertap.engine.reply_layout import Envelope, reply_collector, reply_writer
    from layertap.engine.resolve import resolve
    from layertap.extraction import PlanBuilder, Taps, measure
    from layertap.extraction.samples import ordinary_batch
    from layertap.models import ModelSpec, load_model
    from layertap.selection import Extractor, LayerSelection
    from layertap.services.native_form import NativeForm
    from layertap.timings import Timings

    with torch.inference_mode():
        model = load_model(ModelSpec(NET, weights="random"))
        catalogue = measure(model)
        wanted = resolve(model, catalogue, (LayerSelection("**"),), Extractor.HOOK, max_layers=1024)
        builder = PlanBuilder(model, Taps(model.module), catalogue)
        plan = builder.build(Extractor.HOOK, wanted.pass_spec, model.signature.key)
        x = ordinary_batch(model, 1)
        lay_out = reply_collector if way == CLONE else reply_writer
        form = NativeForm(Extractor.HOOK)
        envelope = Envelope(1 << 30, form, lambda nbytes: None)

        def once() -> bytes:
            sink = lay_out(wanted.outputs, plan, x.size, envelope)
            plan.built.run(x, sink)
            return publish(sink, form, Timings())

        before = peaks.forget()
        message = once()
        alone = peaks.peak() - before
        answer = {
            "layers": len(wanted.outputs),
            "message_mib": len(message) / peaks.MIB,
            "digest": hashlib.sha256(message).hexdigest(),
            "peak_mib": alone / peaks.MIB,
        }
        del message
        times = common.timed(lambda: len(once()), calls)
    print(json.dumps(answer | common.quantiles(times)))


def run(rounds: int, calls: int) -> dict[str, Any]:
    """Run both ways in turns; keep the median round of each."""
    found: dict[str, list[dict[str, Any]]] = {CLONE: [], BUILDER: []}
    for _ in range(rounds):
        for way, results in found.items():
            command = [sys.executable, "-W", "ignore", __file__, "--child", way]
            command += ["--calls", str(calls)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            results.append(json.loads(done.stdout))
    if len({result["digest"] for results in found.values() for result in results}) != 1:
        raise SystemExit("the two ways' messages differ")
    key: Callable[[dict[str, Any]], float] = lambda result: result["p50"]  # noqa: E731
    middle = {way: sorted(results, key=key)[len(results) // 2] for way, results in found.items()}
    return {"machine": common.machine("torch"), "rounds": rounds, "ways": middle}


def main() -> None:
    """Run, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--child", choices=(CLONE, BUILDER), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.calls)
        return
    results = run(options.rounds, options.calls)
    common.save("hook", results)
    report.write()
    print(json.dumps(results["ways"], indent=2))


if __name__ == "__main__":
    main()
