"""Bytes that each kind of sublayer keeps for the backward, by what parallel.recompute says.

    python benchmarks/recompute.py configs/samba_421m.yaml

Runs each sublayer's forward at the model's widths with the PyTorch kernels on the CPU and adds up what autograd saves,
each storage once and weights left out. Measured at two lengths: the difference is what a token costs.
"""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml

from sambalm.model.config import ModelConfig
from sambalm.model.mixers.context import SequenceContext
from sambalm.model.ops.registry import TORCH_KERNELS
from sambalm.model.registry import mixer
from sambalm.model.samba import Sublayer
from sambalm.parallel.groups import ContextParallel, TensorParallel
from sambalm.parallel.layers import recompute
from sambalm.parallel.sharding import initialize_parameters

MODES = ("none", "selective", "full")
NAMES = {"M": "Mamba", "-": "MLP", "*": "attention"}


@contextlib.contextmanager
def keeping() -> Iterator[dict[int, int]]:
    """Bytes by address of the storages that the backward of what runs inside would need."""
    kept: dict[int, int] = {}
    checkpoint = recompute.checkpoint

    def keep(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    def keep_inputs(function: Any, *args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            keep(value)
        return checkpoint(function, *args, **kwargs)

    with (
        mock.patch.object(recompute, "checkpoint", keep_inputs),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value),
    ):
        yield kept


def kept_bytes(config: ModelConfig, letter: str, mode: str, *, tokens: int, dtype: torch.dtype) -> int:
    """What one sublayer keeps for a sequence."""
    kernels = TORCH_KERNELS.recomputing() if mode == "selective" else TORCH_KERNELS
    layer = Sublayer(letter, config, tp=TensorParallel(), kernels=kernels)
    initialize_parameters(layer, seed=0)
    tables = mixer(letter).shared_inputs(config, torch.arange(tokens).unsqueeze(1))
    context = SequenceContext(cp=ContextParallel(), shared={letter: tables})
    x = torch.randn(tokens, 1, config.hidden_size, dtype=dtype).requires_grad_()
    with keeping() as kept:
        _, output, _ = recompute.recomputed(layer, x, None, context) if mode == "full" else layer(x, None, context)
    assert output.requires_grad  # and so everything kept is alive, and no address was used twice
    weights = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    shared = {table.untyped_storage().data_ptr() for table in tables or ()}
    return sum(size for address, size in kept.items() if address not in weights | shared)


def bytes_per_token(config: ModelConfig, letter: str, mode: str, *, tokens: int, dtype: torch.dtype) -> float:
    short, long = (kept_bytes(config, letter, mode, tokens=count, dtype=dtype) for count in (tokens, 2 * tokens))
    return (long - short) / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=256, help="the shorter of the two lengths")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    arguments = parser.parse_args()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[arguments.precision]
    for path in arguments.configs:
        config = ModelConfig.model_validate(yaml.safe_load(path.read_text())["model"])
        print(f"\n{path.stem}, {arguments.precision}: bytes kept for the backward, a token and sublayer\n")
        print("| sublayer | " + " | ".join(MODES) + " |\n| --- |" + " ---: |" * len(MODES))
        totals = dict.fromkeys(MODES, 0.0)
        for letter, name in NAMES.items():
            sizes = {m: bytes_per_token(config, letter, m, tokens=arguments.tokens, dtype=dtype) for m in MODES}
            print(f"| {name} | " + " | ".join(f"{size:,.0f}" for size in sizes.values()) + " |")
            for mode, size in sizes.items():
                totals[mode] += config.pattern.count(letter) * size
        print(f"| all {len(config.pattern)}, MB for a sequence of 4096 tokens | ", end="")
        print(" | ".join(f"{4096 * total / 1e6:,.0f}" for total in totals.values()) + " |")


if __name__ == "__main__":
    main()
