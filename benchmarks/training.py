"""Trains a config to its end, and its first steps again with other kernels, and prints whether they tell the same.

    python benchmarks/training.py configs/samba_421m.yaml --data data/text --folder runs/training train.steps=2000
    python benchmarks/training.py --read --folder runs/training --plot training.svg

Four runs from the same weights on the same samples: `main`, the config as it is; `reference`, with the kernels in plain
PyTorch; `rounding`, with other kernels and half the micro-batch, which is right too and shows what rounding alone does;
`window`, with half the attention window, a mistake that has to show. The last three are stopped after --compare-steps
of the same schedule. A run that is there is not run again, and one that was cut off goes on from its checkpoint; with
--read none is run. Prints Markdown: losses beside each other, held-out perplexity, speed and memory over the main run.
"""

import argparse
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.config_file import load_config
from sambalm.pretrain.errors import ExitCode
from sambalm.pretrain.lifecycle.signals import KILL_SWITCH
from sambalm.pretrain.reporting.metrics_file import LOSS_AT, read_metrics

GIB = 2**30
MAIN = "main"
FIRST_STEPS = 10  # they compile
ROWS = 8  # of losses beside each other
POLL_S = 0.2


def reference(config: RunConfig) -> dict[str, Any]:
    return {f"kernels.{operation}": "torch" for operation in type(config.kernels).model_fields}


def rounding(config: RunConfig) -> dict[str, Any]:
    halved = {"train.micro_batch_size": max(1, config.train.micro_batch_size // 2)}
    plain = {"kernels.norm": "torch", "kernels.elementwise": "torch"}
    return halved | plain | ({"kernels.attention": "torch-flash"} if torch.cuda.is_available() else {})


def window(config: RunConfig) -> dict[str, Any]:
    return {"model.window": config.model.window // 2}


# What a run changes of the main run's config.
OTHERS: dict[str, Callable[[RunConfig], dict[str, Any]]] = {
    "reference": reference,
    "rounding": rounding,
    "window": window,
}
# They neither validate nor save before they are asked to stop.
QUIET = {
    "validation.every_steps": 1_000_000,
    "validation.tokens": 1,
    "validation.length_multiples": "[1]",
    "checkpoint.every_steps": 1_000_000,
}
FREE_SECTIONS = ("validation.", "checkpoint.", "kernels.")  # in which runs to be compared may differ


@dataclass(frozen=True)
class Run:
    """A run, or as much as there is of one."""

    name: str
    config: RunConfig
    records: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "Run | None":
        records = read_metrics(folder)
        return cls(folder.name, load_config(folder / "config.yaml"), records) if records else None

    def differences(self, base: "Run", *, steps: int) -> list[float]:
        """This run's losses minus another's, step by step."""
        pairs = list(zip(self.records, base.records, strict=False))[:steps]
        return [here["loss"] - there["loss"] for here, there in pairs]

    def speed(self, records: Sequence[dict[str, Any]]) -> float:
        return statistics.median(record["tokens_per_second"] for record in records)

    def tenth(self, number: int) -> list[dict[str, Any]]:
        """The records of a tenth of the run, from 0, without the steps that compile."""
        rest = self.records[FIRST_STEPS:] or self.records
        return rest[number * len(rest) // 10 : max((number + 1) * len(rest) // 10, 1)] or rest[-1:]

    def validations(self) -> list[dict[str, Any]]:
        return [record for record in self.records if any(name.startswith(LOSS_AT) for name in record)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", help="not needed with --read")
    parser.add_argument("--data", help="prefix of token shards")
    parser.add_argument("--folder", type=Path, required=True, help="where the runs go")
    parser.add_argument("--compare-steps", type=int, default=200)
    parser.add_argument("--only", action="append", choices=[MAIN, *OTHERS], help="run this one; may be repeated")
    parser.add_argument("--plot", type=Path, help="where to draw it; the ending decides the format, as .svg or .png")
    parser.add_argument("--read", action="store_true", help="only read the runs that are in the folder")
    arguments, overrides = parser.parse_known_intermixed_args()
    if not arguments.read:
        if not (arguments.config and arguments.data):
            parser.error("a config and --data are needed, or --read")
        for name in arguments.only or (MAIN, *OTHERS):
            train(name, arguments, [f"data.train={arguments.data}", *overrides])
    runs = {name: run for name in (MAIN, *OTHERS) if (run := Run.read(arguments.folder / name))}
    if MAIN not in runs:
        sys.exit(f"{arguments.folder} holds no {MAIN} run yet, which the others are compared with: run it too")
    for run in runs.values():
        if changed := changes(run, runs[MAIN]):
            sys.exit(f"{arguments.folder / run.name} and {MAIN} differ in {', '.join(changed)}: remove one of them")
    print_comparison(runs, steps=arguments.compare_steps)
    print_perplexity(runs[MAIN])
    print_steadiness(runs[MAIN])
    if arguments.plot:
        plot(runs, arguments.plot, steps=arguments.compare_steps)


def train(name: str, arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Runs to the end, or the other runs until they have been asked to stop."""
    folder = arguments.folder / name
    values: dict[str, Any] = {"run.dir": folder}
    if name != MAIN:
        values |= QUIET | OTHERS[name](load_config(Path(arguments.config), [*overrides, f"run.dir={folder}"]))
    last_step = arguments.compare_steps if name != MAIN else math.inf
    if len(read_metrics(folder)) >= last_step:
        return
    settings = [*overrides, *(f"{key}={value}" for key, value in values.items())]
    print(f"{name}: {' '.join(settings)}", file=sys.stderr)
    command = [sys.executable, "-m", "sambalm.pretrain.cli", "train", arguments.config, *settings]
    with subprocess.Popen(command) as process:
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())  # it saves, and so goes on from there
        while process.poll() is None:
            time.sleep(POLL_S)
            if len(read_metrics(folder)) >= last_step:
                (folder / KILL_SWITCH).touch()
    if process.returncode not in (ExitCode.FINISHED, ExitCode.STOPPED):
        sys.exit(f"the {name} run ended with exit code {process.returncode}: the same command goes on from here")


def changes(run: Run, base: Run) -> list[str]:
    """Keys in which two runs differ that should not, so that their losses cannot be compared."""
    if run is base:
        return []
    here, there = (
        {f"{section}.{key}": value for section, keys in found.items() for key, value in keys.items()}
        for found in (config.model_dump(exclude={"format_version"}) for config in (run.config, base.config))
    )
    free = {"run.dir", *OTHERS[run.name](base.config)}
    keys = [key for key in here if key not in free and not key.startswith(FREE_SECTIONS)]
    return [key for key in keys if here[key] != there[key]]


def print_comparison(runs: dict[str, Run], *, steps: int) -> None:
    base = runs[MAIN]
    others = [run for run in runs.values() if run is not base]
    if not others:
        return
    steps = min(steps, *(len(run.records) for run in runs.values()))
    print(f"Losses of the first {steps} steps, from the same weights on the same samples\n")
    print("| step |" + "".join(f" {run.name} |" for run in (base, *others)))
    print("| ---: |" + " ---: |" * len(runs))
    for row in sorted({1, *(round(steps * row / ROWS) or 1 for row in range(1, ROWS + 1))}):
        print(f"| {row} |" + "".join(f" {run.records[row - 1]['loss']:.4f} |" for run in (base, *others)))
    print(f"\nTheir differences from the {MAIN} run's, and of the second half of the steps, where noise averages out\n")
    print("| run | largest | mean | mean, second half | mean with its sign, second half | tokens/s | peak GiB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for run in others:
        found = run.differences(base, steps=steps)
        late = found[steps // 2 :]
        print(
            f"| {run.name} | {max(map(abs, found)):.1e} | {mean_size(found):.1e} | {mean_size(late):.1e} "
            f"| {statistics.fmean(late):+.1e} | {run.speed(run.tenth(9)):,.0f} | {gib(run.records[-1])} |"
        )
    yardstick = runs.get("rounding")
    if yardstick:
        noise = mean_size(yardstick.differences(base, steps=steps)) or math.inf
        for run in others:
            if run is not yardstick:
                ratio = mean_size(run.differences(base, steps=steps)) / noise
                print(f"\nMean difference of {run.name} over that of rounding: {ratio:.2f}", end="")
        print()


def mean_size(values: Sequence[float]) -> float:
    return statistics.fmean(map(abs, values))


def gib(record: dict[str, Any], name: str = "peak_memory_bytes") -> str:
    return f"{record[name] / GIB:.3f}" if name in record else ""


def print_perplexity(run: Run) -> None:
    found = run.validations()
    if not found:
        return
    names = [name for name in found[-1] if name.startswith(LOSS_AT)]
    lengths = [int(name.removeprefix(LOSS_AT)) for name in names]
    print("\nPerplexity of held-out text by sequence length\n")
    print("| step | training tokens |" + "".join(f" {length:,} |" for length in lengths))
    print("| ---: | ---: |" + " ---: |" * len(names))
    for record in found:
        losses = "".join(f" {math.exp(record[name]):.3f} |" for name in names)
        print(f"| {record['step']:,} | {record['tokens']:,} |{losses}")
    print("\nNats per token after the last step: " + ", ".join(f"{found[-1][name]:.4f}" for name in names))


def print_steadiness(run: Run) -> None:
    first, last, rest = run.tenth(0), run.tenth(9), run.records[FIRST_STEPS:] or run.records
    seconds = sum(record["step_time_s"] for record in run.records)
    median_s = statistics.median(record["step_time_s"] for record in rest)
    slow = [record for record in rest if record["step_time_s"] > 1.5 * median_s]
    print(
        f"\nThe main run over {len(run.records):,} of {run.config.train.steps:,} steps, {seconds:,.0f} s in steps; "
        f"tenths without the first {FIRST_STEPS} steps\n"
    )
    print("| | first tenth | last tenth | last over first |\n| --- | ---: | ---: | ---: |")
    rows = {"tokens/s, median": (run.speed(first), run.speed(last), ",.0f")}
    for label, name in (
        ("GPU memory in use after the step, GiB", "memory_bytes"),
        ("GPU memory, peak since the start, GiB", "peak_memory_bytes"),
        ("host memory, peak since the start, GiB", "peak_host_memory_bytes"),
    ):
        if name in last[-1]:
            rows[label] = (first[-1][name] / GIB, last[-1][name] / GIB, ".3f")
    for label, (before, after, form) in rows.items():
        print(f"| {label} | {before:{form}} | {after:{form}} | {after / before:.3f} |")
    print(f"\n{len(slow)} of {len(rest):,} steps took more than 1.5 times the median of {median_s:.3f} s", end="")
    print(f"; the median step's MFU is {statistics.median(r['mfu'] for r in rest):.1%}" if "mfu" in rest[-1] else "")
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    print(f"\nread on {here}, torch {torch.__version__}")


def plot(runs: dict[str, Run], path: Path, *, steps: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    base = runs[MAIN]
    others = {name: run for name, run in runs.items() if run is not base}
    panels = ["losses", *(["differences"] if others else []), "speed"]
    figure, axes = pyplot.subplot_mosaic([panels], figsize=(4.4 * len(panels), 3.8), layout="constrained")
    losses, speed = axes["losses"], axes["speed"]
    losses.plot(*series(base.records, "loss"), linewidth=0.8, label="training")
    if "reference" in runs:
        losses.plot(*series(runs["reference"].records[:steps], "loss"), linewidth=0.8, label="reference kernels")
    for name in (found for record in base.validations()[-1:] for found in record if found.startswith(LOSS_AT)):
        length = int(name.removeprefix(LOSS_AT))
        losses.plot(*series(base.records, name), "o", markersize=3, label=f"held out, {length:,} tokens")
    losses.set(xlabel="step", ylabel="loss (nats per token)")
    losses.legend(fontsize=7)
    for name, run in others.items():
        sizes = [max(abs(difference), 1e-7) for difference in run.differences(base, steps=steps)]
        axes["differences"].semilogy(range(1, len(sizes) + 1), sizes, linewidth=0.8, label=name)
        axes["differences"].set(xlabel="step", ylabel="|loss - loss of the main run|")
        axes["differences"].legend(fontsize=7)
    speed.plot(*series(base.records, "tokens_per_second"), linewidth=0.8, label="tokens/s")
    speed.set(xlabel="step", ylabel="tokens/s", ylim=(0, None))
    if "memory_bytes" in base.records[-1]:
        memory = speed.twinx()
        numbers, values = series(base.records, "memory_bytes")
        memory.plot(numbers, [value / GIB for value in values], color="tab:orange", linewidth=0.8)
        memory.set(ylabel="GPU memory in use (GiB)", ylim=(0, None))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def series(records: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of those records that have a metric."""
    found = [(record["step"], record[name]) for record in records if name in record]
    return [step for step, _ in found], [value for _, value in found]


if __name__ == "__main__":
    main()
