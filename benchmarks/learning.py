"""Trains a config several ways on the same data and compares their held-out losses and training losses.

    python benchmarks/learning.py configs/samba_1.3b.yaml --data data/prose --folder runs/fp8 --gpus 0 1 \\
        --run bf16= --run "bf16, seed 2=run.seed=2" --run fp8=train.matmul_precision=fp8 train.steps=1000
    python benchmarks/learning.py --read --folder runs/fp8 --plot fp8.png

A run is NAME=OVERRIDES; the first is what the others are compared with. Each takes one of the GPUs (--gpus; without it
one run after the other on what there is). A run that is in the folder is not run again, one that was cut off goes on
from its checkpoint if it has one, and the last step's checkpoint is not waited for. With --read none is run.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from step import stop

from sambalm.pretrain.config_file import load_config
from sambalm.pretrain.reporting.metrics_file import read_metrics
from sambalm.pretrain.validation import LOSS_AT

Records = list[dict[str, Any]]
NAMES = "runs.json"  # of the runs in a folder, in order
POLL_S = 0.5
SMOOTHED_STEPS = 25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", help="not needed with --read")
    parser.add_argument("--data", help="prefix of token shards")
    parser.add_argument("--folder", type=Path, required=True, help="where the runs go")
    parser.add_argument("--run", action="append", default=[], help="NAME=OVERRIDES; may be repeated")
    parser.add_argument("--gpus", nargs="+", default=[None], help="numbers of the GPUs to train on at the same time")
    parser.add_argument("--plot", type=Path, help="where to draw losses and their differences")
    parser.add_argument("--read", action="store_true", help="only read the runs that are in the folder")
    arguments, overrides = parser.parse_known_intermixed_args()
    if not arguments.read:
        if not (arguments.config and arguments.data and arguments.run):
            parser.error("a config, --data and --run are needed, or --read")
        train_all(arguments, [f"data.train={arguments.data}", *overrides])
    names = json.loads((arguments.folder / NAMES).read_text())
    runs = {name: records for name, folder in names.items() if (records := read_metrics(arguments.folder / folder))}
    print_losses(runs)
    if arguments.plot:
        plot(runs, arguments.plot)


def train_all(arguments: argparse.Namespace, overrides: list[str]) -> None:
    runs = dict(run.split("=", 1) for run in arguments.run)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    known = arguments.folder / NAMES
    folders = json.loads(known.read_text()) if known.exists() else {}
    folders |= {name: "".join(c if c.isalnum() else "-" for c in name) for name in runs}
    known.write_text(json.dumps(folders))
    gpus: SimpleQueue[str | None] = SimpleQueue()
    for gpu in arguments.gpus:
        gpus.put(gpu)

    def train_one(name: str) -> None:
        gpu = gpus.get()
        try:
            train(arguments.config, arguments.folder / folders[name], [*overrides, *runs[name].split()], gpu=gpu)
        finally:
            gpus.put(gpu)

    with ThreadPoolExecutor(len(arguments.gpus)) as pool:
        list(pool.map(train_one, runs))


def train(config: str, folder: Path, overrides: Sequence[str], *, gpu: str | None) -> None:
    """Runs until the last step's held-out loss is there."""
    settings = [*overrides, f"run.dir={folder}"]
    last_step = load_config(Path(config), settings).train.steps
    if is_done(read_metrics(folder), last_step):
        return
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu is not None else {})
    command = [sys.executable, "-m", "sambalm.pretrain.cli", "train", config, *settings]
    process = subprocess.Popen(command, env=environment, stdout=sys.stderr)
    while not is_done(read_metrics(folder), last_step):
        if process.poll() is not None:
            sys.exit(f"{folder}: the run ended with exit code {process.returncode}")
        time.sleep(POLL_S)
    stop(process)


def is_done(records: Records, last_step: int) -> bool:
    return bool(records) and records[-1]["step"] >= last_step


def held_out(records: Records) -> list[tuple[int, float]]:
    """Steps and the held-out losses at the shortest length."""
    names = {name for record in records for name in record if name.startswith(LOSS_AT)}
    name = min(names, key=lambda name: int(name.removeprefix(LOSS_AT)))
    return [(record["step"], record[name]) for record in records if name in record]


def print_losses(runs: dict[str, Records]) -> None:
    base = next(iter(runs.values()))
    print("Held-out loss, nats a token\n\n| step | training tokens | " + " | ".join(runs) + " |")
    print("| ---: | ---: |" + " ---: |" * len(runs))
    losses = {name: dict(held_out(records)) for name, records in runs.items()}
    tokens = {record["step"]: record["tokens"] for record in base}
    for step, _ in held_out(base):
        row = " | ".join(f"{found[step]:.4f}" if step in found else "" for found in losses.values())
        print(f"| {step:,} | {tokens[step]:,} | {row} |")
    first = next(iter(runs))
    print(
        f"\n| run, to its step | held-out loss less that of {first} | training loss of a tenth of the steps, so ",
        end="",
    )
    print("| tokens/s, median | peak GiB | seconds in steps |\n| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, records in runs.items():
        difference = losses[name][max(losses[name])] - losses[first].get(max(losses[name]), float("nan"))
        print(
            f"| {name}, {len(records):,} | {difference:+.4f} "
            f"| {last_tenth(records) - last_tenth(base[: len(records)]):+.4f} "
            f"| {statistics.median(r['tokens_per_second'] for r in records):,.0f} "
            f"| {records[-1].get('peak_memory_bytes', 0) / 2**30:.1f} | {sum(r['step_time_s'] for r in records):,.0f} |"
        )


def last_tenth(records: Records) -> float:
    return statistics.fmean(record["loss"] for record in records[-max(len(records) // 10, 1) :])


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean of each value and those before it, as many as there are up to SMOOTHED_STEPS."""
    return [statistics.fmean(values[max(0, end - SMOOTHED_STEPS) : end]) for end in range(1, len(values) + 1)]


def plot(runs: dict[str, Records], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (losses, gaps) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    (first, base), *_ = runs.items()
    for name, records in runs.items():
        (line,) = losses.plot(smoothed([record["loss"] for record in records]), linewidth=0.9, label=name)
        losses.plot(*zip(*held_out(records), strict=True), "o", markersize=4, color=line.get_color())
        if name != first:
            pairs = zip(records, base, strict=False)
            gaps.plot(smoothed([a["loss"] - b["loss"] for a, b in pairs]), color=line.get_color(), label=name)
            there = dict(held_out(base))
            found = [(step, loss - there[step]) for step, loss in held_out(records) if step in there]
            gaps.plot(*zip(*found, strict=True), "o", markersize=4, color=line.get_color())
    losses.set(xlabel="step", ylabel="loss, nats a token (dots: held out)", yscale="log")
    gaps.set(xlabel="step", ylabel=f"loss less that of {first}", ylim=(-0.1, 0.1))
    gaps.axhline(0, color="gray", linewidth=0.5)
    for axes in (losses, gaps):
        axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
