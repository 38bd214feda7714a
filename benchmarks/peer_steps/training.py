"""One model trained by this project and by flash-linear-attention: the same weights, batches and steps.

    python -m benchmarks.peer_steps.training --data data/prose/train --folder runs/fla --plot fla.png
    python -m benchmarks.peer_steps.training --read --folder runs/fla --plot fla.png

Both begin with the weights that flash-linear-attention draws. This project trains twice, in micro-batches of two sizes:
how far these two runs are apart is rounding alone, and what the other's distance is measured by. On a GPU that is bf16
with flash-attn, mamba-ssm and causal-conv1d under the other model. On a CPU it is fp32, and TRITON_INTERPRET=1 and
`--size tiny` are for that; triton must be installed. Runs that are in the folder are not run again. The other model is
trained by torch's AdamW with our learning rates.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from benchmarks.inference.peer_logits import run_fla_on_a_cpu
from sambalm.data_pipeline.dataset import build_train_dataset
from sambalm.data_pipeline.sources import open_sources
from sambalm.model.hf.names import hf_config
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.config_file import load_config
from sambalm.pretrain.reporting.metrics_file import read_steps

SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "model": {"pattern": "M-*- x 6", "hidden_size": 768, "mlp_size": 2048, "num_query_heads": 12, "window": 2048},
        "length": 4096,
        "batch": 16,
        "micro_batches": (16, 4),
        "steps": 500,
    },
    "tiny": {
        "model": {"pattern": "M-*- x 2", "hidden_size": 64, "mlp_size": 256, "num_query_heads": 4, "window": 64},
        "length": 128,
        "batch": 4,
        "micro_batches": (4, 2),
        "steps": 500,
    },
}
PEER, START = "flash-linear-attention", "start"
OURS = ("ours", "ours, other micro-batches")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="prefix of token shards")
    parser.add_argument("--folder", type=Path, required=True, help="gets the runs")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--vocab-size", type=int, default=16_384, help="of the data's tokenizer, or more")
    parser.add_argument("--read", action="store_true", help="run nothing")
    parser.add_argument("--plot", type=Path, help="PNG of the losses")
    arguments = parser.parse_args()
    if not (arguments.data or arguments.read):
        parser.error("--data is needed to train")
    if not arguments.read:
        train(arguments)
    losses = read_losses(arguments.folder)
    print(table(losses))
    if arguments.plot:
        draw(losses, arguments.plot)


def train(arguments: argparse.Namespace) -> None:
    """Trains what is not in the folder: ours as `sambalm train` does, the other model in this process."""
    folder, size = arguments.folder, SIZES[arguments.size]
    folder.mkdir(parents=True, exist_ok=True)
    configs = []
    for name, micro_batch in zip(OURS, size["micro_batches"], strict=True):
        configs.append(folder / f"{name}.yaml")
        configs[-1].write_text(yaml.safe_dump(values(arguments, size, name=name, micro_batch=micro_batch)))
    config = load_config(configs[0])
    if not (folder / START / "config.json").is_file():
        peer_model(config).save_pretrained(folder / START)
    for path, name in zip(configs, OURS, strict=True):
        if len(read_steps(folder / name)) < size["steps"]:
            subprocess.run([sys.executable, "-m", "sambalm.pretrain.cli", "train", str(path)], check=True)
    if not (folder / f"{PEER}.json").is_file():
        found = list(peer_losses(config, folder / START))
        (folder / f"{PEER}.json").write_text(json.dumps(found))


def values(arguments: argparse.Namespace, size: Mapping[str, Any], *, name: str, micro_batch: int) -> dict[str, Any]:
    """Returns the config of one of our runs."""
    model = size["model"] | {"vocab_size": arguments.vocab_size, "tie_embeddings": True}
    return {
        "format_version": 1,
        "run": {"dir": str((arguments.folder / name).resolve()), "seed": 1},
        "model": model | {"num_kv_heads": model["num_query_heads"]},
        "data": {
            "train": str(arguments.data.resolve()),
            "sequence_length": size["length"],
            "validation_fraction": 0.01,
        },
        "train": {
            "init_from": str((arguments.folder / START).resolve()),
            "steps": size["steps"],
            "global_batch_tokens": size["batch"] * size["length"],
            "micro_batch_size": micro_batch,
            "precision": "bf16" if torch.cuda.is_available() else "fp32",
        },
        "optimizer": {"peak_lr": 1e-3, "warmup_fraction": 0.1},
        "validation": {"every_steps": size["steps"], "tokens": size["length"], "length_multiples": [1]},
        "checkpoint": {"every_steps": size["steps"], "keep": 1},
        "reporting": {"writers": []},
    }


def peer_model(config: RunConfig) -> nn.Module:
    """Makes flash-linear-attention's Samba of a config's sizes, with fp32 weights that it draws."""
    if not torch.cuda.is_available():
        run_fla_on_a_cpu()
    from fla.models.samba import SambaConfig, SambaForCausalLM

    described = hf_config(config.model)
    assert described.fla_obstacle is None, described.fla_obstacle
    # Its fused functions are Triton kernels.
    fused = ("fuse_norm", "fuse_swiglu", "fuse_cross_entropy")
    options = {} if torch.cuda.is_available() else dict.fromkeys(fused, False)
    torch.manual_seed(config.run.seed)
    return SambaForCausalLM(SambaConfig.from_dict(described.to_diff_dict() | options))


def peer_losses(config: RunConfig, start: Path) -> Iterator[float]:
    """Trains the other model on the batches of a run of ours; yields the loss of each step before its update."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = peer_model(config)
    model = type(model).from_pretrained(start, config=model.config, dtype=torch.float32).to(device).train()
    optimizer = torch.optim.AdamW(
        list(_groups(model, decay=config.optimizer.weight_decay)),
        lr=config.optimizer.peak_lr,
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        eps=config.optimizer.eps,
    )
    dataset = build_train_dataset(config.data, open_sources(config.data), seed=config.run.seed)
    steps, batch = config.train.steps, config.train.global_batch_tokens // config.data.sequence_length
    micro = config.train.micro_batch_size // (4 if device.type == "cuda" else 1)  # its logits take more memory
    for step in range(1, steps + 1):
        samples = [dataset[number] for number in range((step - 1) * batch, step * batch)]
        total = 0.0
        for first in range(0, batch, micro):
            rows = samples[first : first + micro]
            tokens, labels = (torch.stack([getattr(row, name) for row in rows]) for name in ("tokens", "labels"))
            with torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
                loss = _loss(model, tokens.to(device), labels.to(device)) * len(rows) / batch
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = config.optimizer.learning_rate(step, steps=steps)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"{PEER}: step {step}, loss {total:.4f}", flush=True)
        yield total


def _loss(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    logits = model(input_ids=tokens, use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def _groups(model: nn.Module, *, decay: float) -> Iterator[dict[str, Any]]:
    """Yields matrices and convolutions, which decay, and the rest, which does not, as our runs have it."""
    named = dict(model.named_parameters())
    decaying = {name for name, weight in named.items() if weight.dim() > 1 and not name.endswith("A_log")}
    yield {"params": [named[name] for name in named if name in decaying], "weight_decay": decay}
    yield {"params": [named[name] for name in named if name not in decaying], "weight_decay": 0.0}


def read_losses(folder: Path) -> dict[str, list[float]]:
    """Returns the losses of the runs that a folder has, by name."""
    found = {name: [record["loss"] for record in read_steps(folder / name)] for name in OURS}
    path = folder / f"{PEER}.json"
    return found | ({PEER: json.loads(path.read_text())} if path.is_file() else {})


def table(losses: Mapping[str, list[float]]) -> str:
    """Compares all runs with the first, as Markdown."""
    first = losses[OURS[0]]
    lines = [
        "| run | loss of step 1 | mean loss of the last 50 | mean distance of a step from ours | the largest |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, found in losses.items():
        apart = [abs(a - b) for a, b in zip(found, first, strict=False)]
        row = f"| {name} | {found[0]:.6f} | {statistics.fmean(found[-50:]):.4f} "
        lines.append(row + f"| {statistics.fmean(apart):.2g} | {max(apart):.2g} |")
    return "\n".join(lines)


def draw(losses: Mapping[str, list[float]], path: Path) -> None:
    """Draws the losses, and below them their distances from the first run's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    for number, (name, found) in enumerate(losses.items()):
        steps = range(1, len(found) + 1)
        above.plot(steps, found, label=name, color=f"C{number}", linewidth=1)
        if number:
            apart = [abs(a - b) for a, b in zip(found, losses[OURS[0]], strict=False)]
            below.plot(steps, apart, label=f"{name} from ours", color=f"C{number}", linewidth=1)
    above.set(ylabel="training loss, nats a token")
    below.set(xlabel="step", ylabel="distance", yscale="log")
    above.legend()
    below.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
