"""Prefill and decoding of a Samba and of a Llama of the same sizes, by length and batch, side by side on one GPU.

    python benchmarks/inference/measure.py configs/samba_1.7b.yaml --output inference.jsonl
    python benchmarks/inference/measure.py configs/samba_1.7b.yaml --output inference.jsonl --models samba \\
        --only prefill --lengths 1048576
    python benchmarks/inference/measure.py --output inference.jsonl --table --plot inference.png

Weights are random, in bf16. A prefill reads `--tokens` tokens in all, in as many rows as their length allows, and
computes the logits after the last of each row. Samba reads by `Stream.read`, in pieces. A decode step is one CUDA graph
that takes the likeliest token of each row; its time is a mean over --steps steps that begin after so many tokens of
context, whose contents do not matter for it. The Llama's kernels are those that llama.py names. Floors are the products
at the rate of a large one, and the bytes of weights, states, keys and values at the rate of a copy, both measured
first.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from llama import KEY_SPLITS, Llama, LlamaDecoder
from random_model import random_model

from sambalm.model.config import ModelConfig
from sambalm.model.hf import SambaForCausalLM, Stream
from sambalm.model.hf.decoder import Decoder
from sambalm.model.mixers.counts import mean_keys
from sambalm.pretrain.config_file import load_config

DEVICE = torch.device("cuda")
MODELS = {"samba": "Samba", "llama": "Llama"}
GIB = 2**30
Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", help="a run's config, followed by overrides; not needed to read results")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--only", choices=["prefill", "decode"])
    parser.add_argument("--tokens", type=int, default=131072, help="of a prefill, or one row where that is longer")
    parser.add_argument("--lengths", nargs="*", type=int, default=[1024, 4096, 16384, 65536, 131072])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 16, 64])
    parser.add_argument("--contexts", nargs="*", type=int, default=[1024, 4096, 16384, 32768, 65536])
    parser.add_argument("--steps", type=int, default=100, help="of decoding that are timed together")
    parser.add_argument("--table", action="store_true", help="only read the output")
    parser.add_argument("--plot", type=Path)
    arguments, overrides = parser.parse_known_intermixed_args()
    if not arguments.table:
        measure(load_config(Path(arguments.config), overrides).model, arguments)
    records = [json.loads(line) for line in arguments.output.read_text().splitlines()]
    print_tables(records)
    if arguments.plot:
        plot(records, arguments.plot)


def measure(config: ModelConfig, arguments: argparse.Namespace) -> None:
    common = {"device": torch.cuda.get_device_name(), "torch": torch.__version__} | rates()

    def keep(record: Record) -> None:
        print(json.dumps(record), file=sys.stderr, flush=True)
        with arguments.output.open("a") as file:
            file.write(json.dumps(record | common) + "\n")

    for name in arguments.models:
        model = (
            random_model(config, device=DEVICE, dtype=torch.bfloat16)
            if name == "samba"
            else Llama(config, device=DEVICE)
        )
        if arguments.only != "decode":
            for length in arguments.lengths:
                keep(attempt(prefill, model, name, config, length, arguments))
        if arguments.only != "prefill":
            for batch in arguments.batches:
                for record in decode(model, name, config, batch, arguments):
                    keep(record)
        del model
        torch.cuda.empty_cache()


def rates() -> dict[str, float]:
    """Measures a copy, bytes read and written a second, and a large product in bf16, operations a second."""
    copied = torch.randn(2, 2**29, device=DEVICE)
    copy_s = timed(lambda: copied[0].copy_(copied[1]), repeats=10)
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    # As many as take about a second, since the clock falls under such a load.
    product_s = timed(lambda: [a @ b for _ in range(300)], repeats=3) / 300
    return {"copy_bytes_per_s": 4 * 2**30 / copy_s, "product_flops": 2 * 8192**3 / product_s}


def timed(function: Callable[[], Any], *, repeats: int) -> float:
    """Returns the median of so many runs in seconds, after one that is not timed."""
    seconds = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        function()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began_s)
    return statistics.median(seconds[1:])


def attempt(function: Callable[..., Record], *arguments: Any) -> Record:
    """Returns what a function measures, or that memory did not suffice."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        return function(*arguments)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"kind": function.__name__, "model": arguments[1], "outcome": "out of memory"}


def prefill(
    model: SambaForCausalLM | Llama, name: str, config: ModelConfig, length: int, arguments: argparse.Namespace
) -> Record:
    rows = max(1, arguments.tokens // length)
    ids = torch.randint(config.vocab_size, (rows, length), device=DEVICE)
    if isinstance(model, Llama):
        seconds = timed(lambda: model.prefill(ids), repeats=3)
    else:
        seconds = timed(lambda: Stream(model, rows=rows).read(ids), repeats=3)
    tokens = rows * length
    return {
        "kind": "prefill",
        "model": name,
        "length": length,
        "rows": rows,
        "tokens_per_s": tokens / seconds,
        "product_flops_needed": product_flops(config, name, length) * tokens,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "seconds": seconds,
    }


def product_flops(config: ModelConfig, name: str, length: int) -> float:
    """Returns the operations a token of a prefill's products with weights and with keys and values."""
    width, mlp = config.hidden_size, 6 * config.hidden_size * config.mlp_size
    attention = 4 * width**2 + 4 * width * config.kv_size
    keys = length / 2 if name == "llama" else mean_keys(length, config.window)
    attention += 4 * width * keys
    inner, rank, states = config.inner_size, config.dt_rank_size, config.d_state
    mamba = 2 * (3 * width * inner + inner * (2 * rank + 2 * states))
    letters = "*-" * (len(config.pattern) // 2) if name == "llama" else config.pattern
    return sum({"*": attention, "-": mlp, "M": mamba}[letter] for letter in letters)


def decode(
    model: SambaForCausalLM | Llama, name: str, config: ModelConfig, rows: int, arguments: argparse.Namespace
) -> list[Record]:
    """Measures steps of so many rows after each context; for the Llama with the splits of its keys that are fastest."""
    best: dict[int, Record] = {}
    for splits in KEY_SPLITS if isinstance(model, Llama) else (0,):
        torch.cuda.empty_cache()
        try:
            if isinstance(model, Llama):
                cache_tokens = max(arguments.contexts) + 3 * arguments.steps
                decoder: Any = LlamaDecoder(model, rows=rows, cache_tokens=cache_tokens, splits=splits)
            else:
                decoder = Decoder(model, rows=rows)
        except torch.OutOfMemoryError:
            return [{"kind": "decode", "model": name, "rows": rows, "outcome": "out of memory"}]
        for record in steps_of(decoder, model, name, config, rows, arguments):
            record["splits"] = splits
            best[record["context"]] = min(best.get(record["context"], record), record, key=lambda r: r["seconds"])
        del decoder
    return list(best.values())


def steps_of(
    decoder: Any,
    model: SambaForCausalLM | Llama,
    name: str,
    config: ModelConfig,
    rows: int,
    arguments: argparse.Namespace,
) -> Iterator[Record]:
    """Yields what the steps of a decoder take after each context."""
    for context in arguments.contexts:
        if isinstance(model, Llama):
            decoder.load(seen_tokens=context)
        else:
            decoder.load({}, seen_tokens=[context] * rows)
        ids = torch.zeros(rows, dtype=torch.int64, device=DEVICE)

        def steps(ids: torch.Tensor = ids) -> None:
            for _ in range(arguments.steps):
                ids = decoder(ids).argmax(-1)

        seconds = timed(steps, repeats=2) / arguments.steps
        yield {
            "kind": "decode",
            "model": name,
            "rows": rows,
            "context": context,
            "seconds": seconds,
            "tokens_per_s": rows / seconds,
            "bytes_needed": decode_bytes(model, name, config, rows, context),
            "allocated_bytes": torch.cuda.memory_allocated(),
        }


def decode_bytes(model: SambaForCausalLM | Llama, name: str, config: ModelConfig, rows: int, context: int) -> int:
    """Returns the bytes that a step cannot do without: weights, keys and values, states read and written."""
    weights = model.parameters if isinstance(model, Llama) else model.num_parameters()
    keys = context if name == "llama" else min(context, config.window)
    attentions = len(config.pattern) // 2 if name == "llama" else config.pattern.count("*")
    states = 0 if name == "llama" else config.pattern.count("M") * config.inner_size * config.d_state
    return 2 * weights + rows * (attentions * keys * 2 * config.kv_size * 2 + 2 * 4 * states)


def print_tables(records: list[Record]) -> None:
    one = records[-1]
    print(
        f"\n{one['device']}, torch {one['torch']}; copy {one['copy_bytes_per_s'] / 1e12:.2f} TB/s, product "
        f"{one['product_flops'] / 1e12:.0f} TFLOP/s\n"
    )
    print("| prefill | rows x tokens | tokens/s | floor of products, tokens/s | peak GiB |\n| --- |" + " ---: |" * 4)
    for record in (r for r in records if r["kind"] == "prefill" and "seconds" in r):
        floor = record["rows"] * record["length"] / (record["product_flops_needed"] / record["product_flops"])
        cells = [MODELS[record["model"]], f"{record['rows']} x {record['length']:,}", f"{record['tokens_per_s']:,.0f}"]
        cells += [f"{floor:,.0f}", f"{record['peak_bytes'] / GIB:.1f}"]
        print(f"| {' | '.join(cells)} |")
    print("\n| decode | rows | context | ms a step | tokens/s | floor of bytes, ms |\n| --- |" + " ---: |" * 5)
    for record in (r for r in records if r["kind"] == "decode" and "seconds" in r):
        floor_ms = 1e3 * record["bytes_needed"] / record["copy_bytes_per_s"]
        cells = [MODELS[record["model"]], str(record["rows"]), f"{record['context']:,}"]
        cells += [f"{1e3 * record['seconds']:.2f}", f"{record['tokens_per_s']:,.0f}", f"{floor_ms:.2f}"]
        print(f"| {' | '.join(cells)} |")

    print_means([record for record in records if record["kind"] == "decode" and "seconds" in record])


def print_means(records: list[Record]) -> None:
    """Prints the mean time of a step from no context to the longest, straight lines between those measured."""
    longest = max((record["context"] for record in records), default=0)
    print(f"\n| decode, mean ms over {longest:,} | rows | {' | '.join(MODELS.values())} |\n| --- |" + " ---: |" * 3)
    for rows in sorted({record["rows"] for record in records}):
        cells = []
        for model in MODELS:
            own = sorted((r["context"], r["seconds"]) for r in records if (r["model"], r["rows"]) == (model, rows))
            points = [(0, own[0][1]), *own] if own else []
            area = sum((x - w) * (s + t) / 2 for (w, s), (x, t) in itertools.pairwise(points))
            cells.append(f"{1e3 * area / points[-1][0]:.2f}" if points else "")
        print(f"| mean | {rows} | {' | '.join(cells)} |")


def plot(records: list[Record], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    measured = [record for record in records if "seconds" in record]
    batches = sorted({record["rows"] for record in measured if record["kind"] == "decode"})
    for (model, title), style in zip(MODELS.items(), ("o-", "s--"), strict=True):
        own = [record for record in measured if record["model"] == model]
        points = sorted((r["length"], r["tokens_per_s"]) for r in own if r["kind"] == "prefill")
        axes[0].plot(*zip(*points, strict=True), style, label=title)
        for number, rows in enumerate(batches):
            points = sorted(
                (r["context"], r["tokens_per_s"]) for r in own if r["kind"] == "decode" and r["rows"] == rows
            )
            axes[1].plot(*zip(*points, strict=True), style, color=f"C{number}", label=f"{title}, batch {rows}")
    axes[0].set(xlabel="tokens of a prompt", ylabel="tokens/s of prefill", ylim=(0, None))
    axes[1].set(xlabel="tokens before the step", ylabel="tokens/s of decoding", yscale="log")
    for axis, key in zip(axes, ("length", "context"), strict=True):
        ticks = sorted({record[key] for record in measured if key in record})
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{tick // 1024}K" for tick in ticks])
        axis.yaxis.set_major_formatter("{x:,.0f}")
        axis.grid(alpha=0.3)
    axes[0].legend()
    axes[1].legend(ncols=2, fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
