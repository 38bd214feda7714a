"""Trains a config for a few steps on random tokens and prints its speed, and with --profile where a step's time goes.

    python benchmarks/step.py configs/samba_1.3b.yaml train.global_batch_tokens=16384 train.micro_batch_size=4
    python benchmarks/step.py configs/samba_1.3b.yaml --profile train.global_batch_tokens=16384 train.micro_batch_size=4

The steps are those of `sambalm train`, loader, clipping and optimizer included; without --profile it is that program
that runs. Several --with SETTINGS, each a list of overrides in quotes, are trained one after the other and compared.
"""

import argparse
import collections
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from sambalm.pretrain.config import load_config

PROFILED_STEPS = 3
# What a GPU kernel belongs to, by the first pattern that its name matches.
PARTS = {
    "scan": r"scan_(forward|backward|combine)|selective_scan",
    "convolution": r"conv_(forward|backward)|causal_conv1d",
    "attention": r"flash|fmha|sdpa",
    "matrix products": r"gemm|nvjet|cutlass|xmma|splitK",
    "optimizer": r"adam|lpnorm|multi_tensor",
    "compiled elementwise": r"^triton",
    "copies": r"(?i)copy|cat|memset",
    "elementwise and sums": r"",
}


def write_tokens(prefix: Path, *, vocab_size: int, tokens: int) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    random = np.random.default_rng(0)
    for _ in range(8):
        builder.add_document(torch.from_numpy(random.integers(0, vocab_size, tokens // 8)), [tokens // 8])
    builder.finalize(f"{prefix}.idx")


def settings_of(arguments: argparse.Namespace, folder: Path, overrides: list[str]) -> list[str]:
    config = load_config(Path(arguments.config), [*overrides, "data.train=x", "run.dir=x"])
    tokens = 4 * (arguments.steps + 2) * config.train.global_batch_tokens + 64 * config.data.sequence_length
    write_tokens(folder / "tokens", vocab_size=config.model.vocab_size, tokens=tokens)
    values = {
        "run.dir": folder / "run",
        "data.train": folder / "tokens",
        "data.cache_dir": folder / "cache",
        "data.validation_fraction": 0.2,
        "train.steps": arguments.steps + 2,
        "validation.tokens": 1,
        "validation.length_multiples": "[1]",
        "checkpoint.every_steps": 1_000_000,
    }
    return [*(f"{key}={value}" for key, value in values.items()), *overrides]


def measure(arguments: argparse.Namespace, overrides: list[str]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(arguments, Path(folder), overrides)
        command = [sys.executable, "-m", "sambalm.pretrain.cli", "train", arguments.config, *settings]
        metrics, errors = Path(folder) / "run/metrics.jsonl", Path(folder) / "errors"
        with errors.open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        records = []
        while len(records) < arguments.steps:
            if process.poll():
                return f"| failed: {errors.read_text().strip().splitlines()[-1][:90]} | | | | "
            time.sleep(0.2)
            lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
            records = [json.loads(line) for line in lines if line.endswith("\n")]
        process.kill()  # the checkpoint at a run's end would take longer than its steps
        process.wait()
    steady, last = records[len(records) // 2 :], records[-1]
    speeds = [record["tokens_per_second"] for record in steady]
    mfu = statistics.median(record.get("mfu", 0) for record in steady)
    return (
        f"| {statistics.median(speeds):,.0f} | {min(speeds):,.0f} to {max(speeds):,.0f} | {mfu:.1%} "
        f"| {last.get('peak_memory_bytes', 0) / 2**30:.1f} | {last['loss']:.4f}"
    )


def profile(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from sambalm.parallel.state import start_world
    from sambalm.pretrain.run_folder import open_run_folder
    from sambalm.pretrain.signals import Signals
    from sambalm.pretrain.trainer import Trainer

    with tempfile.TemporaryDirectory() as folder:
        config = load_config(Path(arguments.config), settings_of(arguments, Path(folder), overrides))
        with open_run_folder(config) as run_folder, start_world(config.parallel) as world:
            trainer = Trainer(config, world, folder=run_folder, signals=Signals())

            for _ in range(arguments.steps - PROFILED_STEPS):
                trainer._launch_step()
            torch.cuda.synchronize()
            # Without the host's side, which would slow the host down.
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
                start_s = time.perf_counter()
                for _ in range(PROFILED_STEPS):
                    trainer._launch_step()
                torch.cuda.synchronize()
                wall_s = (time.perf_counter() - start_s) / PROFILED_STEPS
            trainer.loader.close()
    print_parts(found, wall_s=wall_s, top=arguments.top)


def print_parts(found: torch.profiler.profile, *, wall_s: float, top: int) -> None:
    kernels, parts, waits = collections.Counter(), collections.Counter(), collections.Counter()
    events = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    for event in events:
        kernels[event.name] += event.device_time / PROFILED_STEPS / 1e3
    events.sort(key=lambda event: event.time_range.start)
    for before, after in itertools.pairwise(events):
        wait_ms = (after.time_range.start - before.time_range.end) / PROFILED_STEPS / 1e3
        waits[f"{before.name[:50]} | {after.name[:50]}"] += max(0.0, wait_ms)
    for name, ms in kernels.items():
        parts[next(part for part, pattern in PARTS.items() if re.search(pattern, name))] += ms
    parts["idle"] = wall_s * 1e3 - sum(parts.values())
    print(f"\n| part of a step | ms | share of {wall_s * 1e3:.1f} ms |\n| --- | ---: | ---: |")
    for part, ms in parts.most_common():
        print(f"| {part} | {ms:.2f} | {ms / wall_s / 10:.1f}% |")
    print("\n| kernel | ms a step |\n| --- | ---: |")
    for name, ms in kernels.most_common(top):
        print(f"| {name[:100]} | {ms:.2f} |")
    print("\n| idle between | and | ms a step |\n| --- | --- | ---: |")
    for names, ms in waits.most_common(8):
        print(f"| {names} | {ms:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--with", dest="variants", action="append", default=[], metavar="SETTINGS")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--top", type=int, default=25, help="kernels to list")
    arguments, overrides = parser.parse_known_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{device}, torch {torch.__version__}; {arguments.config} {' '.join(overrides)}")
    variants = arguments.variants or [""]
    if arguments.profile:
        for variant in variants:
            print(f"\n{variant}")
            profile(arguments, [*overrides, *variant.split()])
        return
    print("\n| settings | tokens/s | lowest to highest | MFU | peak GiB | last loss |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for variant in variants:
        print(f"| {variant or 'as it is'} {measure(arguments, [*overrides, *variant.split()])} |")


if __name__ == "__main__":
    main()
