# SPDX-License-Identifier: Apache-2.0
"""Kills compressions at random moments, with SIGKILL, and resumes them: is what they write what an uninterrupted run writes?

Every row of results/killed.jsonl is one kill: when, what of the work folder was there, how long the resumed run took, and the files of
the output that differ from the uninterrupted run's; the report is compared without its times.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import here

RESULTS = Path(__file__).parent / "results" / "killed.jsonl"
# what of a report tells of the run, not of what it wrote
TIMES = ("seconds", "created", "memory")


def command(options: argparse.Namespace, output: Path, *more: str) -> list[str]:
    """The command line of a compression."""
    told = [str(options.model), "--output", str(output), "--dataset", str(options.calibration)]
    told += ["--bits", str(options.bits), "--num-samples", str(options.samples), "--seq-len", str(options.seq_len)]
    return [sys.executable, "-m", "transformers_mcmoe", "compress", *told, *options.options, *more]


def run(arguments: list[str], after: float | None = None) -> float:
    """Run to the end, or kill after so many seconds; returns the seconds that it took."""
    started = time.monotonic()
    running = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        _, said = running.communicate(timeout=after)
    except subprocess.TimeoutExpired:
        running.send_signal(signal.SIGKILL)
        running.communicate()
        return time.monotonic() - started
    if running.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{said.decode()}")
    return time.monotonic() - started


def timed(options: argparse.Namespace) -> tuple[float, float]:
    """Seconds until a layer is finished, and until an uninterrupted run is."""
    records = options.work / ".whole.mcmoe-work" / "records"
    started = time.monotonic()
    running = subprocess.Popen(command(options, options.work / "whole"), stdout=subprocess.DEVNULL)
    while running.poll() is None and not records.exists():
        time.sleep(0.01)
    first = time.monotonic() - started
    if running.wait():
        raise SystemExit("The uninterrupted run failed.")
    return first, time.monotonic() - started


def content(folder: Path) -> dict[str, Any]:
    """Every file of an output, and its report without times."""
    files: dict[str, Any] = {file.name: file.read_bytes() for file in folder.iterdir()}
    report = json.loads(files.pop("mcmoe_report.json"))
    return files | {"mcmoe_report.json": {name: value for name, value in report.items() if name not in TIMES}}


def main() -> None:
    """Append a row for every kill."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the dense checkpoint")
    parser.add_argument("--calibration", type=Path, required=True, help="text to calibrate on")
    parser.add_argument("--work", type=Path, required=True, help="folder for outputs")
    parser.add_argument("--bits", type=float, default=2.54)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--begun", action="store_true", help="kill once a layer is finished")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("options", nargs="*", help="further options of `mcmoe compress`, behind --")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    first, whole = timed(options)
    expected, moments = content(options.work / "whole"), random.Random(options.seed)
    for kill in range(options.kills):
        output = options.work / f"killed{kill}"
        work = output.with_name(f".{output.name}.mcmoe-work")
        for folder in (output, work):
            shutil.rmtree(folder, ignore_errors=True)
        moment = moments.uniform(first if options.begun else 0.0, whole)
        run(command(options, output), moment)
        there = sorted(str(file.relative_to(work)) for file in work.rglob("*") if file.is_file())
        resumed = run(command(options, output, "--resume"))
        found = content(output)
        row = {
            "model": options.model.name,
            "kill": kill,
            "seed": options.seed,
            "options": options.options,
            "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
            "seconds": round(whole, 1),
            "killed_after": round(moment, 2),
            "finished": sum(name.startswith("records/") for name in there),
            "resumed_seconds": round(resumed, 1),
            "different": sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name)),
        } | here()
        print(row, flush=True)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        shutil.rmtree(output)


if __name__ == "__main__":
    main()
