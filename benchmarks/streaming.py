"""Time and memory of a token while a stream generates many, in windows; beside it transformers' generate().

    python benchmarks/streaming.py --tokens 1000000 --plot streaming.png
    python benchmarks/streaming.py runs/demo --tokens 100000 --window-tokens 2000 --read-tokens 100000
    python benchmarks/streaming.py --tokens 200000 --generate-tokens 50000 --output streaming.jsonl --plot streaming.png
    python benchmarks/streaming.py --read streaming.jsonl --plot streaming.png

Without a source the model has random weights and about 60,000 parameters, so that what is around the model shows. Where
other programs share the machine, processor time says more than wall time. On a GPU memory is what torch has allocated.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sambalm.model.hf import SambaConfig, SambaForCausalLM, Stream
from sambalm.pretrain.generation.sampling import Sampler, Sampling
from sambalm.pretrain.generation.source import load_source

TINY = {"hidden_size": 64, "mlp_size": 96, "vocab_size": 256, "pattern": "M-*-"}
TINY_ATTENTION = {"num_heads": 4, "num_kv_heads": 2, "window_size": 256}
Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", type=Path, help="a run, checkpoint or Hugging Face folder")
    parser.add_argument("--tokens", type=int, default=100_000, help="to generate in the stream")
    parser.add_argument("--generate-tokens", type=int, default=0, help="to generate by transformers' generate()")
    parser.add_argument("--read-tokens", type=int, default=0, help="to read first, in the stream")
    parser.add_argument("--window-tokens", type=int, default=5000, help="over which time is averaged")
    parser.add_argument("--rows", type=int, default=1, help="texts that are generated together")
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--output", type=Path, help="takes the windows, a line of JSON each")
    parser.add_argument("--read", type=Path, help="plot this output instead of measuring")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    records = [json.loads(line) for line in arguments.read.read_text().splitlines()] if arguments.read else []
    if not arguments.read:
        measure(arguments, records.append)
    print_table(records)
    if arguments.plot:
        plot(records, arguments.plot)


def measure(arguments: argparse.Namespace, keep: Callable[[Record], None]) -> None:
    model = load(arguments)

    def take(record: Record) -> None:
        keep(record)
        if arguments.output:
            with arguments.output.open("a") as file:
                file.write(json.dumps(record) + "\n")

    if arguments.generate_tokens:
        generate(model, arguments, Windows("generate()", arguments.window_tokens, model.device, take))
    if arguments.tokens:
        stream(model, arguments, Windows("stream", arguments.window_tokens, model.device, take))


def load(arguments: argparse.Namespace) -> SambaForCausalLM:
    if arguments.source:
        return load_source(arguments.source, device=arguments.device, dtype=arguments.dtype, tokenizer=None).model
    torch.manual_seed(0)
    model = SambaForCausalLM(SambaConfig(**TINY, attn=TINY_ATTENTION))
    return model.to(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


class Windows:
    """Takes a call for every token and hands on a record for every window of them."""

    def __init__(self, name: str, size: int, device: torch.device, take: Callable[[Record], None]) -> None:
        self._name, self._size, self._device, self._take = name, size, device, take
        self._tokens = 0
        self._start()

    def _start(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._began = time.perf_counter(), time.process_time()

    def token(self) -> None:
        self._tokens += 1
        if self._tokens % self._size:
            return
        wall_s, processor_s = self._began
        self._start()
        self._take(
            {
                "name": self._name,
                "tokens": self._tokens,
                "wall_ms": 1e3 * (self._began[0] - wall_s) / self._size,
                "processor_ms": 1e3 * (self._began[1] - processor_s) / self._size,
                "mib": memory_bytes(self._device) / 2**20,
            }
        )


def memory_bytes(device: torch.device) -> int:
    """What torch has allocated on a GPU, or the memory that this process has on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


def stream(model: SambaForCausalLM, arguments: argparse.Namespace, windows: Windows) -> None:
    rows = arguments.rows
    one = Stream(model, rows=rows)
    sampler = Sampler(Sampling(temperature=1.0, top_p=1.0), samples=range(rows), device=model.device)
    prompt = torch.randint(3, model.config.vocab_size, (rows, max(1, arguments.read_tokens)))
    began_s = time.perf_counter()
    one.read(prompt)
    if arguments.read_tokens:
        speed = rows * arguments.read_tokens / (time.perf_counter() - began_s)
        print(f"read {arguments.read_tokens:,} tokens at {speed:,.0f} tokens/s")
    for _ in range(arguments.tokens):
        ids = sampler(one.logits)
        ids.tolist()  # as text needs it
        one.step(ids)
        windows.token()


class _Counter:
    """A streamer of transformers that counts."""

    def __init__(self, windows: Windows) -> None:
        self._windows = windows
        self._has_prompt = False

    def put(self, ids: torch.Tensor) -> None:
        if self._has_prompt:
            self._windows.token()
        self._has_prompt = True

    def end(self) -> None:
        pass


def generate(model: SambaForCausalLM, arguments: argparse.Namespace, windows: Windows) -> None:
    prompt = torch.randint(3, model.config.vocab_size, (arguments.rows, 1), device=model.device)
    sampling = {"do_sample": True, "top_k": 0, "eos_token_id": None, "max_new_tokens": arguments.generate_tokens}
    streamer = _Counter(windows) if arguments.rows == 1 else None
    model.generate(prompt, attention_mask=torch.ones_like(prompt), streamer=streamer, **sampling)


def print_table(records: list[Record]) -> None:
    print("| | tokens | ms a token, processor | wall | MiB |\n| --- | ---: | ---: | ---: | ---: |")
    for name in dict.fromkeys(record["name"] for record in records):
        own = [record for record in records if record["name"] == name]
        parts = [own[len(own) * i // 5 : len(own) * (i + 1) // 5] for i in range(5)]
        for part in filter(None, parts):  # fifths, and the median window of each
            ms = [statistics.median(record[key] for record in part) for key in ("processor_ms", "wall_ms")]
            cells = [name, f"{part[-1]['tokens']:,}", *(f"{one:.3f}" for one in ms), f"{part[-1]['mib']:,.1f}"]
            print(f"| {' | '.join(cells)} |")


def plot(records: list[Record], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name in dict.fromkeys(record["name"] for record in records):
        own = [record for record in records if record["name"] == name]
        tokens = [record["tokens"] for record in own]
        for axis, key in zip(axes, ("processor_ms", "mib"), strict=True):
            axis.plot(tokens, [record[key] for record in own], linewidth=0.9, label=name)
    for axis, label in zip(axes, ("ms a token (processor time)", "MiB"), strict=True):
        axis.set(xlabel="tokens generated", ylabel=label, ylim=(0, 1.25 * axis.get_ylim()[1]))
        axis.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}")
        axis.locator_params(axis="x", nbins=5)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
