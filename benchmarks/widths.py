"""Times the matrix products of widths that GPUs have no fast kernels for, as they are and as ranks hold them.

    python benchmarks/widths.py
    python benchmarks/widths.py --hidden-size 1536 --widths 4097 4099 --vocabularies 50257

A rank holds its share of a width with zeros behind it (parallel/shard.py). Of each width, on one, two and four
tensor-parallel ranks by shape, the products of an MLP or of the head are timed forward and backward: held so, of the
next multiple of 64, and of the share as it is.
"""

import argparse
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from kernels import median_ms

from sambalm.parallel.shard import Position, Shard, equal_shard, shard

REPEATS, RANKS = 20, (1, 2, 4)


def mlp_ms(width: int, *, hidden_size: int, tokens: int) -> float:
    """The products of gate and up, taken as one, and of down; forward, for the input's gradient and the weight's."""
    return _products_ms(2 * width, hidden_size, tokens=tokens) + _products_ms(hidden_size, width, tokens=tokens)


def head_ms(rows: int, *, hidden_size: int, tokens: int) -> float:
    """The products of the head."""
    return _products_ms(rows, hidden_size, tokens=tokens)


@cache
def _products_ms(out_features: int, in_features: int, *, tokens: int) -> float:
    x, gradient, weight = (
        torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
        for shape in ((tokens, in_features), (tokens, out_features), (out_features, in_features))
    )
    products: list[Callable[[], torch.Tensor]] = [
        lambda: F.linear(x, weight),
        lambda: gradient @ weight,
        lambda: torch.mm(gradient.t(), x, out_dtype=torch.float32),
    ]
    return sum(median_ms(product, repeats=REPEATS) for product in products)


def print_rows(name: str, widths: list[int], share_of: Callable[[int, Position], Shard], measure: Callable) -> None:
    print(f"\n| {name} | ranks | share | held | ms | of the next multiple of 64 | as it is |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    worst = 1.0
    for width in widths:
        for ranks in RANKS:
            share = share_of(width, Position(ranks, rank=ranks - 1))  # the last rank's is the oddest
            held, aligned, plain = (measure(size) for size in (share.held, -(-share.length // 64) * 64, share.length))
            worst = min(worst, aligned / held)
            print(
                f"| {width} | {ranks} | {share.length} | {share.held} | {held:.3f} | {aligned / held:.1%} of its speed "
                f"| {aligned / plain:.1%} |"
            )
    print(f"\nSlowest: {worst:.1%} of the speed of the next multiple of 64.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--widths", type=int, nargs="*", default=list(range(8191, 8201)))
    parser.add_argument("--vocabularies", type=int, nargs="*", default=[31_999, 32_000, 32_001, 32_063, 32_064, 50_257])
    arguments = parser.parse_args()
    device, tokens, hidden_size = torch.cuda.get_device_name(), arguments.tokens, arguments.hidden_size
    print(f"{device}, torch {torch.__version__}; {tokens} tokens, hidden size {hidden_size}, bf16")
    sizes = {"hidden_size": hidden_size, "tokens": tokens}
    print_rows("MLP width", arguments.widths, shard, lambda width: mlp_ms(width, **sizes))
    print_rows("vocabulary", arguments.vocabularies, equal_shard, lambda rows: head_ms(rows, **sizes))


if __name__ == "__main__":
    main()
