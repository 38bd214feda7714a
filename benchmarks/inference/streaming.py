"""Time and memory of a token while a stream generates many, in windows; beside it transformers' generate().

    python benchmarks/inference/streaming.py --tokens 1000000 --output streaming.jsonl --plot streaming.png
    python benchmarks/inference/streaming.py runs/demo --tokens 100000 --window-tokens 2000 --read-tokens 100000
    python benchmarks/inference/streaming.py --tokens 200000 --generate-tokens 50000 --output streaming.jsonl
    python benchmarks/inference/streaming.py configs/samba_1.7b.yaml --minutes 9 --output streaming.jsonl \\
        --plot streaming.png
    python benchmarks/inference/streaming.py --read streaming.jsonl --plot streaming.png

The model of a config has random weights. Without a source there is one of about 60,000 parameters, so that what is
around the model shows. Windows are written as they end, and the plot is drawn anew every half minute: a run that is
killed leaves both. A first token, which compiles the kernels of a GPU, is not timed. Where other programs share the
machine, processor time says more than wall time. On a GPU memory is what torch has allocated, and the plot shows wall
time.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from random_model import random_model

from sambalm.model.hf import SambaConfig, SambaForCausalLM, Stream
from sambalm.pretrain.config_file import load_config
from sambalm.pretrain.generation.sampling import Sampler, Sampling
from sambalm.pretrain.generation.source import DTYPES, device_named, dtype_of_run, load_source

TINY = {"hidden_size": 64, "mlp_size": 96, "vocab_size": 256, "pattern": "M-*-"}
TINY_ATTENTION = {"num_heads": 4, "num_kv_heads": 2, "window_size": 256}
REDRAWN_AFTER_S = 30
Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source", nargs="?", type=Path, help="a run, checkpoint or Hugging Face folder, or a config and overrides"
    )
    parser.add_argument("--tokens", type=int, default=100_000, help="to generate in the stream, of each text")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which the stream ends before that")
    parser.add_argument("--generate-tokens", type=int, default=0, help="to generate by transformers' generate()")
    parser.add_argument("--read-tokens", type=int, default=0, help="to read first, in the stream")
    parser.add_argument("--window-tokens", type=int, default=5000, help="over which time is averaged")
    parser.add_argument("--rows", type=int, default=1, help="texts that are generated together")
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: as stored, and on a GPU as a run trains")
    parser.add_argument("--output", type=Path, help="takes the windows, a line of JSON each")
    parser.add_argument("--read", type=Path, help="plot this output instead of measuring")
    parser.add_argument("--plot", type=Path)
    arguments, overrides = parser.parse_known_intermixed_args()
    if arguments.read:
        records = [json.loads(line) for line in arguments.read.read_text().splitlines()]
    else:
        records = measure(arguments, overrides)
    print_table(records)
    if arguments.plot:
        plot(records, arguments.plot)


def measure(arguments: argparse.Namespace, overrides: list[str]) -> list[Record]:
    """Returns a record for each window, which the output and the plot have by then."""
    model = load(arguments, overrides)
    common = {"device": device_name(model.device), "torch": torch.__version__, "rows": arguments.rows}
    common |= {"parameters": model.num_parameters(), "dtype": str(model.dtype).removeprefix("torch.")}
    records: list[Record] = []
    drawn_s = -math.inf

    def take(record: Record) -> None:
        nonlocal drawn_s
        records.append(record | common)
        if arguments.output:
            with arguments.output.open("a") as file:
                file.write(json.dumps(records[-1]) + "\n")
        if arguments.plot and time.perf_counter() - drawn_s > REDRAWN_AFTER_S:
            plot(records, arguments.plot)
            drawn_s = time.perf_counter()

    if arguments.generate_tokens:
        generate(model, arguments, Windows("generate()", arguments.window_tokens, model.device, take))
    if arguments.tokens:
        stream(model, arguments, Windows("stream", arguments.window_tokens, model.device, take))
    return records


def load(arguments: argparse.Namespace, overrides: list[str]) -> SambaForCausalLM:
    source: Path | None = arguments.source
    if source and source.is_dir():
        return load_source(source, device=arguments.device, dtype=arguments.dtype, tokenizer=None).model
    torch.manual_seed(0)
    device = device_named(arguments.device)
    if source:
        config = load_config(source, overrides)
        dtype = DTYPES[arguments.dtype] if arguments.dtype else dtype_of_run(config, device)
        return random_model(config.model, device=device, dtype=dtype)
    return SambaForCausalLM(SambaConfig(**TINY, attn=TINY_ATTENTION)).to(device).eval()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class Windows:
    """Takes a call for every token and hands on a record for every window of them."""

    def __init__(self, name: str, size: int, device: torch.device, take: Callable[[Record], None]) -> None:
        self._name, self._size, self._device, self._take = name, size, device, take
        self._tokens = 0

    def start(self) -> None:
        """Begins the first window."""
        self._began = self._now()
        self._first_s = self._began[0]

    def _now(self) -> tuple[float, float]:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter(), time.process_time()

    def token(self) -> None:
        self._tokens += 1
        if self._tokens % self._size:
            return
        ended = self._now()
        self._take(
            {
                "name": self._name,
                "tokens": self._tokens,
                "wall_ms": 1e3 * (ended[0] - self._began[0]) / self._size,
                "processor_ms": 1e3 * (ended[1] - self._began[1]) / self._size,
                "mib": memory_bytes(self._device) / 2**20,
                "seconds": ended[0] - self._first_s,
            }
        )
        self._began = self._now()  # without what the record's taker did


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
    one.step(sampler(one.logits))
    windows.start()
    ends_s = time.perf_counter() + 60 * arguments.minutes
    for _ in range(arguments.tokens):
        ids = sampler(one.logits)
        ids.tolist()  # as text needs it
        one.step(ids)
        windows.token()
        if time.perf_counter() > ends_s:
            break


class _Counter:
    """A streamer of transformers that counts."""

    def __init__(self, windows: Windows) -> None:
        self._windows = windows
        self._has_prompt = False

    def put(self, ids: torch.Tensor) -> None:
        if self._has_prompt:
            self._windows.token()
        else:
            self._windows.start()
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

    is_gpu = any(record.get("device", "cpu") != "cpu" for record in records)
    time_key, word = ("wall_ms", "wall") if is_gpu else ("processor_ms", "processor")
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name in dict.fromkeys(record["name"] for record in records):
        own = [record for record in records if record["name"] == name]
        tokens = [record["tokens"] for record in own]
        for axis, key in zip(axes, (time_key, "mib"), strict=True):
            axis.plot(tokens, [record[key] for record in own], linewidth=0.9, label=name)
    for axis, label in zip(axes, (f"ms a token ({word} time)", "MiB"), strict=True):
        axis.set(xlabel="tokens generated", ylabel=label, ylim=(0, 1.25 * axis.get_ylim()[1]))
        axis.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}")
        axis.locator_params(axis="x", nbins=5)
        axis.grid(alpha=0.3)
        axis.legend()
    unfinished = path.with_name(f".{path.name}")
    figure.savefig(unfinished, dpi=120, format=path.suffix[1:] or "png")
    unfinished.replace(path)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
