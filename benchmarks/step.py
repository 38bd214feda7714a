"""Trains a config for a few steps on random tokens and prints its speed and CPU time, or --profile: a step's parts.

    python benchmarks/step.py configs/samba_1.3b.yaml train.global_batch_tokens=16384 train.micro_batch_size=4
    python benchmarks/step.py configs/samba_1.3b.yaml --profile train.global_batch_tokens=16384 train.micro_batch_size=4
    python benchmarks/step.py configs/samba_421m.yaml --gpus 2 --profile train.global_batch_tokens=32768 \
        train.micro_batch_size=4
    python benchmarks/step.py configs/samba_421m.yaml --document-tokens 512 train.global_batch_tokens=16384 \
        train.micro_batch_size=4 --with data.reset_at_document=false --with data.reset_at_document=true

The steps are those of `sambalm train`, loader, clipping and optimizer included; without --profile it is that program
that runs. Several --with SETTINGS, each a list of overrides in quotes, are trained one after the other and compared.
On several GPUs the profile is the first one's, and what ranks send each other may run beside other kernels.
"""

import argparse
import collections
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import psutil
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from sambalm.pretrain.config_file import load_config

PROFILED_STEPS = 3
# What a GPU kernel belongs to, by the first pattern that its name matches.
PARTS = {
    "messages": r"(?i)nccl",
    "scan": r"scan_(forward|backward|combine)|selective_scan",
    "convolution": r"conv_(forward|backward)|causal_conv1d",
    "rounding to FP8": r"_round_tile",
    "attention": r"flash|fmha|sdpa",
    "matrix products": r"gemm|nvjet|cutlass|xmma|splitK",
    "optimizer": r"adam|lpnorm|multi_tensor",
    "compiled elementwise": r"^triton",
    "copies": r"(?i)copy|cat|memset",
    "elementwise and sums": r"",
}


def write_tokens(prefix: Path, *, vocab_size: int, tokens: int, document_tokens: int | None) -> None:
    """Documents of random lengths around a mean; without one 8 long ones."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    random = np.random.default_rng(0)
    mean = document_tokens or tokens // 8
    lengths = random.integers(mean // 2 + 1, mean * 3 // 2 + 1, tokens // mean + 1) if document_tokens else [mean] * 8
    for length in lengths:
        builder.add_document(torch.from_numpy(random.integers(0, vocab_size, length)), [int(length)])
    builder.finalize(f"{prefix}.idx")


def settings_of(arguments: argparse.Namespace, folder: Path, overrides: list[str]) -> list[str]:
    config = load_config(Path(arguments.config), [*overrides, "data.train=x", "run.dir=x"])
    tokens = 4 * (arguments.steps + 2) * config.train.global_batch_tokens + 64 * config.data.sequence_length
    size = config.model.vocab_size
    write_tokens(folder / "tokens", vocab_size=size, tokens=tokens, document_tokens=arguments.document_tokens)
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


def launcher(arguments: argparse.Namespace) -> list[str]:
    if arguments.gpus == 1:
        return [sys.executable]
    ranks = ["--standalone", "--nproc-per-node", str(arguments.gpus)]
    return [sys.executable, "-m", "torch.distributed.run", *ranks]


def measure(arguments: argparse.Namespace, overrides: list[str]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(arguments, Path(folder), overrides)
        command = [*launcher(arguments), "-m", "sambalm.pretrain.cli", "train", arguments.config, *settings]
        metrics, errors = Path(folder) / "run/metrics.jsonl", Path(folder) / "errors"
        with errors.open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        records, cpu_marks = [], {}  # CPU seconds of all ranks since their start, by steps done
        while len(records) < arguments.steps:
            if process.poll():
                return f"| failed: {last_error(errors.read_text())[:90]} | | | | "
            time.sleep(0.2)
            lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
            records = [json.loads(line) for line in lines[: arguments.steps] if line.endswith("\n")]
            if len(records) >= arguments.steps // 2:
                cpu_marks.setdefault(len(records), cpu_seconds(process))
        stop(process)
    steady, last = records[len(records) // 2 :], records[-1]
    speeds = [record["tokens_per_second"] for record in steady]
    mfu = statistics.median(record.get("mfu", 0) for record in steady)
    (first, before_s), (end, after_s) = min(cpu_marks.items()), max(cpu_marks.items())
    cpu_s = f"{(after_s - before_s) / (end - first):.3f}" if end > first else ""
    return (
        f"| {statistics.median(speeds):,.0f} | {min(speeds):,.0f} to {max(speeds):,.0f} | {mfu:.1%} "
        f"| {last.get('peak_memory_bytes', 0) / 2**30:.1f} | {cpu_s} | {last['loss']:.4f}"
    )


def cpu_seconds(process: subprocess.Popen) -> float:
    """CPU time of a process and those that it started, the system's part included."""
    root = psutil.Process(process.pid)
    times = [each.cpu_times() for each in (root, *root.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def last_error(log: str) -> str:
    """The last error that the ranks printed, before what the launcher says of their end."""
    lines = [line for line in log.splitlines() if line.strip()]
    return next((line for line in lines if line.startswith("error: ")), lines[-1] if lines else "no output")


def stop(process: subprocess.Popen) -> None:
    """At once: the checkpoint at a run's end would take longer than its steps."""
    ranks = psutil.Process(process.pid).children(recursive=True)
    for each in (process, *ranks):
        with suppress(psutil.NoSuchProcess):  # whom the launcher's end has taken along
            each.kill()
    psutil.wait_procs(ranks)
    process.wait()


def profile(arguments: argparse.Namespace, overrides: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(arguments, Path(folder), overrides)
        options = ["--steps", str(arguments.steps), "--top", str(arguments.top), "--profiled"]
        subprocess.run([*launcher(arguments), __file__, arguments.config, *options, *settings], check=True)


def profile_rank(arguments: argparse.Namespace, settings: list[str]) -> None:
    from sambalm.parallel.groups import start_world
    from sambalm.pretrain.lifecycle.phases import Marks
    from sambalm.pretrain.lifecycle.run_folder import open_run_folder
    from sambalm.pretrain.lifecycle.signals import Signals
    from sambalm.pretrain.trainer import Trainer

    config, marks = load_config(Path(arguments.config), settings), Marks()
    with open_run_folder(config, marks) as run_folder, start_world(config.parallel) as world:
        trainer = Trainer(config, world, folder=run_folder, signals=Signals(), marks=marks)
        for hook in trainer.hooks:
            hook.on_start(trainer.training)
        with closing(trainer.training.executor), closing(trainer.loader):
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
        if world.is_main:
            print_parts(found, wall_s=wall_s, top=arguments.top)


def print_parts(found: torch.profiler.profile, *, wall_s: float, top: int) -> None:
    kernels, parts = collections.Counter(), collections.Counter()
    events = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    for event in events:
        kernels[event.name] += event.device_time / PROFILED_STEPS / 1e3
    for name, ms in kernels.items():
        parts[next(part for part, pattern in PARTS.items() if re.search(pattern, name))] += ms
    waits = waits_ms(events)
    parts["idle"] = wall_s * 1e3 - busy_ms(events)
    if parts["messages"]:
        others = [event for event in events if not re.search(PARTS["messages"], event.name)]
        parts["messages with no other kernel beside them"] = busy_ms(events) - busy_ms(others)
    print(f"\n| part of a step | ms | share of {wall_s * 1e3:.1f} ms |\n| --- | ---: | ---: |")
    for part, ms in parts.most_common():
        print(f"| {part} | {ms:.2f} | {ms / wall_s / 10:.1f}% |")
    print("\n| kernel | ms a step |\n| --- | ---: |")
    for name, ms in kernels.most_common(top):
        print(f"| {name[:100]} | {ms:.2f} |")
    print("\n| idle between | and | ms a step |\n| --- | --- | ---: |")
    for names, ms in waits.most_common(8):
        print(f"| {names} | {ms:.2f} |")


def waits_ms(events: list) -> collections.Counter[str]:
    """What the device waits for between two kernels, in order of their start; several may run at once."""
    waits, last = collections.Counter(), None
    for event in events:
        if last and event.time_range.start > last.time_range.end:
            wait_ms = (event.time_range.start - last.time_range.end) / PROFILED_STEPS / 1e3
            waits[f"{last.name[:50]} | {event.name[:50]}"] += wait_ms
        if last is None or event.time_range.end > last.time_range.end:
            last = event
    return waits


def busy_ms(events: list) -> float:
    """The time of a step in which any of the kernels runs."""
    whole_ms = (max(e.time_range.end for e in events) - events[0].time_range.start) / PROFILED_STEPS / 1e3
    return whole_ms - waits_ms(events).total()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--with", dest="variants", action="append", default=[], metavar="SETTINGS")
    parser.add_argument("--gpus", type=int, default=1, help="of this machine, one process each")
    parser.add_argument("--document-tokens", type=int, help="mean length of documents; by default they are long")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--profiled", action="store_true", help=argparse.SUPPRESS)  # one rank of --profile
    parser.add_argument("--top", type=int, default=25, help="kernels to list")
    arguments, overrides = parser.parse_known_args()
    if arguments.profiled:
        profile_rank(arguments, overrides)
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{arguments.gpus} x {device}, torch {torch.__version__}; {arguments.config} {' '.join(overrides)}")
    variants = arguments.variants or [""]
    if arguments.profile:
        for variant in variants:
            print(f"\n{variant}")
            profile(arguments, [*overrides, *variant.split()])
        return
    print("\n| settings | tokens/s | lowest to highest | MFU | peak GiB | CPU s a step | last loss |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for variant in variants:
        print(f"| {variant or 'as it is'} {measure(arguments, [*overrides, *variant.split()])} |")


if __name__ == "__main__":
    main()
