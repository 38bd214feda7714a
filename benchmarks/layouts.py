"""Trains the same model for a few steps on several layouts and prints losses, speed and memory side by side.

    python benchmarks/layouts.py configs/samba_421m.yaml --data data/slimpajama --folder runs/layouts \
        train.global_batch_tokens=65536

Every layout sees the same samples in the same order from the same initial weights, so losses may differ by rounding
alone. The difference that is printed is the largest over all steps from one process without any parallelism.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

LAYOUTS = {
    "one process": (1, []),
    "TP2": (2, ["parallel.tensor=2"]),
    "TP2 + SP": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "PP2": (2, ["parallel.pipeline=2"]),
    "PP2 x VPP2": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "DP2, ZeRO-1": (2, ["parallel.zero_stage=1"]),
    "DP2, ZeRO-3": (2, ["parallel.zero_stage=3"]),
    "CP2": (2, ["parallel.context=2"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--data", required=True, help="prefix of token shards")
    parser.add_argument("--folder", type=Path, required=True, help="where the runs go; a finished one is not run again")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS), choices=list(LAYOUTS), metavar="LAYOUT")
    arguments, overrides = parser.parse_known_args()

    runs = {}
    for name in arguments.layouts:
        ranks, layout = LAYOUTS[name]
        folder = arguments.folder / name.replace(" ", "").replace(",", "-")
        run(arguments, folder, ranks=ranks, overrides=[*overrides, *layout])
        runs[name] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    Console(width=110).print(table(runs))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    print(f"{device}, torch {torch.__version__}; {arguments.config} {' '.join(overrides)}, {arguments.steps} steps")


def run(arguments: argparse.Namespace, folder: Path, *, ranks: int, overrides: list[str]) -> None:
    values = {
        "run.dir": folder,
        "data.train": arguments.data,
        "train.steps": arguments.steps,
        "validation.tokens": 1,
        "validation.length_multiples": "[1]",
        "checkpoint.every_steps": 1_000_000,
        "parallel.tensor": 1,
    }
    settings = [f"{key}={value}" for key, value in values.items()]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *launcher, "-m", "sambalm.pretrain.cli", "train", arguments.config]
    subprocess.run([*command, *settings, *overrides], check=True)


def table(runs: dict[str, list[dict]]) -> Table:
    columns = (
        "layout",
        "last loss",
        "largest loss difference",
        "largest norm difference",
        "tokens/s",
        "peak GiB a rank",
    )
    result = Table(*columns)
    base = next(iter(runs.values()))
    for name, records in runs.items():
        memory = records[-1].get("peak_memory_bytes")
        result.add_row(
            name,
            f"{records[-1]['loss']:.4f}",
            f"{max(abs(r['loss'] - b['loss']) for r, b in zip(records, base, strict=True)):.1e}",
            f"{max(abs(r['grad_norm'] / b['grad_norm'] - 1) for r, b in zip(records, base, strict=True)):.1e}",
            f"{statistics.median(r['tokens_per_second'] for r in records[len(records) // 2 :]):,.0f}",
            f"{memory / 2**30:.1f}" if memory else "",
        )
    return result


if __name__ == "__main__":
    main()
