"""Times linear layers forward and backward on a GPU: in bf16, in FP8, and through torchao where it is installed.

    python benchmarks/fp8.py
    python benchmarks/fp8.py configs/samba_3.8b.yaml --tokens 16384

The layers are those of a config's products. Ours (parallel/layers/fp8_linear.py) have fp32 weights, rounded in each
call as in a step of one micro-batch, and sum weights' gradients in fp32; the scales come from a call before. torchao's
are `Float8Linear` with a scale a tensor from the tensor itself, or one a row, on bf16 weights, under torch.compile;
their weights' gradients are bf16.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from kernels import median_ms
from torch import Tensor, nn

from sambalm.parallel.layers.fp8 import Fp8Store
from sambalm.parallel.layers.linear import fuse_gradient_accumulation, linear, overwriting
from sambalm.parallel.shard import Shard
from sambalm.parallel.sharding import sharded_parameter
from sambalm.pretrain.config_file import load_config

REPEATS = 15
Call = Callable[[], None]


def products_of(config: Path) -> dict[str, tuple[int, int]]:
    """Output and input features of the large products, by what they are of."""
    model = load_config(config, ["data.train=x", "run.dir=x"]).model
    hidden, inner, mlp = model.hidden_size, 2 * model.hidden_size, model.mlp_size
    head_dim = hidden // model.num_query_heads
    return {
        "Mamba in": (2 * inner, hidden),
        "Mamba out": (hidden, inner),
        "attention in": ((model.num_query_heads + 2 * model.num_kv_heads) * head_dim, hidden),
        "attention out": (hidden, model.num_query_heads * head_dim),
        "gate and up": (2 * mlp, hidden),
        "down": (hidden, mlp),
    }


def ours(out_features: int, in_features: int, x: Tensor, gradient: Tensor, *, fp8: bool) -> Call:
    with torch.device("cuda"):
        shards = {"weight": Shard(out_features, 0, out_features)}
        weight = sharded_parameter((0, in_features), shards, init=nn.init.xavier_normal_, takes_fp8=fp8)
    store = Fp8Store([weight], groups=[], device=x.device)
    weight.grad = torch.zeros_like(weight)
    fuse_gradient_accumulation([weight])

    def call() -> None:
        with store.kept(), store.renewing():
            y = linear(x, weight)
            with overwriting([weight]):
                y.backward(gradient)

    linear(x, weight).backward(gradient)  # finds the scales
    store.finish_step()
    return call


def torchao(out_features: int, in_features: int, x: Tensor, gradient: Tensor, *, recipe: str) -> Call:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    model = nn.Sequential(nn.Linear(in_features, out_features, bias=False, device="cuda", dtype=torch.bfloat16))
    convert_to_float8_training(model, config=Float8LinearConfig.from_recipe_name(recipe))
    torch.compiler.reset()  # it compiles only so many models
    compiled = torch.compile(model)

    def call() -> None:
        model[0].weight.grad = None
        compiled(x).backward(gradient)

    return call


def print_rows(config: Path, *, tokens: int) -> None:
    makers: dict[str, Callable[..., Call]] = {
        "bf16": lambda *a: ours(*a, fp8=False),
        "FP8": lambda *a: ours(*a, fp8=True),
        "torchao, a tensor": lambda *a: torchao(*a, recipe="tensorwise"),
        "torchao, a row": lambda *a: torchao(*a, recipe="rowwise"),
    }
    print(f"\n| {config.stem}, {tokens} tokens | out, in | " + " | ".join(f"{name}, ms" for name in makers) + " |")
    print("| --- |" + " ---: |" * (1 + len(makers)))
    for name, (out_features, in_features) in products_of(config).items():
        shapes = ((tokens, in_features), (tokens, out_features))
        x, gradient = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
        x.requires_grad_()
        times = []
        for make in makers.values():
            try:
                times.append(f"{median_ms(make(out_features, in_features, x, gradient), repeats=REPEATS):.3f}")
            except ImportError:
                times.append("not installed")
        print(f"| {name} | {out_features}, {in_features} | " + " | ".join(times) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", type=Path, default=[Path("configs/samba_1.3b.yaml")])
    parser.add_argument("--tokens", type=int, default=16384)
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, medians of {REPEATS}, forward and backward")
    for config in arguments.configs:
        print_rows(config, tokens=arguments.tokens)


if __name__ == "__main__":
    main()
