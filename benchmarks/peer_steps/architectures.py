"""Training steps of this project's architectures side by side, at equal parameters, on this machine in one process.

    python benchmarks/peer_steps/architectures.py --output architectures.jsonl --plot architectures.png --minutes 5
    python benchmarks/peer_steps/architectures.py --output architectures.jsonl --table --plot architectures.png

Each architecture is its config in configs/ with a tied head and an MLP, a multiple of 64 wide, that gives it the
parameters of the first one as nearly as that goes. Steps are as in step.py: random tokens, clipping and AdamW included.
Each row, an architecture at a length, adds a line of JSON to --output when it ends, and rows that are there are not run
again. A row that fails has the reason; one that runs out of memory is tried again with recomputation.

A row's first step compiles its kernels: those of flash-linear-attention for minutes, and no limit ends what compiles
within a backward. On a new machine start one process for each such architecture beside each other first, with
--architectures NAME and another --output; Triton keeps what they compile.
"""

import argparse
import contextlib
import gc
import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from step import equal_mlp_size, measure, settings_of, trained_in
from torch import nn

from sambalm.model.config import ModelConfig
from sambalm.model.parameters import count_parameters
from sambalm.parallel.config import ParallelConfig
from sambalm.parallel.groups import World, start_world
from sambalm.parallel.sharding import canonical_slices
from sambalm.pretrain.config_file import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
# By name: the label and the file. The order is that of a length's rows.
ARCHITECTURES = {
    "samba": ("Samba", "samba_421m.yaml"),
    "llama": ("Llama, full attention", "paper/llama2_438m.yaml"),
    "llama_swa": ("Llama-SWA", "paper/llama2_swa_438m.yaml"),
    "mamba_swa_mlp": ("Mamba-SWA-MLP", "paper/mamba_swa_mlp_395m.yaml"),
    "mamba2": ("Samba with Mamba-2", "successors/samba_mamba2_421m.yaml"),
    "sambay": ("SambaY", "successors/sambay_mamba2_402m.yaml"),
    "gated_deltanet": ("Gated DeltaNet", "successors/gated_deltanet_421m.yaml"),
    "kimi_delta": ("Kimi Delta Attention", "successors/kimi_delta_421m.yaml"),
    "sliding_gla": ("Sliding GLA", "paper/sliding_gla_438m.yaml"),
    "sliding_retnet": ("Sliding RetNet", "paper/sliding_retnet_446m.yaml"),
}
ROW = ("architecture", "length", "settings")
MEASURED, FAILED, NO_TIME = "measured", "failed", "no time left"
MLP_MULTIPLE = 64
GIB = 2**30


class RowTimeError(Exception):
    """A row has taken longer than it may."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON lines")
    parser.add_argument("--architectures", nargs="*", default=list(ARCHITECTURES), choices=list(ARCHITECTURES))
    parser.add_argument("--lengths", nargs="*", type=int, default=[4096, 65536, 16384], help="in the order of the runs")
    parser.add_argument("--step-tokens", type=int, default=65536, help="of a step; a multiple of every length")
    parser.add_argument("--micro-batch-tokens", type=int, default=32768, help="or one sequence where that is longer")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the timed ones")
    parser.add_argument("--steps", type=int, default=4, help="timed steps")
    parser.add_argument("--seconds", type=float, default=6.0, help="of a row's steps after the second one, at most")
    parser.add_argument("--minutes", type=float, default=5.0, help="of all rows; those that find no time left say so")
    parser.add_argument("--row-limit-s", type=float, default=300.0, help="of a row, its compiling included")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw tokens/s and memory over length")
    arguments, overrides = parser.parse_known_intermixed_args()
    if bad := [length for length in arguments.lengths if arguments.step_tokens % length]:
        parser.error(f"--step-tokens {arguments.step_tokens} is not a multiple of --lengths {bad[0]}")
    if not arguments.table:
        run(arguments, overrides)
    rows = [row for row in read(arguments.output) if row["settings"] == overrides]
    if not rows:
        sys.exit(f"{arguments.output} holds no rows with these settings: run them first, without --table")
    print_table(rows)
    if arguments.plot:
        plot(rows, arguments.plot)


def read(path: Path) -> list[dict[str, Any]]:
    """The newest record of each row; a line that was cut off is left out."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            found[json.dumps([record[name] for name in ROW])] = record
    return list(found.values())


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Runs the rows that --output lacks, one length after the other."""
    end_s = time.monotonic() + 60 * arguments.minutes
    known = read(arguments.output)
    done = [tuple(row[name] for name in ROW) for row in known if row["outcome"] == MEASURED]
    with start_world(ParallelConfig()) as world:
        for length in arguments.lengths:
            for name in arguments.architectures:
                if (name, length, overrides) in done:
                    continue
                row = {"architecture": name, "length": length, "settings": overrides}
                row |= attempt(name, length, arguments, overrides, world=world, end_s=end_s)
                with arguments.output.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{name}, {length:,}: {described(row)} in {row['row_s']:.0f} s", file=sys.stderr, flush=True)


def attempt(
    name: str, length: int, arguments: argparse.Namespace, overrides: Sequence[str], *, world: World, end_s: float
) -> dict[str, Any]:
    """What a row finds, or why it finds nothing."""
    start_s = time.monotonic()
    found: dict[str, Any] = {"outcome": NO_TIME}
    for recompute in ("none", "full"):
        left_s = min(end_s, start_s + arguments.row_limit_s) - time.monotonic()
        if left_s <= 0:
            break
        options = argparse.Namespace(**vars(arguments), length=length, recompute=recompute)
        try:
            with within(left_s):
                found = timed(name, options, overrides, world=world)
        except torch.OutOfMemoryError:
            found = {"outcome": FAILED, "reason": "out of memory"}
            continue  # outside the handler, whose traceback holds the model
        except RowTimeError:
            found = {"outcome": FAILED, "reason": f"over {left_s:.0f} s"}
        except Exception as error:  # whatever it is: the other rows are worth having
            reason = f"{type(error).__name__}: {error}".strip().splitlines()
            found = {"outcome": FAILED, "reason": reason[0][:200]}
        break
    return found | {"row_s": time.monotonic() - start_s}


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises RowTimeError in what takes longer, as soon as it is in Python again."""

    def end(*_: Any) -> None:
        raise RowTimeError

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def timed(name: str, options: argparse.Namespace, overrides: Sequence[str], *, world: World) -> dict[str, Any]:
    """The measurement of step.py, of a model that leaves nothing behind."""
    free_memory()
    before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    path, settings = settings_at_equal_parameters(name, options, overrides)
    config = load_config(path, settings)
    try:
        with (
            patch("sambalm.pretrain.training.initialize_parameters", initialize_on_device),
            trained_in(world, config) as ready,
        ):
            measured = measure(ready, options, vocab_size=config.model.vocab_size)
    finally:
        free_memory()
    found = {"outcome": MEASURED, "pattern": config.model.pattern, "mlp_size": config.model.mlp_size}
    found |= {"recompute": options.recompute} | asdict(measured)
    for bytes_name in ("kept_bytes", "peak_bytes"):
        found[bytes_name] = max(0, found[bytes_name] - before)
    return found


def free_memory() -> None:
    # With what torch.compile has learnt of other rows' shapes it would compile for any shape, which is slower.
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@torch.no_grad()
def initialize_on_device(module: nn.Module, *, seed: int) -> None:
    """The run's initial distributions, drawn where the weights are: seconds less a row than the run's own numbers."""
    for _, parameter, piece in canonical_slices(module):
        generator = torch.Generator(parameter.device).manual_seed(seed)
        whole = torch.empty(piece.shape, dtype=torch.float32, device=parameter.device)
        piece.init(whole, generator)
        piece.of_local(parameter).copy_(piece.of_canonical(whole))


def settings_at_equal_parameters(
    name: str, options: argparse.Namespace, overrides: Sequence[str]
) -> tuple[Path, list[str]]:
    """The file of an architecture, and the settings with which it has the parameters of the first one."""
    parameters = count_parameters(model_of(next(iter(ARCHITECTURES)), options, overrides))["total"]
    model = model_of(name, options, overrides)
    values = model.model_dump()
    mlp_size = equal_mlp_size(values, parameters=parameters, multiple=MLP_MULTIPLE)
    if name == next(iter(ARCHITECTURES)):
        mlp_size = model.mlp_size
    path, settings = own_settings(name, options, overrides)
    return path, [*settings, f"model.mlp_size={mlp_size}"]


def model_of(name: str, options: argparse.Namespace, overrides: Sequence[str]) -> ModelConfig:
    return load_config(*own_settings(name, options, overrides)).model


def own_settings(name: str, options: argparse.Namespace, overrides: Sequence[str]) -> tuple[Path, list[str]]:
    """The file and the settings that the architecture has keys for: a section of a mixer is of its architecture."""
    path, about_mixers = CONFIGS / ARCHITECTURES[name][1], "model.mixers."
    plain = [setting for setting in overrides if not setting.startswith(about_mixers)]
    sections = load_config(path, settings_of(options, [])).model.mixers
    fitting = [f"{about_mixers}{section}." for section in sections]
    chosen = [setting for setting in overrides if setting.startswith(tuple(fitting))] if fitting else []
    return path, settings_of(options, ["model.tie_embeddings=true", *plain, *chosen])


def described(row: dict[str, Any]) -> str:
    """A row as a cell of the table."""
    if row["outcome"] != MEASURED:
        return f"{row['outcome']}: {row['reason']}" if "reason" in row else row["outcome"]
    remarks = [f"{row['peak_bytes'] / GIB:.1f} GiB"] if row["peak_bytes"] else []
    remarks += ["recomputed"] if row["recompute"] != "none" else []
    return f"{row['tokens_per_s']:,.0f}" + (f" ({', '.join(remarks)})" if remarks else "")


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    lengths = sorted({row["length"] for row in rows})
    measured = [row for row in rows if row["outcome"] == MEASURED]
    if measured:
        print(f"\n{' '.join([*measured[0]['settings'], measured[0]['device']])}, torch {measured[0]['torch']}\n")
    columns = ["tokens/s (peak memory)", "parameters", "MLP", *(f"{length:,}" for length in lengths)]
    print(f"| {' | '.join(columns)} |\n| --- |" + " ---: |" * (len(columns) - 1))
    for name, (label, _) in ARCHITECTURES.items():
        own = {row["length"]: row for row in rows if row["architecture"] == name}
        if not own:
            continue
        one = next((row for row in own.values() if row["outcome"] == MEASURED), None)
        sizes = [f"{one['parameters']:,}", f"{one['mlp_size']:,}"] if one else ["", ""]
        print(f"| {' | '.join([label, *sizes, *(described(own[n]) if n in own else '' for n in lengths)])} |")
    print("\nKernels: " + ", ".join(sorted({kernel for row in measured for kernel in row["kernels"]})))
    packages = {item for row in measured for item in row["packages"].items()}
    print("Packages: " + ", ".join(" ".join(item) for item in sorted(packages)))


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measured = sorted((row for row in rows if row["outcome"] == MEASURED), key=lambda row: row["length"])
    if not measured:
        sys.exit("no row was measured: there is nothing to draw")
    lengths = sorted({row["length"] for row in measured})
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    for name, (label, _) in ARCHITECTURES.items():
        own = [row for row in measured if row["architecture"] == name]
        if own:
            at = [row["length"] for row in own]
            speed.plot(at, [row["tokens_per_s"] for row in own], "o-", markersize=4, label=label)
            memory.plot(at, [row["peak_bytes"] / GIB for row in own], "o-", markersize=4)
    for axes, label in ((speed, "tokens/s in training"), (memory, "peak memory (GiB)")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths], minor=False)
        axes.set(xlabel="tokens of a sequence", ylabel=label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    speed.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))
    figure.suptitle(f"{measured[0]['parameters'] / 1e6:,.0f}M parameters, {measured[0]['device']}")
    figure.legend(loc="outside right center", fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    main()
