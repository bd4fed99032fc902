"""How many items a second do two actors of ``layertap.ray.extract`` run, beside one?

Each actor has one core and a resnet18 with random weights. One actor and two take turns. The time
is that from the first batch of results to the last, with all actors ready at the first, so loading
is not in it. The values of both are compared with the model in this process before anything is
timed. Ray's own processes, and this one, which receives the results, share the machine's cores.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np

import common
import report
from ray_cluster import cluster

NET, LAYER = "resnet18", "avgpool:reduce=flatten=vector"
BATCH = 8
ACTORS = (1, 2)


def pixels(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the input of each row, by its id."""
    ids = rows["id"]
    made = [np.random.default_rng(each).random((3, 224, 224), np.float32) for each in ids]
    return {"id": ids, "x": np.stack(made)}


def run(actors: int, items: int) -> tuple[dict[int, np.ndarray], float]:
    """Return the vectors by id, and the items per second between the first batch and the last."""
    import ray.data

    from layertap.ray import extract

    dataset = ray.data.range(items, override_num_blocks=items // BATCH).map_batches(
        pixels, batch_size=BATCH
    )
    found = extract(
        dataset,
        NET,
        LAYER,
        column="x",
        weights="random",
        batch_size=BATCH,
        actors=actors,
        num_cpus=1,
    )
    vectors: dict[int, np.ndarray] = {}
    times: list[tuple[float, int]] = []
    for batch in found.iter_batches(batch_size=BATCH, batch_format="numpy", prefetch_batches=0):
        vectors.update(zip(batch["id"].tolist(), batch["vector"], strict=True))
        times.append((time.perf_counter(), len(batch["id"])))
    seconds = times[-1][0] - times[0][0]
    return vectors, sum(count for _, count in times[1:]) / seconds


def check(items: int) -> None:
    """Stop where the values are not those of the model in this process."""
    import layertap

    expected: dict[int, np.ndarray] = {}
    with layertap.load(NET, weights="random", device="cpu", threads=1) as model:
        for begin in range(0, items, BATCH):
            rows = pixels({"id": np.arange(begin, begin + BATCH)})
            vectors = model.extract(rows["x"], LAYER, extractor="hook").numpy()["vector"]
            expected.update(zip(rows["id"].tolist(), vectors, strict=True))
    for actors in ACTORS:
        found, _ = run(actors, items)
        assert found.keys() == expected.keys()
        for each, vector in found.items():
            if not np.allclose(vector, expected[each], rtol=1e-4, atol=1e-5):
                raise SystemExit(f"{actors} actors, item {each}: the values are not the model's")


def main() -> None:
    """Measure, keep the results, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--items", type=int, default=1600, help="of each run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dry", action="store_true", help="run everything once, keep nothing")
    options = parser.parse_args()
    items, rounds = (64, 1) if options.dry else (options.items, options.rounds)
    rates: dict[int, list[float]] = {actors: [] for actors in ACTORS}
    with cluster(max(ACTORS) + 1):
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.wait_for_min_actors_s = 600
        check(32)
        for _ in range(rounds):
            for actors in ACTORS:
                rates[actors].append(run(actors, items)[1])
    medians = {actors: statistics.median(each) for actors, each in rates.items()}
    results: dict[str, Any] = {
        "machine": common.machine("ray", "torch"),
        "items": items,
        "rounds": rounds,
        "rates": {str(actors): rate for actors, rate in medians.items()},
        "ratio": medians[2] / medians[1],
    }
    for actors, rate in medians.items():
        print(f"{actors} actors: {rate:.1f} items/s")
    print(f"two actors run {results['ratio']:.2f} times as many as one")
    if not options.dry:
        common.save("ray_data", results)
        report.write()


if __name__ == "__main__":
    main()
