"""How many photos a second does `layertap extract` turn into features, and in how much memory?

Generated JPEGs run through a resnet50 with random weights, of which `avgpool` is kept. Three ways
take turns, each in a process of its own:

- the bare plan: the program that layertap extract runs, on batches that are in memory already;
- `layertap extract`, from the files to an .npz file;
- thingsvision, from the same files to the same array in memory, with torchvision's transforms.

The time begins when the model is loaded. For layertap it includes the choice of an extractor, its
compilation and the writing; for the bare plan it does not. The features of both are compared with
PyTorch's own before anything is timed.

Then one run writes many gigabytes of `layer1` within a budget, and the memory of the process is
watched. The budget is that of rows and items; the model, its passes and PyTorch's own memory come
on top, and are measured before the run by passes of the same batches, from their compilation on.

thingsvision is no dependency of layertap: `make bench-dataset` makes an environment.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import common
import peaks
import report

HOME = Path(__file__).resolve().parent.parent
FOLDER = HOME / "build" / "bench-dataset"
NET, LAYER, LARGE_LAYER = "resnet50", "avgpool", "layer1"
SIDE, BATCH = 375, 16
EXTRACTOR = "torchscript"
TOLERANCE = 1e-3
"""The largest difference, as a share of the largest feature. Programs fold batch norms."""

BARE, OURS, THEIRS = "the bare plan", "layertap extract", "thingsvision"


def photos(count: int) -> Path:
    """Return a folder of that many JPEGs of random blurred pictures, which is made once."""
    from PIL import Image

    folder = FOLDER / f"photos{count}"
    if folder.exists():
        return folder
    making = folder.with_name(f"{folder.name}.making")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for index in range(count):
        small = Image.fromarray(draw.integers(0, 256, (24, 32, 3), np.uint8))
        large = small.resize((SIDE * 4 // 3, SIDE), Image.Resampling.BICUBIC)
        noisy = np.asarray(large, np.int16) + draw.integers(-12, 13, (SIDE, SIDE * 4 // 3, 3))
        pixels = noisy.clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(making / f"{index:05}.jpg", quality=90)
    making.rename(folder)
    return folder


def module() -> Any:
    """Return the net; its random weights are the same in each process."""
    import torch
    import torchvision

    torch.manual_seed(0)
    with torch.no_grad():
        net = torchvision.models.resnet50(weights=None).eval()
        for norm in net.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                for running, least, most in (
                    (norm.running_mean, -0.1, 0.1),
                    (norm.running_var, 0.8, 1.2),
                ):
                    assert running is not None
                    running.uniform_(least, most)
    return net


def weights() -> Path:
    """Return the file of the net's weights, which is made once."""
    import torch

    file = FOLDER / f"{NET}.pt"
    if not file.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        torch.save(module().state_dict(), file)
    return file


def loaded() -> Any:
    """Return layertap's model."""
    import layertap

    return layertap.load(NET, weights=str(weights()), device="cpu", plan_cache="off")


def transforms() -> Any:
    """Return the preprocessing of the net's weights, as torchvision and layertap have it."""
    import torchvision

    return torchvision.models.ResNet50_Weights.IMAGENET1K_V1.transforms()


def bare(folder: Path, count: int, extractor: str) -> dict[str, Any]:
    """Run the plan on one batch again and again."""
    import torch
    from PIL import Image

    from layertap.call import Call
    from layertap.engine.host import ModelHost
    from layertap.models import Batch
    from layertap.selection import Extractor, LayerSelection

    files = sorted(folder.iterdir())[:BATCH]
    x = torch.stack([transforms()(Image.open(file).convert("RGB")) for file in files])
    with loaded() as model:
        host: ModelHost = model.host
        resolved = host.resolve((LayerSelection(LAYER),), Extractor(extractor))
        name = host.model.signature.main.name
        batch = Batch({name: x})
        plan = host.plan(resolved, batch, Call())

        def run(times: int) -> torch.Tensor:
            values: list[torch.Tensor] = []
            with torch.inference_mode():
                for _ in range(times):
                    plan.built.run(batch, lambda index, value: values.append(value.clone()))
            return values[-1]

        found = host.compute.run(lambda: run(2), Call())
        begun = time.perf_counter()
        host.compute.run(lambda: run(-(-count // len(files))), Call())
        seconds = time.perf_counter() - begun
    return {"seconds": seconds, "first": found[:, :, 0, 0].numpy()}


def ours(folder: Path, count: int, extractor: str) -> dict[str, Any]:
    """Extract all photos into an .npz file."""
    from layertap.dataset import extract

    del count
    layer = f"{LAYER}:reduce=flatten=pooled"
    with tempfile.TemporaryDirectory(dir=FOLDER) as made, loaded() as model:
        output = Path(made) / "features.npz"
        begun = time.perf_counter()
        outcome = extract(model, [folder], [layer], output, extractor=extractor, batch_size=BATCH)
        seconds = time.perf_counter() - begun
        with np.load(output) as stored:
            first = stored["pooled"][:BATCH]
    return {"seconds": seconds, "first": first, "extractor": outcome.extractor.value}


def theirs(folder: Path, count: int, extractor: str) -> dict[str, Any]:
    """Extract all photos with thingsvision, in its own environment."""
    del count, extractor
    import torch

    # thingsvision 2.7 was written for NumPy 1. TensorFlow, which it imports, and triton, which
    # torch imports, each have an LLVM of their own, and can be in one process in this order only.
    np.AxisError = np.exceptions.AxisError  # type: ignore[attr-defined]
    import triton._C.libtriton  # noqa: F401
    from thingsvision import get_extractor_from_model
    from thingsvision.utils.data import DataLoader, ImageDataset

    net = module()
    net.load_state_dict(torch.load(weights(), weights_only=True))
    model = get_extractor_from_model(model=net, device="cpu", backend="pt", preprocess=transforms())
    with tempfile.TemporaryDirectory() as made:
        begun = time.perf_counter()
        dataset = ImageDataset(
            root=str(folder), out_path=made, backend="pt", transforms=transforms()
        )
        batches = DataLoader(dataset=dataset, batch_size=BATCH, backend="pt")
        features = model.extract_features(
            batches=batches, module_name=LAYER, flatten_acts=True, output_type="ndarray"
        )
        seconds = time.perf_counter() - begun
    return {"seconds": seconds, "first": features[:BATCH]}


WAYS: dict[str, Callable[[Path, int, str], dict[str, Any]]] = {
    BARE: bare,
    OURS: ours,
    THEIRS: theirs,
}


def reference(folder: Path) -> np.ndarray:
    """Return the features of the first photos by PyTorch alone."""
    import torch
    from PIL import Image

    net, taken = module(), []
    net.load_state_dict(torch.load(weights(), weights_only=True))
    net.avgpool.register_forward_hook(lambda m, given, value: taken.append(value.flatten(1)))
    files = sorted(folder.iterdir())[:BATCH]
    with torch.inference_mode():
        net(torch.stack([transforms()(Image.open(file).convert("RGB")) for file in files]))
    return taken[0].numpy()


def in_process(way: str, count: int, extractor: str) -> dict[str, Any]:
    """Run a way in a process of its own, in its environment; return what it printed last."""
    python = sys.executable
    if way == THEIRS:
        python = str(HOME / "build" / "dataset" / "bin" / "python")
    command = [python, "-W", "ignore", __file__, "--way", way, "--items", str(count)]
    done = subprocess.run(
        [*command, "--extractor", extractor], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{way}: {done.stderr}")
    answer = json.loads(done.stdout.splitlines()[-1])
    answer["first"] = np.array(answer["first"], np.float32)
    return answer


def rates(count: int, turns: int, extractor: str) -> dict[str, Any]:
    """Compare the values of all ways, then time them in turns."""
    folder = photos(count)
    right = reference(folder)
    wanted = reference(photos(2 * BATCH))
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    differences, used = {}, ""
    for way in WAYS:
        found = in_process(way, 2 * BATCH, extractor)["first"]
        differences[way] = float(np.abs(found - wanted).max() / np.abs(wanted).max())
        if differences[way] > TOLERANCE:
            raise SystemExit(f"{way} differs from PyTorch by {differences[way]:.1e}")
    for _ in range(turns):
        for way in WAYS:
            answer = in_process(way, count, extractor)
            seconds[way].append(answer["seconds"])
            used = answer.get("extractor", used)
            assert np.abs(answer["first"] - right).max() <= TOLERANCE * np.abs(right).max()
    median = {way: statistics.median(each) for way, each in seconds.items()}
    items = {way: (-(-count // BATCH) * BATCH if way == BARE else count) for way in WAYS}
    rate = {way: items[way] / median[way] for way in WAYS}
    return {
        "items": count,
        "turns": turns,
        "extractor": used,
        "ways": {
            way: {
                "seconds": seconds[way],
                "items a second": rate[way],
                "of the bare plan": rate[way] / rate[BARE],
                "largest difference": differences[way],
            }
            for way in WAYS
        },
    }


def memory_here(gigabytes: float, budget: int) -> dict[str, Any]:
    """Write that much of a large layer within a budget; return the memory before and during it."""
    from layertap.dataset import extract

    with tempfile.TemporaryDirectory(dir=FOLDER) as made, loaded() as model:
        item = 4 * int(np.prod(model.extract(np.zeros((1, 3, 224, 224), np.float32), LARGE_LAYER)
                               .numpy()[LARGE_LAYER].shape))  # fmt: skip
        count = int(gigabytes * 1e9 / item)
        source = photos(count)
        files = sorted(source.iterdir())[:BATCH]
        peaks.forget()
        # All that the engine does for such batches, the last and smaller one among them: compiling
        # the program, comparing its values at each size, and passes.
        for size in {BATCH, count % BATCH or BATCH}:
            for _ in range(10):
                model.extract(files[:size], LARGE_LAYER, extractor=EXTRACTOR)
        before = peaks.peak()
        output = Path(made) / "features.safetensors"
        peaks.forget()
        begun = time.perf_counter()
        outcome = extract(
            model, [source], [LARGE_LAYER], output,
            extractor=EXTRACTOR, batch_size=BATCH, memory=budget,
        )  # fmt: skip
        seconds = time.perf_counter() - begun
        peak = peaks.peak()
        nbytes = sum(file.stat().st_size for file in output.iterdir())
    return {
        "items": outcome.rows,
        "output bytes": nbytes,
        "budget bytes": budget,
        "engine peak bytes": before,
        "peak bytes": peak,
        "beyond the engine, of the budget": (peak - before) / budget,
        "seconds": seconds,
    }


def memory(gigabytes: float, budget: int) -> dict[str, Any]:
    """Run ``memory_here`` in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--way", "memory"]
    command += ["--gigabytes", str(gigabytes), "--budget", str(budget)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"memory: {done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Run, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=5000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--extractor", default=EXTRACTOR, help="of the plan and of extract")
    parser.add_argument("--gigabytes", type=float, default=10.0, help="of the large output")
    parser.add_argument("--budget", type=int, default=512 << 20, help="bytes of extract's memory")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    parser.add_argument("--way", help="run one way here, and print its answer")
    options = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if options.way == "memory":
        print(json.dumps(memory_here(options.gigabytes, options.budget)))
        return
    if options.way:
        answer = WAYS[options.way](photos(options.items), options.items, options.extractor)
        print(json.dumps(answer | {"first": answer["first"].tolist()}))
        return
    results = {
        "machine": common.machine("torch", "torchvision"),
        "rates": rates(options.items, options.turns, options.extractor),
        "memory": memory(options.gigabytes, options.budget),
    }
    common.save("dataset", results, options.results)
    if options.results == common.RESULTS:
        report.write()
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
