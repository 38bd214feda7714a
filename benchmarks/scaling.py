"""Checks muP (`model.scaling`) on tiny models: sizes of activations over width and depth, and the best learning rate.

    python benchmarks/scaling.py coordinates --plot coordinates.png
    python benchmarks/scaling.py sweep --plot sweep.png

The coordinate check takes a few steps at each width and depth, on the same tokens, and prints how much they have
changed the stream that the head reads, and the logits. The sweep trains each width with several learning rates and
prints the losses of the last tenth of the steps. Both do so with model.scaling=mup and without. Tokens are bytes of the
sources of the Python installation. It runs on a CPU, one run after the other.
"""

import argparse
import json
import math
import statistics
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sambalm.model.config import ModelConfig
from sambalm.model.samba import Samba
from sambalm.model.scaling import set_lr_scales
from sambalm.parallel.sharding import initialize_parameters
from sambalm.pretrain.gradient_buckets import gradient_buckets
from sambalm.pretrain.optimizer import OptimizerConfig, set_learning_rate

BLOCK, VOCABULARY = "M-*-", 256
HEAD_DIM, LENGTH, SEQUENCES = 16, 64, 8  # of a head, a sequence, a step
CHECK_LR = 1e-2
EMBEDDING_STD = 0.1  # good at width 32: what learning rates alone do not scale has to be tuned on the base too
SCALINGS = ("mup", None)

Progress = Callable[[int, float], object]


def model_config(width: int, *, scaling: str | None, base_width: int, blocks: int = 1) -> ModelConfig:
    """A model whose heads grow in number with its width; its base has one block."""
    values = {"pattern": BLOCK * blocks, **_sizes(width), "window": 32, "vocab_size": VOCABULARY}
    values["embedding_std"] = EMBEDDING_STD
    if scaling:
        values |= {"scaling": scaling, "base": {"pattern": BLOCK, **_sizes(base_width)}}
    return ModelConfig(**values)


def _sizes(width: int) -> dict[str, int]:
    heads = width // HEAD_DIM
    return {"hidden_size": width, "num_query_heads": heads, "num_kv_heads": heads // 2, "mlp_size": 2 * width}


def corpus(size: int) -> Tensor:
    """The first bytes of the Python installation's sources, uint8 [size]."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= size:
            break
    return torch.frombuffer(text[:size], dtype=torch.uint8)


def batches(tokens: Tensor, steps: int) -> list[tuple[Tensor, Tensor]]:
    """Inputs and labels of each step, int64 [SEQUENCES, LENGTH], the same for every model."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(steps):
        starts = torch.randint(len(tokens) - LENGTH - 1, (SEQUENCES,), generator=generator)
        rows = torch.stack([tokens[start : start + LENGTH + 1] for start in starts]).long()
        found.append((rows[:, :-1], rows[:, 1:]))
    return found


class Run:
    """A model with its optimizer, both as a run has them, in one process and fp32."""

    def __init__(self, config: ModelConfig, optimizer: OptimizerConfig, *, seed: int = 0) -> None:
        self.model, self.settings = Samba(config), optimizer
        set_lr_scales(self.model)
        initialize_parameters(self.model, seed=seed)
        self.optimizer = optimizer.build(gradient_buckets([self.model]), adamw=torch.optim.AdamW)

    def step(self, batch: tuple[Tensor, Tensor], lr: float) -> float:
        """Takes a step; returns the loss before it, nats a token."""
        loss = self.model(*batch).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    @torch.no_grad()
    def activations(self, tokens: Tensor) -> dict[str, Tensor]:
        """The stream that the last norm reads, and the logits."""
        found: dict[str, Tensor] = {}

        def keep(module: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
            found["stream"] = output[0]

        hook = self.model.final_norm.register_forward_hook(keep)
        found["logits"] = self.model(tokens)
        hook.remove()
        return found


def changes(config: ModelConfig, given: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """How much a step on each batch has changed activations on the first, root of the mean square."""
    run = Run(config, OptimizerConfig(peak_lr=CHECK_LR, weight_decay=0.0))
    before = run.activations(given[0][0])
    for batch in given:
        run.step(batch, CHECK_LR)
    after = run.activations(given[0][0])
    return {name: (after[name] - before[name]).square().mean().sqrt().item() for name in before}


def final_loss(
    config: ModelConfig, optimizer: OptimizerConfig, given: Sequence[tuple[Tensor, Tensor]], *, seed: int = 0
) -> float:
    """The mean training loss of the last tenth of the steps; infinite where it diverges."""
    run = Run(config, optimizer, seed=seed)
    losses = []
    for number, batch in enumerate(given, start=1):
        losses.append(run.step(batch, optimizer.learning_rate(number, steps=len(given))))
        if not math.isfinite(losses[-1]):
            return math.inf
    return statistics.fmean(losses[-max(1, len(losses) // 10) :])


def check_coordinates(arguments: argparse.Namespace) -> None:
    given = batches(corpus(200_000), arguments.steps)
    rows = []
    print("| scaling | width | blocks | change of the stream | change of the logits |\n" + "| --- |" + " ---: |" * 4)
    cells = [(width, 1) for width in arguments.widths] + [(arguments.widths[0], n) for n in arguments.blocks if n > 1]
    for scaling in SCALINGS:
        for width, blocks in cells:
            config = model_config(width, scaling=scaling, base_width=arguments.widths[0], blocks=blocks)
            found = changes(config, given)
            rows.append({"scaling": scaling, "width": width, "blocks": blocks, **found})
            print(f"| {scaling} | {width} | {blocks} | {found['stream']:.4f} | {found['logits']:.4f} |", flush=True)
    if arguments.plot:
        plot_coordinates(rows, arguments)


def sweep(arguments: argparse.Namespace) -> None:
    given = batches(corpus(2_000_000), arguments.steps)
    results: dict[str | None, dict[int, list[float]]] = {}
    print("| scaling | width | " + " | ".join(f"{lr:.1e}" for lr in arguments.lrs) + " | best |")
    print("| --- |" + " ---: |" * (len(arguments.lrs) + 2))
    for scaling in SCALINGS:
        for width in arguments.widths:
            config = model_config(width, scaling=scaling, base_width=arguments.widths[0])
            losses = [final_loss(config, OptimizerConfig(peak_lr=lr), given) for lr in arguments.lrs]
            results.setdefault(scaling, {})[width] = losses
            best = arguments.lrs[losses.index(min(losses))]
            row = " | ".join(f"{loss:.3f}" for loss in losses)
            print(f"| {scaling} | {width} | {row} | {best:.1e} |", flush=True)
    if arguments.output:
        arguments.output.write_text(
            json.dumps({"lrs": arguments.lrs, "losses": {_named(scaling): of for scaling, of in results.items()}})
        )
    if arguments.plot:
        plot_sweep(results, arguments)


def plot_coordinates(rows: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> None:
    figure, panels = _panels(2)
    wide, deep = (
        [row for row in rows if row[key] == fixed] for key, fixed in (("blocks", 1), ("width", arguments.widths[0]))
    )
    for axes, some, key in zip(panels, (wide, deep), ("width", "blocks"), strict=True):
        for scaling, line in zip(SCALINGS, ("-o", "--s"), strict=True):
            for name, color in (("stream", "C0"), ("logits", "C1")):
                points = [(row[key], row[name]) for row in some if row["scaling"] == scaling]
                axes.plot(*zip(*points, strict=True), line, color=color, label=f"{name}, {_named(scaling)}")
        axes.set(xscale="log", yscale="log", xlabel=key, ylabel=f"change after {arguments.steps} steps")
        axes.set_xticks([point[0] for point in points], [str(point[0]) for point in points])
        axes.set_xticks([], minor=True)
        axes.legend(fontsize=8)
    _save(figure, arguments.plot)


def plot_sweep(results: dict[str | None, dict[int, list[float]]], arguments: argparse.Namespace) -> None:
    figure, panels = _panels(2)
    for axes, (scaling, losses) in zip(panels, results.items(), strict=True):
        for width, found in losses.items():
            (line,) = axes.plot(arguments.lrs, found, "-o", markersize=4, label=f"width {width}")
            best = found.index(min(found))
            axes.plot(arguments.lrs[best], found[best], "*", markersize=14, color=line.get_color())
        axes.set(
            xscale="log", xlabel="learning rate", ylabel="loss of the last tenth, nats a byte", title=_named(scaling)
        )
        axes.legend(fontsize=8)
    low = min(loss for losses in results.values() for found in losses.values() for loss in found)
    for axes in panels:
        axes.set_ylim(low - 0.05, low + 1.0)
    _save(figure, arguments.plot)


def _named(scaling: str | None) -> str:
    return f"model.scaling={scaling or 'null'}"


def _panels(count: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, count, figsize=(5 * count, 4), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("coordinates")
    check.add_argument("--blocks", type=int, nargs="+", default=[1, 2, 4, 8], help=f"repetitions of {BLOCK}")
    check.set_defaults(steps=4, run=check_coordinates)
    swept = commands.add_parser("sweep")
    swept.add_argument("--lrs", type=float, nargs="+", default=[2**-e for e in range(10, 3, -1)])
    swept.add_argument("--output", type=Path, help="where the losses go, as JSON")
    swept.set_defaults(steps=250, run=sweep)
    for command in (check, swept):
        command.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128], help="the first is the base's")
        command.add_argument("--steps", type=int, help="default: %(default)s", default=command.get_default("steps"))
        command.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
