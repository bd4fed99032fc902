"""Writes README.md and its charts from whatever results there are.

Each benchmark calls ``write`` when it has saved its results; run as a program it does the same
without a benchmark.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import charts
import common

__all__ = ["write"]

EAGER = "full eager pass with cloning hooks"

Section = Callable[[dict[str, Any], Path], str]
"""Takes the results and where charts go, returns the text."""

TITLE = """# Benchmarks

`make bench` runs short versions of all benchmarks, and `make bench ARGS="--rounds 30"` longer ones.
Both write this page from [results](results); [cuda](cuda/README.md) and
[cuda_h200](cuda_h200/README.md) have the results for GPUs.
Times depend on the machine and its load, so quote the ratios, which are measured within one run.
Outputs are verified before timing.
"""

GPU_TITLE = """# Benchmarks on a GPU

`make bench-cuda PYTHON=python3` runs these benchmarks on a machine with a GPU and writes this page.
Quote the ratios, which are measured within one run. Outputs are verified before timing.
"""

EXTRACTORS = """
## How long does each extractor take?

[bench_extractors.py](bench_extractors.py): milliseconds at batch 1, medians of {rounds} runs. In
brackets: the speed-up over the usual way, a full eager pass with cloning hooks. Machine: {facts}.

{table}

![Milliseconds of each extractor, by case](results/extractors.png)
"""

MATRIX = """
## How do the costs depend on network, batch and number of layers?

[bench_matrix.py](bench_matrix.py): milliseconds, median / 99th percentile, and the most memory that
one call adds, in MiB{device}. Random weights; {seconds:.0f} s for each column.
Machine: {facts}.
{tables}"""

SENTENCES = """
## How many sentences of mixed length a second?

[bench_sentences.py](bench_sentences.py) (`make bench-sentences`): 1,000 sentences of {shortest} to
{longest} tokens, {all} in all, and an encoder of the shape of all-MiniLM-L6-v2 with random weights,
relative to sentence-transformers in process; medians of {turns} turns. The servers run in processes
of their own on the same cores, over gRPC on TCP. Machine: {facts}.

{table}
"""

DATASET = """
## How many photos a second does `layertap extract` turn into features?

[bench_dataset.py](bench_dataset.py) (`make bench-dataset`): {items} generated JPEGs, resnet50
`avgpool` with random weights by {extractor}, relative to the bare plan on batches that are in
memory already; medians of {turns} turns, each in a process of its own. The times of layertap
include the choice of the extractor, its compilation and the writing. Machine: {facts}.

{table}

Memory: an output of {output:.1f} GB with `--memory` {budget:.0f} MiB. The process had at most
{before:.0f} MiB in RAM while the engine alone compiled, proved and ran the same batches. During the
run it had at most {peak:.0f} MiB; the engine and the budget together are {allowed:.0f} MiB.
"""

RAY_SERVE = """
## What does Ray's gRPC proxy cost?

[bench_ray_serve.py](bench_ray_serve.py): one replica with a resnet18 and random weights, called at
its own gRPC port and through Ray's proxy, in turns; milliseconds, median / 99th percentile of a
lone caller by size of the reply. Client, proxy and replica share the cores. Machine: {facts}.

{times}

{callers} callers, and one stream, with replies of 2 KB:

{rates}
"""

RAY_DATA = """
## How many items a second do two actors run, beside one?

[bench_ray_data.py](bench_ray_data.py): `layertap.ray.extract` with a resnet18 and random weights,
one core for each actor, {items} items; medians of {rounds} turns. Machine: {facts}.

{table}
"""

PICTURE = """
The chart shows when the device was busy during one call, for resnet50 `avgpool` at batch 1:

![Kernels of each method over time](results/kernels.png)
"""

MATRIX_TF32 = """
## The same with TF32

The same benchmark with `--tf32`: float32 convolutions and matrix products may use TF32, which a
server allows only with its [flag](../docs/performance.md#on-a-gpu). Machine: {facts}.
{tables}"""

DEVICE = "; times are measured on the host until the device has finished, in brackets on the device"

WIRE = """
## How long does sending a reply take, and what is the lower bound?

[bench_wire.py](bench_wire.py): sends an array from one process to another, without a model. The
time ends when the receiver has read one element of each page and released the array; milliseconds,
median / 90th percentile of {calls} calls. "Memory kept" means
[`layertap.keep_memory()`](../docs/performance.md) on both sides; shared memory is what
[clients on the server's machine use](../docs/shared_memory.md). Machine: {facts}.

{times}

At 800 KB a process that has imported torch keeps the memory of a message without being asked:
while torch is imported, glibc raises the size from which blocks get pages of their own. A call of
the naive row then takes fewer than 10 page faults in each process; a client without torch takes
about 400, and a process in which glibc keeps to its first limit of 128 KB about 700 as a client and
1,000 as a server. So ratios to the naive row at this size are smaller than for clients without
torch.

Speed relative to naive protobuf, and as a share of the speed of a raw TCP socket that receives into
a reused buffer. The goals are at least 50 % of the raw socket, and 5 times naive protobuf for
12.8 MB and 6 times for 102 MB; with shared memory, 20 and 25 times:

{ratios}

![Milliseconds of each row, by size](results/wire.png)
"""

PEERS = """
## How does layertap compare with other servers?

[bench_peers.py](bench_peers.py) (`make bench-peers`): all servers have resnet18 up to a layer as a
frozen TorchScript program, run by one thread at a time with {threads} cores of PyTorch, and take
turns, {rounds} rounds of {seconds:g} s in each row. The callers are {processes} processes on the
same cores. Every value of every reply was compared with the plain module's before anything was
timed; the largest difference was {difference:.0e} of a layer's largest magnitude. A tensor of
batch 1 has 0.6 MB, and one of batch 128 77 MB; the photograph is a JPEG of 60 KB, which
the servers decode and preprocess as torchvision's transform does: layertap by
[its own code](../docs/images.md), the others by that transform. Machine: {facts}.

- **in process**: the program in the caller, without a server
- **layertap**: `--batching {batching}`; its Python client, which uses
  [shared memory](../docs/shared_memory.md) for large tensors on the server's machine;
  **layertap, TCP**: the same without shared memory
- **bare gRPC**: the least that a server in Python can be; it takes and returns bytes, and parses,
  checks and counts nothing
- **PyTriton**: its own gRPC client, dynamic batching as by default, two instances that decode
- **LitServe**: HTTP with bytes in the body, one worker, `fast_queue`
- **Ray Serve**: HTTP with bytes in the body, one replica, `RAY_SERVE_THROUGHPUT_OPTIMIZED`
{left_out}
One caller, milliseconds, median (quartiles). The last column is the median of the fastest other
server relative to layertap's:

{alone}

![Milliseconds of each server, one caller](results/peers.png)
{together}
{behind}Versions: {versions}. While nobody called them, the servers used {idle} of a core.
"""

PEERS_TOGETHER = """
{callers} callers, answers a second, median (quartiles) of the rounds. The last column is layertap's
relative to those of the fastest other server:

{table}

![Answers a second of each server, {callers} callers](results/{file})
"""

PEERS_SHORT = """
The table compares layertap with other servers of the same TorchScript program on {cores} cores: how
many times as fast layertap answers as each of them, one caller by the median time of a reply and
{callers} callers by answers a second (`make bench-peers`;
[all figures](benchmarks/README.md#how-does-layertap-compare-with-other-servers)):

{table}
"""

PEERS_BEGIN = "<!-- Written by benchmarks/report.py from the results of make bench-peers -->"
PEERS_END = "<!-- End of what is written -->"

BEHIND: dict[str, str] = {
    "a tensor, avgpool (2 KB), callers: 1": (
        "within the quartiles of both: the pass takes nine tenths of the call, the reply next to "
        "nothing, and the machine was noisy; an earlier run had 1.08×"
    ),
}
"""Why another server is ahead of layertap, by the title of the row in `_peers`."""

SERVER = """
## How much time does the server add, and how does it scale with many callers?

[bench_server.py](bench_server.py): resnet18 at 3 × 224 × 224, batch 1, with TORCHSCRIPT. The table
has the latency of a single caller in milliseconds. The plan and the server run in separate
processes and alternate; all of them keep freed memory. The bare server is the lower bound: grpcio
around the same plan, which takes the input's bytes and returns the layer's, and parses, checks and
counts nothing:

{latency}

A `layer1` reply has 0.8 MB and an `avgpool` reply 2 KB. The input tensor has 0.6 MB; the photograph
has 60 KB, and the server decodes and preprocesses it. The slowest of the first {first} requests
after READY took {slowest:.1f} times the later median.

Requests per second for `layer1`, and their share of a loop without a server, in both modes of
[`--mode`](../docs/performance.md). The clients are threads of one Python process on the same cores:

{throughput}

![Requests per second by the number of clients](results/server.png)

Eight of these clients, with and without [shared forward passes](../docs/batching.md):

{batching}

Machine: {facts}.
"""

GPU_SERVER = """
## What does the server add on a GPU?

[bench_gpu_server.py](bench_gpu_server.py): resnet50 `avgpool` with {extractor}, float32
({float32}). The server replays CUDA graphs at the batch sizes {graphs}. The loop is the same plan
without a server, {loop}: for each batch the input is copied from page-locked memory and the layer
back to it. Latency of a single caller in milliseconds, and its phases in the server; loop and
server alternate:

{latency}

Answers per second, medians of {rounds} rounds of {seconds} s with their quartiles, and their share
of the loop's batches per second. Callers are spread over several client processes on the server's
machine. Photographs are compared with the loop for tensors of batch 1, which decodes nothing:

{rates}
{graph_loop}
Large replies: resnet18 `layer1` in float32, in milliseconds. Each request also sends its input,
which is three quarters of the reply's size:

{large}

Machine: {facts}.
"""

GRAPH_LOOP = """
Another run of one round, in which the loop uses a CUDA graph like the server's plan:

{table}
"""

GRAPHED = ["FX", "HOOK", "TORCHSCRIPT", "HOOK, CUDA graph", "TORCHSCRIPT, CUDA graph"]

GRAPHS = """
## What does a CUDA graph save?

[bench_matrix.py](bench_matrix.py): {note}. A dash means that the pass can't be recorded or that the
extractor does not serve the layers. Machine: {facts}.

{table}
"""

BRANCHES = """
## How much faster than HOOK is a compiled transformer that looks at its mask?

[bench_branches.py](bench_branches.py): BERT-base from its configuration, {tokens} tokens, one
item, the outputs of all {layers} layers; milliseconds, median (quartiles) of {turns} calls that
alternate. The time of TORCHSCRIPT includes its guard, which finds out the outcome of the mask
([Branches](../docs/extraction.md#branches)). The speed-up is the median (quartiles) of the ratios
of the turns. Machine: {facts}, threads {threads}.

{speed}

How many of the layers that HOOK serves a compiled plan serves as well, in small models of each
architecture, and how its values compare with plain hooks': without a mask, with a mask of ones,
and with padding at either end, for one item and for two:

{shares}
"""

TEXT = """
## How much time does the server add to a pass of BERT-base?

[bench_text.py](bench_text.py): BERT-base from its configuration, {tokens} tokens, one item; a
client on the server's machine, through shared memory. The pass is plain PyTorch in a process of
its own, cut after the last layer that is asked for, with as many threads. The floor is a request
for the smallest layer of a tiny model. Milliseconds, median (quartiles); all rows alternate.
Machine: {facts}, threads {threads}.

{table}

The states of all 12 layers, 18.9 MB, take {ratios} the time of the pass. The last token of one
layer takes {overheads} longer than the pass and the floor together.
"""

ENCODE = """
## How long does encoding a message take?

[bench_encode.py](bench_encode.py): encodes a 12.8 MB activation into a finished message;
milliseconds. In brackets: the speed relative to torch's steps (cast, contiguous, `tobytes`,
protobuf). The last columns are the throughput of two threads relative to one, and the same for
plain copies. If plain copies don't double either, memory bandwidth is the limit. Machine: {facts}.

{table}
"""

HOOK = """
## How much does a hook that writes into the reply save, compared with one that clones?

[bench_hook.py](bench_hook.py): all {layers} layers of resnet50 with HOOK, in a message of
{message:.0f} MiB. Machine: {facts}.

{table}
"""

GRADIENTS = """
## What do gradients cost?

[bench_gradients.py](bench_gradients.py): resnet50, one image of 224 × 224, in this process by HOOK,
all ways in turns. Grad-CAM of the last block took **{cam:.2f} ×** the plain forward pass (the
median of each). Integrated gradients of an input of 112 × 112 with 50 steps took
**{sweep:.2f} ×** a loop written by hand in PyTorch, which also has {rows} items in a batch and
computes the score at both ends. The results were compared first. {threads} threads. Machine:
{facts}.

{table}
"""

INTERVENTIONS = """
## What do interventions cost?

[bench_interventions.py](bench_interventions.py): resnet50, one image of 224 × 224, in this process.
In each of 64 passes another channel of a block is set to zero, in one request with 64 sets; by hand
it is a loop of whole passes with a hook. Beside one forward pass, 64 ablations took {ratios} (the
median of each). The results were compared first. {threads} threads. Machine: {facts}.

{table}
"""

PLAIN_BESIDE = """
## Are plain requests as fast as before there were gradients and interventions?

[bench_plain_beside.py](bench_plain_beside.py): resnet18 with random weights, a tensor of one image.
Milliseconds of a lone caller, median (quartiles) of {rounds} rounds of {calls} calls. The servers
of the commits {before} (before) and {now} (now) take turns. Both are asked with the client of now,
and the former server with the client of its own commit as well, which could not yet choose between
servers. The bits of {compared} plain replies were compared first: all are equal. Ratios are the
medians (quartiles) of those of the rounds. Then {threads} threads mixed {requests} requests of
{kinds} kinds, plain ones, gradients and interventions: {wrong} replies differed from those of the
same request alone. Machine: {facts}.

{table}
"""

IMAGES = """
## What does a photograph cost?

[bench_images.py](bench_images.py): a photograph adds **{added:.2f} ms** to a call with a tensor
(the difference of the medians; resnet18 `conv1`, pooled). {count} photographs are decoded and
preprocessed **{cores:.2f} ×** as fast by the threads of the server as by one thread. The values
were compared first: all ways give torchvision's, bit for bit. The table has milliseconds
(quartiles); the decoders and the ways from a file to a model's item run on one core. Machine:
{facts}.

{table}
"""

RACES = """
## Is AUTO as fast as the best single extractor?

[bench_races.py](bench_races.py): AUTO races the proven extractors for a layer and a batch size
([which one AUTO takes](../docs/extraction.md#which-extractor-auto-takes)), and then takes turns
with each of them, in this process. Milliseconds, median (quartiles) of {rounds} turns; the last
column is the median (quartiles) of the ratios of the turns to the extractor with the best median.
The values were compared first. {threads} threads. Where AUTO took TORCHSCRIPT
[with channels last](../docs/extraction.md#channels-last), which no request can name, it can be
faster than all of them. Where it took TORCHSCRIPT, and that is the best, both columns ran the same
program, so what the ratio differs from 1 is the machine's noise. Machine: {facts}.

{table}
"""

PACKAGES = """
## Does EXPORT keep other threads waiting, and how soon does it answer after a restart?

[bench_packages.py](bench_packages.py): {batch} items of resnet50 up to `avgpool` in this process,
while another thread sleeps a millisecond at a time. How late it woke, in milliseconds, tells for
how long it got no turn, because of the GIL or because the cores were busy. Median (quartiles) of
{rounds} passes in turns; the values were compared first. Machine: {facts}.

{table}

Restarted {restarts} times, with the package in the plan cache and no compiler on the `PATH`;
seconds, median (quartiles):

{restarted}
"""

START = """
## How long does a restart take?

[bench_start.py](bench_start.py): seconds from the start of a process, median (quartiles) of
{rounds} in turns. Plain PyTorch imports torch and torchvision, builds resnet50, loads its weights
from a file and runs it once under hooks on {layers}. The server has the same weights, declares
these layers and finds the plan cache of an earlier start; it is ready once their values were
compared and their programs are warm. It takes **{ratio} times** as long as plain PyTorch. Its
answers were compared with the hooks' values. Machine: {facts}.

{table}
"""

FIRST_RUNS = """
## What do a program's first runs cost?

[bench_first_runs.py](bench_first_runs.py): a TorchScript program's first three runs and its later
ones on this CPU, in milliseconds at batch 1, with torch's profiling executor and without it, as
layertap runs it. First runs are medians of {copies} fresh copies, later ones medians (quartiles) of
{rounds} runs; both ways took turns, and their outputs are equal bit by bit. Machine: {facts}.

{table}
"""

MEMORY = """
## Does a server's memory level off?

[bench_memory.py](bench_memory.py): {requests:,} requests of every kind from 4 clients, including
invalid ones. Resident memory was {start:.0f} MiB when the server was ready, at most {first:.0f} MiB
during the first half of the requests and at most {second:.0f} MiB during the second. The server
keeps freed memory up to [a limit](../docs/performance.md#memory-that-the-process-keeps), and then
returns all of it to the system. Machine: {facts}.

![Resident memory over the requests](results/memory.png)
"""

GROWTH = """
## How does everything grow?

[bench_growth.py](bench_growth.py): one curve for each row. The slope is that of a line through the
logarithms: 0 if a cost stays the same, 1 if it doubles with what it depends on; less is better. A
curve bends if this slope, or that of its last three points, is more than 0.25 above the expected
one. Requests are for `layer1` of resnet18 at 3 × 64 × 64 unless the row says otherwise;
{seconds:g} s for each point. Machine: {facts}.

{table}

![The curves, both axes logarithmic](results/growth.png)
"""


def write(folder: Path = common.RESULTS) -> None:
    """Write the page and the charts of every benchmark that has results in the folder.

    The page stands beside this file, or in the folder where that is another than ``RESULTS``.
    """
    parts = [TITLE]
    for name, section in SECTIONS.items():
        if (results := common.load(name, folder)) is not None:
            parts.append(section(results, folder))
    page = "".join(parts)
    if folder == common.RESULTS:
        (common.HERE / "README.md").write_text(page, "utf-8")
    else:
        page = page.replace(TITLE, GPU_TITLE, 1).replace("](results/", "](")
        page = re.sub(r"\]\((bench_\w+\.py|\.\./docs/)", r"](../\1", page)
        (folder / "README.md").write_text(page, "utf-8")


def _extractors(results: dict[str, Any], folder: Path) -> str:
    cases = results["cases"]
    names = list(dict.fromkeys(name for case in cases.values() for name in case))
    rows = [[name, *(_with_ratio(case, name) for case in cases.values())] for name in names]
    charts.bars(
        folder / "extractors.png",
        {case: {n: r["p50"] for n, r in ways.items()} for case, ways in cases.items()},
    )
    return EXTRACTORS.format(
        rounds=results["rounds"],
        facts=_facts(results["machine"]),
        table=_table(["method", *cases], rows),
    )


def _matrix(results: dict[str, Any], folder: Path) -> str:
    gpu = results["machine"]["gpu"]
    tables = []
    for title, columns in results["tables"].items():
        names = list(dict.fromkeys(name for column in columns.values() for name in column))
        rows = [
            [name, *(_costs(column.get(name)) for column in columns.values())] for name in names
        ]
        tables.append(f"\n**{title}**\n\n{_table(['method', *columns], rows)}\n")
        if gpu:
            rows = [[n, *(_kernels(column.get(n)) for column in columns.values())] for n in names]
            tables.append(
                "\nKernels and copies of one call; milliseconds in which the device was busy + "
                f"idle between them:\n\n{_table(['method', *columns], rows)}\n"
            )
    charts.bars(
        folder / "matrix.png",
        {
            f"{title}, deep": {name: row["p50"] for name, row in columns["deep"].items()}
            for title, columns in results["tables"].items()
            if "deep" in columns
        },
    )
    return MATRIX.format(
        device=DEVICE if results["machine"]["gpu"] else "",
        seconds=results["seconds"],
        facts=_facts(results["machine"]),
        tables="".join(tables)
        + "\n![Milliseconds of each method for one deep layer](results/matrix.png)\n"
        + (PICTURE if gpu else ""),
    )


def _matrix_tf32(results: dict[str, Any], folder: Path) -> str:
    tables = []
    for title, columns in results["tables"].items():
        names = list(dict.fromkeys(name for column in columns.values() for name in column))
        rows = [[n, *(_costs(column.get(n)) for column in columns.values())] for n in names]
        tables.append(f"\n**{title}**\n\n{_table(['method', *columns], rows)}\n")
    return MATRIX_TF32.format(facts=_facts(results["machine"]), tables="".join(tables))


def _kernels(row: dict[str, float] | None) -> str:
    if row is None or "kernels" not in row:
        return "–"
    times = f"{charts.digits(row['busy_ms'])} + {charts.digits(row['gaps_ms'])}"
    return f"{row['kernels']:.0f}: {times}"


def _costs(row: dict[str, float] | None) -> str:
    if row is None:
        return "–"
    device = f" ({charts.digits(row['device_p50'])})" if "device_p50" in row else ""
    times = f"{charts.digits(row['p50'])}{device} / {charts.digits(row['p99'])}"
    return f"{times}, {row['peak_mib']:.0f} MiB"


def _with_ratio(case: dict[str, Any], name: str) -> str:
    if name not in case:
        return "–"
    p50 = case[name]["p50"]
    return f"{p50:.1f} ({case[EAGER]['p50'] / p50:.2f}×)"


def _wire(results: dict[str, Any], folder: Path) -> str:
    sizes = results["sizes"]
    names = list(next(iter(sizes.values()))["rows"])
    by_row = {name: [size["rows"][name] for size in sizes.values()] for name in names}
    charts.bars(
        folder / "wire.png",
        {size: {n: r["p50"] for n, r in of["rows"].items()} for size, of in sizes.items()},
    )
    calls = [str(size["calls"]) for size in sizes.values()]
    return WIRE.format(
        calls=f"{', '.join(calls[:-1])} and {calls[-1]}",
        facts=_facts(results["machine"]),
        times=_table(
            ["row", *sizes],
            (
                [n, *(f"{charts.digits(r['p50'])} / {charts.digits(r['p90'])}" for r in rs)]
                for n, rs in by_row.items()
            ),
        ),
        ratios=_table(
            ["row", *sizes],
            (
                [n, *(f"{_naive(r):.1f}×, {_raw(r):.0%}" for r in rs)]
                for n, rs in by_row.items()
                if n.startswith("layertap")
            ),
        ),
    )


def _peers(results: dict[str, Any], folder: Path) -> str:
    rows, names = results["rows"], list(results["largest difference"])
    charts.bars(
        folder / "peers.png",
        {
            _peer_title(row): {name: each["p50"] for name, each in row["ms"].items()}
            for row in rows
            if row["callers"] == 1
        },
    )
    together = []
    for callers in dict.fromkeys(row["callers"] for row in rows if row["callers"] > 1):
        mine = [row for row in rows if row["callers"] == callers]
        file = f"peers_{callers}.png"
        charts.bars(
            folder / file,
            {
                _peer_title(row): {name: each["p50"] for name, each in row["rates"].items()}
                for row in mine
            },
            unit="answers a second",
        )
        table = _table(["", *names, "ahead"], _peer_rows(mine, names, "rates"))
        together.append(PEERS_TOGETHER.format(callers=callers, table=table, file=file))
    alone = [row for row in rows if row["callers"] == 1]
    excluded = results["left out"].items()
    if folder == common.RESULTS:
        _write_short_peers(results)
    return PEERS.format(
        threads=results["threads"],
        batching=results["batching"],
        rounds=_range([row["rounds"] for row in results["rows"]]),
        seconds=results["seconds"],
        processes=results["processes"],
        difference=max(results["largest difference"].values()),
        facts=_facts(results["machine"]),
        left_out="".join(f"- **{name}** is left out: {reason}\n" for name, reason in excluded),
        alone=_table(["", *names, "ahead"], _peer_rows(alone, names, "ms")),
        together="".join(together),
        behind=_behind(rows),
        versions="; ".join(f"{name}: {_facts(each)}" for name, each in results["versions"].items()),
        idle=", ".join(
            f"{100 * cores:.0f} % ({name.removesuffix('_peer')})"
            for name, cores in results["idle cores"].items()
        ),
    )


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def _peer_title(row: dict[str, Any]) -> str:
    """Return what callers send and get, such as ``a batch of 16, layer1 (12.8 MB)``."""
    nbytes = row["reply bytes"]
    size = f"{nbytes / 1e6:.3g} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:.0f} KB"
    sent = {"tensor": "a tensor", "image": "a photograph"}[row["sent"]]
    if row["batch"] > 1:
        sent = f"a batch of {row['batch']}"
    return f"{sent}, {row['layer']} ({size})"


def _peer_rows(rows: Sequence[dict[str, Any]], names: Sequence[str], what: str) -> list[list[str]]:
    return [
        [
            _peer_title(row),
            *(_quartiles(row[what][name]) if name in row[what] else "–" for name in names),
            f"{_ahead(row):.2f}×",
        ]
        for row in rows
    ]


def _ahead(row: dict[str, Any], name: str = "") -> float:
    """Return how many times as fast layertap is as a server, or as the fastest of the others."""
    ratios = {other: _times_as_fast(row, other) for other in row["ms"]}
    if name:
        return ratios[name]
    return min(ratio for other, ratio in ratios.items() if _is_other_server(other))


def _times_as_fast(row: dict[str, Any], other: str) -> float:
    if row["callers"] == 1:
        return float(row["ms"][other]["p50"] / row["ms"]["layertap"]["p50"])
    return float(row["rates"]["layertap"]["p50"] / row["rates"][other]["p50"])


def _is_other_server(name: str) -> bool:
    return name != "in process" and not name.startswith("layertap")


def _behind(rows: Sequence[dict[str, Any]]) -> str:
    """Return a list of the rows in which another server is ahead, with the reasons."""
    lines = []
    for row in rows:
        if (ratio := _ahead(row)) < 1:
            title = f"{_peer_title(row)}, callers: {row['callers']}"
            reason = BEHIND.get(title, "the reason was not examined")
            lines.append(f"- {title}: {ratio:.2f}×; {reason}\n")
    if not lines:
        return "layertap is ahead of every other server in every row.\n\n"
    return f"Rows in which another server is ahead of layertap:\n\n{''.join(lines)}\n"


def _write_short_peers(results: dict[str, Any]) -> None:
    """Write the short table into the project's README, between two comments."""
    file = common.HERE.parent / "README.md"
    before, begin, rest = file.read_text("utf-8").partition(PEERS_BEGIN)
    _, end, after = rest.partition(PEERS_END)
    if not end:
        return
    rows = results["rows"]
    others = [name for name in results["largest difference"] if _is_other_server(name)]
    shown = [
        [
            _peer_title(row),
            str(row["callers"]),
            *(f"{_ahead(row, name):.1f}×" if name in row["ms"] else "–" for name in others),
        ]
        for row in rows
    ]
    text = PEERS_SHORT.format(
        cores=results["threads"],
        callers=max(row["callers"] for row in rows),
        table=_table(["request", "callers", *others], shown),
    )
    file.write_text(f"{before}{begin}\n{text}\n{end}{after}", "utf-8")


def _server(results: dict[str, Any], folder: Path) -> str:
    latency, modes = results["latency"], results["throughput"]
    rows = []
    for name, row in latency.items():
        layer = name.partition(",")[0]
        plan = latency[f"{layer}, plan in process"]
        bare = latency[f"{layer}, bare gRPC server"]
        ratio, added = row["p50"] / plan["p50"], row["p50"] - plan["p50"]
        rows.append(
            [
                name,
                charts.digits(row["p50"]),
                charts.digits(row["p99"]),
                f"{ratio:.2f}×",
                charts.digits(added),
                f"{row['p50'] / bare['p50']:.2f}×" if row is not plan else "–",
            ]
        )
    clients = [name for name in next(iter(modes.values())) if name.endswith("clients")]
    bare_clients = [name for name in next(iter(modes.values())) if name.endswith("bare server")]
    rates = []
    for mode, of in modes.items():
        loop = of["loop in process"]
        shares = [f"{of[name]:.0f} ({of[name] / loop:.0%})" for name in clients + bare_clients]
        rates.append([mode, f"{loop:.0f}", *shares])
    charts.lines(
        folder / "server.png",
        {m: [(int(n.split()[0]), of[n]) for n in clients] for m, of in modes.items()},
        "clients", "requests per second",
    )  # fmt: skip
    return SERVER.format(
        latency=_table(
            ["", "p50", "p99", "relative to the plan", "added", "relative to the bare server"], rows
        ),
        first=len(results["first_requests"]["first"]),
        slowest=results["first_requests"]["slowest_of_first_to_median"],
        throughput=_table(["mode", "loop", *clients, *bare_clients], rates),
        batching=_table(
            ["mode and batching", "requests per second", "p50, ms", "p99, ms"],
            (
                [name, *(charts.digits(row[key]) for key in ("rate", "p50", "p99"))]
                for name, row in results["batching"].items()
            ),
        ),
        facts=_facts(results["machine"]),
    )


def _gpu_server(results: dict[str, Any], folder: Path) -> str:
    servers = results["servers"]
    first = next(of for of in servers.values() if "latency" in of)
    rows = []
    for name, row in first["latency"].items():
        parts = [
            charts.digits(row[part]) if part in row else "–"
            for part in ("prepare_ns", "queue_ns", "compute_ns", "total_ns")
        ]
        rows.append([name, _quartiles(row), *parts])
    callers = [who for who in next(iter(first["rates"].values())) if who != "loop"]
    rates = [
        [f"{server}, {case}", _quartiles(row["loop"])]
        + [f"{_quartiles(row[who])}, {row[who]['p50'] / row['loop']['p50']:.0%}" for who in callers]
        for server, of in servers.items()
        for case, row in of["rates"].items()
    ]
    sizes = first["large"]
    large = [
        [way, *(_quartiles(size["rows"][way]) for size in sizes.values())]
        for way in next(iter(sizes.values()))["rows"]
    ]
    charts.lines(
        folder / "gpu_server.png",
        {
            f"{server}, {case}": [(int(who), row[who]["p50"]) for who in callers]
            for server, of in servers.items()
            for case, row in of["rates"].items()
        },
        "callers", "answers per second",
    )  # fmt: skip
    return GPU_SERVER.format(
        extractor=results["extractor"],
        float32=results["machine"]["float32"],
        graphs=results["graphs"],
        loop=results["loop"],
        graph_loop=_graph_loop(results.get("graph_loop", {})),
        latency=_table(["", "p50 (quartiles)", "prepare", "queue", "compute", "total"], rows),
        rounds=results["rounds"],
        seconds=results["seconds"],
        rates=_table(["", "loop", *(f"{who} callers" for who in callers)], rates)
        + "\n\n![Answers a second by the number of callers](results/gpu_server.png)",
        large=_table(["", *sizes], large),
        facts=_facts(results["machine"]),
    )


def _graph_loop(rows: dict[str, dict[str, float]]) -> str:
    if not rows:
        return ""
    callers = [who for who in next(iter(rows.values())) if who != "loop"]
    shares = [
        [
            case,
            f"{row['loop']:.0f}",
            *(f"{row[w]:.0f} ({row[w] / row['loop']:.0%})" for w in callers),
        ]
        for case, row in rows.items()
    ]
    return GRAPH_LOOP.format(table=_table(["", "loop", *(f"{w} callers" for w in callers)], shares))


def _graphs(results: dict[str, Any], folder: Path) -> str:
    rows = []
    for title, sets in results["tables"].items():
        for layers, ways in sets.items():
            times = [charts.digits(ways[way]["p50"]) if way in ways else "–" for way in GRAPHED]
            rows.append([f"{title}, {layers}", *times])
    return GRAPHS.format(
        facts=_facts(results["machine"]), note=results["note"], table=_table(["", *GRAPHED], rows)
    )


def _quartiles(row: dict[str, float]) -> str:
    p25, p50, p75 = (charts.digits(row[key]) for key in ("p25", "p50", "p75"))
    return f"{p50} ({p25}–{p75})"


def _branches(results: dict[str, Any], folder: Path) -> str:
    speed = [
        [
            title,
            *(_quartiles(row) for row in each["ways"].values()),
            _quartiles(each["guard"]),
            f"{_quartiles(each['speed-up, by turn'])}",
        ]
        for title, each in results["batches"].items()
    ]
    ways = next(iter(results["batches"].values()))["ways"]
    shares = [
        [
            name,
            f"{each['of TORCHSCRIPT']} of {each['layers of HOOK']}",
            str(each["values compared"]),
            str(each["wrong"]),
        ]
        for name, each in results["architectures"].items()
    ]
    return BRANCHES.format(
        tokens=results["tokens"],
        layers=results["layers"],
        turns=results["turns"],
        threads=results["threads"],
        facts=_facts(results["machine"]),
        speed=_table(["", *ways, "its guard alone", "speed-up"], speed),
        shares=_table(["model", "layers of TORCHSCRIPT", "values compared", "wrong"], shares),
    )


def _text(results: dict[str, Any], folder: Path) -> str:
    rows = [[name, _quartiles(row)] for name, row in results["milliseconds"].items()]
    ratios = [f"{each['p50']:.2f}× ({name})" for name, each in results["ratios"].items()]
    over = results["last token, over the pass and the floor"]
    return TEXT.format(
        tokens=results["tokens"],
        threads=results["threads"],
        facts=_facts(results["machine"]),
        table=_table(["", "milliseconds"], rows),
        ratios=" and ".join(ratios),
        overheads=" and ".join(f"{value:.1f} ms ({name})" for name, value in over.items()),
    )


def _encode(results: dict[str, Any], folder: Path) -> str:
    rows = []
    for name, ways in results["cases"].items():
        theirs, own = ways["torch's steps"]["p50"], ways["ours"]["p50"]
        copy = ways["memcpy of float32"]["p50"]
        faster = f"{charts.digits(own)} ({theirs / own:.1f}×)"
        shown = [charts.digits(copy), charts.digits(theirs), faster]
        both = [f"{ways[way]:.2f}×" for way in ("two threads", "two threads, memcpy")]
        rows.append([name, *shown, *both])
    head = ["", "memcpy of float32", "torch's steps", "layertap", "two threads", "of memcpy"]
    return ENCODE.format(table=_table(head, rows), facts=_facts(results["machine"]))


def _hook(results: dict[str, Any], folder: Path) -> str:
    ways = results["ways"]
    first = next(iter(ways.values()))
    rows = [
        [
            way,
            charts.digits(row["p50"]),
            f"{first['p50'] / row['p50']:.2f}×",
            f"{row['peak_mib']:.0f}",
        ]
        for way, row in ways.items()
    ]
    return HOOK.format(
        layers=first["layers"],
        message=first["message_mib"],
        table=_table(["method", "p50, ms", "", "MiB that the first call added to the peak"], rows),
        facts=_facts(results["machine"]),
    )


def _gradients(results: dict[str, Any], folder: Path) -> str:
    ways = results["ways"]
    middle = {way: row["p50"] for way, row in ways.items()}
    return GRADIENTS.format(
        cam=middle["Grad-CAM"] / middle["forward pass"],
        sweep=middle["integrated gradients"] / middle["integrated gradients by hand"],
        rows=results["rows"],
        threads=results["threads"],
        table=_table(["", "ms (quartiles)"], [[way, _quartiles(row)] for way, row in ways.items()]),
        facts=_facts(results["machine"]),
    )


def _interventions(results: dict[str, Any], folder: Path) -> str:
    ways, ratios = results["ways"], results["ratios"]
    return INTERVENTIONS.format(
        ratios=", ".join(f"**{ratio:.2f} ×** at {layer}" for layer, ratio in ratios.items()),
        threads=results["threads"],
        table=_table(["", "ms (quartiles)"], [[way, _quartiles(row)] for way, row in ways.items()]),
        facts=_facts(results["machine"]),
    )


def _plain_beside(results: dict[str, Any], folder: Path) -> str:
    servers, with_clients = "before", "before, with its own client"
    rows = [
        [
            name,
            *(_quartiles(row[side]) for side in (servers, with_clients, "now")),
            *(
                "{p50:.3f} ({p25:.3f}–{p75:.3f})".format(
                    **row["now beside"][side]["ratio, by round"]
                )
                for side in (servers, with_clients)
            ),
        ]
        for name, row in results["milliseconds"].items()
    ]
    head = ["", servers, with_clients, "now", "the server: now / before", "with the clients"]
    return PLAIN_BESIDE.format(
        rounds=results["rounds"],
        calls=results["calls in a turn"],
        **results["commits"],
        compared=results["plain replies of equal bits"],
        **results["mixed"],
        facts=_facts(results["machine"]),
        table=_table(head, rows),
    )


def _races(results: dict[str, Any], folder: Path) -> str:
    rows = results["rows"]
    ways = list(next(iter(rows.values()))["milliseconds"])
    table = [
        [
            name,
            *(_quartiles(row["milliseconds"][way]) for way in ways),
            row["race"].split(" was ")[0],
            row["best"].upper(),
            "{p50:.3f} ({p25:.3f}–{p75:.3f})".format(**row["AUTO / best, by round"]),
        ]
        for name, row in rows.items()
    ]
    return RACES.format(
        rounds=results["rounds"],
        threads=results["threads"],
        facts=_facts(results["machine"]),
        table=_table(
            [
                "model, layer, items",
                *(way.upper() for way in ways),
                "AUTO took",
                "best",
                "AUTO / best",
            ],
            table,
        ),
    )


def _packages(results: dict[str, Any], folder: Path) -> str:
    table = [
        [
            name if name in ("no pass", "torch's own loader") else name.upper(),
            _quartiles(row["pass_ms"]),
            f"{row['latest_of_a_pass_ms']:.1f}",
            f"{row['latest_ms']:.1f}",
            _quartiles(row["late_ms"]),
        ]
        for name, row in results["stalls"].items()
    ]
    return PACKAGES.format(
        batch=results["batch"],
        rounds=results["rounds"],
        restarts=results["restarts"],
        facts=_facts(results["machine"]),
        table=_table(
            ["", "a pass", "latest, median of the passes", "latest of all", "all sleeps"], table
        ),
        restarted=_table(
            ["", "s"], [[step, _quartiles(row)] for step, row in results["seconds"].items()]
        ),
    )


def _start(results: dict[str, Any], folder: Path) -> str:
    return START.format(
        rounds=results["rounds"],
        layers=", ".join(f"`{layer}`" for layer in results["layers"]),
        ratio=_quartiles(results["times_as_long_as_plain"]),
        facts=_facts(results["machine"]),
        table=_table(
            ["", "s"], [[way, _quartiles(row)] for way, row in results["seconds"].items()]
        ),
    )


def _first_runs(results: dict[str, Any], folder: Path) -> str:
    table = [
        [
            name,
            *(
                cell
                for row in ways.values()
                for cell in (
                    ", ".join(f"{each:.0f}" for each in row["first_ms"]),
                    _quartiles(row["later_ms"]),
                )
            ),
        ]
        for name, ways in results["models"].items()
    ]
    ways = list(next(iter(results["models"].values())))
    head = ["", *(cell for way in ways for cell in (f"{way}: first three", f"{way}: later"))]
    return FIRST_RUNS.format(
        copies=results["copies"],
        rounds=results["rounds"],
        facts=_facts(results["machine"]),
        table=_table(head, table),
    )


def _images(results: dict[str, Any], folder: Path) -> str:
    parts = {"decode a JPEG, 512 × 600": results["decoders"], **results["ways"]}
    parts[f"{results['count']} of them"] = results["batch"]
    parts["a call"] = results["calls"]
    return IMAGES.format(
        added=results["added_ms"],
        cores=results["cores_ratio"],
        count=results["count"],
        table=_table(
            ["", "", "ms (quartiles)"],
            [
                [part, way, _quartiles(row)]
                for part, ways in parts.items()
                for way, row in ways.items()
            ],
        ),
        facts=_facts(results["machine"]),
    )


def _growth(results: dict[str, Any], folder: Path) -> str:
    curves = results["curves"]
    charts.curves(folder / "growth.png", curves)
    rows = [
        [
            name,
            f"{curve['y']} / {curve['x']}",
            ", ".join(
                f"{charts.digits(y)} / {x if isinstance(x, int) else charts.digits(x)}"
                for x, y in curve["points"]
            ),
            f"{curve['slope']:.2f}",
            f"{curve['end']:.2f}",
            f"{curve['expected']:.2f}",
            "bends" if curve["bends"] else "as expected",
        ]
        for name, curve in curves.items()
    ]
    return GROWTH.format(
        seconds=results["seconds"],
        facts=_facts(results["machine"]),
        table=_table(
            ["curve", "what", "points", "slope", "at the end", "at most", "verdict"], rows
        ),
    )


def _memory(results: dict[str, Any], folder: Path) -> str:
    curve = results["resident_mib"]
    half = len(curve) // 2
    charts.lines(folder / "memory.png", {"server": curve}, "requests", "resident memory, MiB")
    return MEMORY.format(
        requests=results["requests"],
        start=curve[0][1],
        first=max(mib for _, mib in curve[:half]),
        second=max(mib for _, mib in curve[half:]),
        facts=_facts(results["machine"]),
    )


def _sentences(results: dict[str, Any], folder: Path) -> str:
    rows = [
        [way, f"{row['items a second']:.0f}", f"{row['relative']:.2f}×",
         f"{row['largest difference']:.0e}"]
        for way, row in results["ways"].items()
    ]  # fmt: skip
    return SENTENCES.format(
        **results["tokens"],
        turns=results["turns"],
        facts=_facts(results["machine"]),
        table=_table(["", "sentences a second", "relative", "largest difference"], rows),
    )


def _dataset(results: dict[str, Any], folder: Path) -> str:
    rates, memory = results["rates"], results["memory"]
    rows = [
        [way, f"{row['items a second']:.1f}", f"{row['of the bare plan']:.2f}×",
         f"{row['largest difference']:.0e}"]
        for way, row in rates["ways"].items()
    ]  # fmt: skip
    return DATASET.format(
        items=rates["items"],
        turns=rates["turns"],
        extractor=rates["extractor"].upper(),
        facts=_facts(results["machine"]),
        table=_table(["", "photos a second", "relative", "largest difference"], rows),
        output=memory["output bytes"] / 1e9,
        budget=memory["budget bytes"] / (1 << 20),
        before=memory["engine peak bytes"] / (1 << 20),
        peak=memory["peak bytes"] / (1 << 20),
        allowed=(memory["engine peak bytes"] + memory["budget bytes"]) / (1 << 20),
    )


def _ray_serve(results: dict[str, Any], folder: Path) -> str:
    ways = list(next(iter(results["latency"].values())))
    times = [
        [case, *(f"{by_way[way]['p50']:.2f} / {by_way[way]['p99']:.2f}" for way in ways)]
        for case, by_way in results["latency"].items()
    ]
    rates = [
        [what, *(f"{by_way[way]:.1f}" for way in ways)] for what, by_way in results["rates"].items()
    ]
    return RAY_SERVE.format(
        facts=_facts(results["machine"]),
        callers=results["callers"],
        times=_table(["reply", *ways], times),
        rates=_table(["a second", *ways], rates),
    )


def _ray_data(results: dict[str, Any], folder: Path) -> str:
    rates = results["rates"]
    rows = [[actors, f"{rate:.1f}", f"{rate / rates['1']:.2f}×"] for actors, rate in rates.items()]
    return RAY_DATA.format(
        items=results["items"],
        rounds=results["rounds"],
        facts=_facts(results["machine"]),
        table=_table(["actors", "items a second", "relative"], rows),
    )


def _naive(row: dict[str, float]) -> float:
    return row["times_as_fast_as_naive"]


def _raw(row: dict[str, float]) -> float:
    return row["share_of_raw_tcp"]


def _facts(machine: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in machine.items() if value)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


SECTIONS: dict[str, Section] = {
    "extractors": _extractors,
    "matrix": _matrix,
    "matrix_tf32": _matrix_tf32,
    "races": _races,
    "packages": _packages,
    "start": _start,
    "first_runs": _first_runs,
    "graphs": _graphs,
    "server": _server,
    "peers": _peers,
    "gpu_server": _gpu_server,
    "branches": _branches,
    "text": _text,
    "wire": _wire,
    "encode": _encode,
    "hook": _hook,
    "gradients": _gradients,
    "interventions": _interventions,
    "plain_beside": _plain_beside,
    "images": _images,
    "memory": _memory,
    "growth": _growth,
    "sentences": _sentences,
    "dataset": _dataset,
    "ray_serve": _ray_serve,
    "ray_data": _ray_data,
}


if __name__ == "__main__":
    write()
