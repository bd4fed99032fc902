"""Are all answers about models of public packages right?

``tools/drive_packages.py`` makes an environment for each group of packages and runs this file in
it: every model of the group is served by HOOK, TORCHSCRIPT and AUTO, three requests in a row and in
throughput mode to eight callers, and each answer is held against a fresh instance of the model.
Random weights, the smallest configurations. The group's rows go into a JSON file.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing is downloaded: what asks a hub fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"
TESTS = Path(__file__).resolve().parent.parent
sys.path[:1] = [str(TESTS), str(TESTS / "coverage"), str(TESTS.parent / "server")]

from layertap import Extractor
from packages.subject import subjects_in
from zoo.drive import Grid, Way
from zoo.prove_zoo import Row, rows, say

GRID = Grid(
    (Way("latency", callers=()), Way("throughput, declared", instances=2, declared=2)),
    singles=(),
    extractors=(Extractor.HOOK, Extractor.TORCHSCRIPT, Extractor.AUTO),
    most=200,
    compiled=12,
)


def main() -> int:
    """Test the named models of a group, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("group", help="a file of this folder without .py, such as huggingface")
    parser.add_argument("names", nargs="*", help="models; all of the group if none")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="models at once")
    parser.add_argument("--limit", type=float, default=600, help="seconds for one model")
    parser.add_argument("--device", default="cpu", help="what the models run on")
    parser.add_argument("--write", type=Path, help="the JSON file to write")
    options = parser.parse_args()
    subjects = subjects_in(importlib.import_module(f"packages.{options.group}"))
    chosen = [s for s in subjects if not options.names or s.name in options.names]
    found: list[Row] = []
    for row in rows(chosen, GRID, options.jobs, options.limit, options.device):
        found.append(row)
        say(row)
        if options.write:
            options.write.parent.mkdir(parents=True, exist_ok=True)
            options.write.write_text(json.dumps([asdict(each) for each in found]), "utf-8")
    wrong = sum(len(row.wrong) + len(row.failed) for row in found)
    print(f"{len(found)} models of {options.group}: {wrong} layers wrong or failed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
