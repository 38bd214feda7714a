"""Trains the same model for a few steps on several layouts, and prints losses, speed and memory beside the plan's.

    python benchmarks/layouts.py configs/samba_421m.yaml --folder runs/layouts train.global_batch_tokens=65536
    python benchmarks/layouts.py configs/samba_421m.yaml --data data/slimpajama train.global_batch_tokens=65536 \
        --folder runs/layouts --layouts 'one process' 'selective' 'full' 'micro-batches of 8'
    python benchmarks/layouts.py --read --folder runs/layouts

Every layout sees the same samples in the same order from the same initial weights, so losses differ by rounding alone,
which the first steps at a high learning rate amplify: their differences stand apart. Without --data the tokens are
random ones. Runs that are there are read, not run again; with --read none is run. Layouts of as many processes share
one start of them, and what each has to import; one that fails is named and left out. Speed is the median of the last
half of the steps. Both tables are Markdown.
"""

import argparse
import gc
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from step import write_tokens  # of this folder

from sambalm.model.kernel_requirements import kernel_requirements
from sambalm.model.ops.config import KernelConfig
from sambalm.model.ops.registry import build_kernels
from sambalm.parallel.groups import ContextParallel, TensorParallel
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.config_file import load_config
from sambalm.pretrain.planner.hardware import DEVICES
from sambalm.pretrain.planner.kernels import KernelNames
from sambalm.pretrain.planner.search import GIB, Plan, plan_of
from sambalm.pretrain.reporting.metrics_file import read_metrics

# Name: processes and settings.
LAYOUTS = {
    "one process": (1, []),
    "TP2": (2, ["parallel.tensor=2"]),
    "TP2 + SP": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "PP2": (2, ["parallel.pipeline=2"]),
    "PP2 x VPP2": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "DP2, ZeRO-1": (2, ["parallel.zero_stage=1"]),
    "DP2, ZeRO-2": (2, ["parallel.zero_stage=2"]),
    "DP2, ZeRO-3": (2, ["parallel.zero_stage=3"]),
    "CP2": (2, ["parallel.context=2"]),
    "CP2, packed documents": (2, ["parallel.context=2", "data.reset_at_document=true"]),
    "DP4, ZeRO-1": (4, ["parallel.zero_stage=1"]),
    "DP2 x TP2 + SP": (4, ["parallel.tensor=2", "parallel.sequence=true", "parallel.zero_stage=1"]),
    "selective": (1, ["parallel.recompute=selective"]),
    "full": (1, ["parallel.recompute=full"]),
    "DP2, ZeRO-1, FP8": (2, ["parallel.zero_stage=1", "train.matmul_precision=fp8"]),
    **{f"micro-batches of {size}": (1, [f"train.micro_batch_size={size}"]) for size in (1, 2, 4, 8, 16)},
}
TWO_PROCESSES = [name for name, (ranks, _) in LAYOUTS.items() if ranks == 2]
LAYOUTS |= {
    f"{name}, kernel by kernel": (LAYOUTS[name][0], [*LAYOUTS[name][1], "train.cuda_graphs=false"])
    for name in ("one process", "TP2 + SP", "DP2, ZeRO-1", "CP2")
}
LAYOUT_FILE = "layout.json"  # in a run's folder: the layout's name, processes and kernels


@dataclass(frozen=True)
class Run:
    """A finished run, or as much as there is of one."""

    name: str
    ranks: int
    kernels: KernelNames
    config: RunConfig
    records: list[dict]
    held_bytes: int  # of the device, by what the layouts before have left

    @classmethod
    def read(cls, folder: Path) -> "Run":
        layout = json.loads((folder / LAYOUT_FILE).read_text())
        config = load_config(folder / "config.yaml", [])
        kernels, records = KernelNames(**layout["kernels"]), read_metrics(folder)
        return cls(layout["name"], layout["ranks"], kernels, config, records, layout.get("held_bytes", 0))

    @property
    def tokens_per_s(self) -> float:
        return statistics.median(r["tokens_per_second"] for r in self.records[len(self.records) // 2 :])

    @property
    def peak_gib(self) -> float | None:
        peak = self.records[-1].get("peak_memory_bytes")
        return peak and (peak - self.held_bytes) / GIB

    def difference(self, base: "Run", steps: slice) -> str:
        """The largest of the losses'."""
        pairs = list(zip(self.records, base.records, strict=False))[steps]
        return f"{max(abs(r['loss'] - b['loss']) for r, b in pairs):.1e}" if pairs and self is not base else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", help="not needed with --read")
    parser.add_argument("--data", help="prefix of token shards; default: random tokens")
    parser.add_argument("--folder", type=Path, required=True, help="where the runs go")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--early-steps", type=int, default=6, help="whose differences are printed apart")
    parser.add_argument(
        "--layouts",
        nargs="*",
        default=["one process", *TWO_PROCESSES],
        choices=list(LAYOUTS),
        metavar="LAYOUT",
        help=f"the first is what the others are compared with; of {', '.join(LAYOUTS)}",
    )
    parser.add_argument("--device", choices=list(DEVICES), help="what the plan estimates for; default: this GPU")
    parser.add_argument("--read", action="store_true", help="only read the runs that are in the folder")
    parser.add_argument("--in-rank", type=Path, help=argparse.SUPPRESS)
    arguments, overrides = parser.parse_known_intermixed_args()
    if arguments.in_rank:
        train_all(arguments.in_rank)
        return
    if not arguments.read and not arguments.config:
        parser.error("a config is needed, or --read")

    folders = [arguments.folder / name.replace(" ", "").replace(",", "-") for name in arguments.layouts]
    if not arguments.read:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        arguments.data = arguments.data or random_tokens(arguments, overrides)
        named = dict(zip(arguments.layouts, folders, strict=True))
        for ranks in sorted({LAYOUTS[name][0] for name in named}):
            run({name: folder for name, folder in named.items() if LAYOUTS[name][0] == ranks}, arguments, overrides)
    runs = [Run.read(folder) for folder in folders if (folder / LAYOUT_FILE).exists()]
    if not runs:
        sys.exit(f"{arguments.folder} holds no finished run of {', '.join(arguments.layouts)}")
    print_losses(runs, early_steps=arguments.early_steps)
    device = arguments.device or device_here()
    if device:
        print_estimates([(r, plan_of_run(r, device)) for r in runs], device)
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    print(f"\nread on {here}, torch {torch.__version__}")


def random_tokens(arguments: argparse.Namespace, overrides: list[str]) -> Path:
    config = load_config(Path(arguments.config), [*overrides, "data.train=x", "run.dir=x"])
    tokens = 2 * (arguments.steps + 1) * config.train.global_batch_tokens + 64 * config.data.sequence_length
    prefix = arguments.folder / "tokens"
    write_tokens(prefix, vocab_size=config.model.vocab_size, tokens=tokens, document_tokens=None)
    return prefix


def run(folders: dict[str, Path], arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Trains the layouts that are not there yet, all of as many processes. One that fails is left out."""
    failed = set()
    while left := [name for name in folders if name not in failed and not (folders[name] / LAYOUT_FILE).exists()]:
        ranks = LAYOUTS[left[0]][0]
        rows = [
            {"name": name, "folder": str(folders[name]), "config": arguments.config, "port": port}
            | {"settings": settings_of(name, folders[name], arguments, overrides)}
            for name, port in zip(left, free_ports(len(left)), strict=True)
        ]
        file = arguments.folder / "rows.json"
        file.write_text(json.dumps(rows))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [sys.executable, *launcher, __file__, "--folder", str(arguments.folder), "--in-rank", str(file)]
        if subprocess.run(command).returncode:
            name = next(name for name in left if not (folders[name] / LAYOUT_FILE).exists())
            print(f"{name} failed, and is left out", file=sys.stderr)
            failed.add(name)


def settings_of(name: str, folder: Path, arguments: argparse.Namespace, overrides: list[str]) -> list[str]:
    values = {
        "run.dir": folder,
        "data.train": arguments.data,
        "data.validation_fraction": 0.2,
        "train.steps": arguments.steps,
        "validation.tokens": 1,
        "validation.length_multiples": "[1]",
        "checkpoint.every_steps": 1_000_000,
        "parallel.tensor": 1,
    }
    return [*(f"{key}={value}" for key, value in values.items()), *overrides, *LAYOUTS[name][1]]


def free_ports(count: int) -> list[int]:
    """Ports for as many worlds: one after the other on the same port would meet the former's store."""
    sockets = [socket.create_server(("localhost", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def train_all(file: Path) -> None:
    """A rank's part: trains one layout after the other, each in a world of its own."""
    from sambalm.pretrain.trainer import train

    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # rank 0 keeps a store of its own for each world
    for row in json.loads(file.read_text()):
        os.environ["MASTER_PORT"] = str(row["port"])
        folder, config = Path(row["folder"]), load_config(Path(row["config"]), row["settings"])
        held_bytes = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        train(config)
        if os.environ["RANK"] == "0":
            kernels, ranks = vars(kernels_here(config)), int(os.environ["WORLD_SIZE"])
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # each as large as all else together
            layout = {"name": row["name"], "ranks": ranks, "kernels": kernels, "held_bytes": held_bytes}
            (folder / LAYOUT_FILE).write_text(json.dumps(layout) + "\n")
        torch._dynamo.reset()  # which would compile no more variants than one layout needs
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def kernels_here(config: RunConfig) -> KernelNames:
    """What a run of this config takes on this machine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    requirements = kernel_requirements(
        config.model,
        device=device,
        precision=config.train.precision,
        micro_batch_size=config.train.micro_batch_size,
        sequence_length=config.data.sequence_length,
        resets=config.data.reset_at_document,
        tp=TensorParallel(size=config.parallel.tensor),
        cp=ContextParallel(size=config.parallel.context),
    )
    chosen = dict(name.split("=") for name in build_kernels(config.kernels, requirements).names)
    return KernelNames(**{operation: chosen.get(operation) for operation in KernelConfig.model_fields}, device=device)


def device_here() -> str | None:
    name = torch.cuda.get_device_name().lower() if torch.cuda.is_available() else ""
    return next((device for device in DEVICES if device in name), None)


def plan_of_run(run: Run, device: str) -> Plan:
    return plan_of(run.config, world_size=run.ranks, hardware=DEVICES[device], kernels=run.kernels)


def print_losses(runs: Sequence[Run], *, early_steps: int) -> None:
    base, last = runs[0], max(len(r.records) for r in runs)
    columns = ["layout", f"loss, step {last}", f"difference from {base.name}, steps {early_steps + 1} to {last}"]
    print_header([*columns, f"steps 1 to {early_steps}", "tokens/s", "peak GiB, rank 0"])
    for r in runs:
        loss = f"{r.records[-1]['loss']:.4f}" if len(r.records) == last else f"(ended after {len(r.records)})"
        late, early = (r.difference(base, steps) for steps in (slice(early_steps, None), slice(early_steps)))
        peak = f"{r.peak_gib:.1f}" if r.peak_gib else ""
        print(f"| {r.name} | {loss} | {late} | {early} | {r.tokens_per_s:,.0f} | {peak} |")


def print_estimates(plans: Sequence[tuple[Run, Plan]], device: str) -> None:
    print(f"\nestimated for {device}\n")
    columns = ["layout", "kernels", "GiB estimated", "measured", "tokens/s estimated", "measured"]
    print_header([*columns, "estimated / measured"])
    for r, plan in plans:
        kernels = " ".join(name for operation, name in vars(r.kernels).items() if name and operation != "device")
        gib, peak = plan.memory.total_bytes / GIB, f"{r.peak_gib:.1f}" if r.peak_gib else ""
        speeds = f"{plan.tokens_per_s:,.0f} | {r.tokens_per_s:,.0f} | {plan.tokens_per_s / r.tokens_per_s:.2f}"
        print(f"| {r.name} | {kernels} | {gib:.1f} | {peak} | {speeds} |")


def print_header(columns: Sequence[str]) -> None:
    print("| " + " | ".join(columns) + " |\n| --- |" + " ---: |" * (len(columns) - 1))


if __name__ == "__main__":
    main()
