"""Time and memory of a prompt and of what follows it on a CPU, of several models beside each other.

    python benchmarks/inference/cpu.py configs/samba_421m.yaml configs/paper/llama2_438m.yaml --output cpu.jsonl
    python benchmarks/inference/cpu.py --output cpu.jsonl --table

Weights are random. A prompt is read once, by one row, as `sambalm generate` reads it; the time up to the logits after
its last token is that of the first token. Then --steps tokens are read one by one, each the likeliest so far; the time
of a token is their median. Models take turns at each length. A state is what a text leaves behind beside the weights:
of Mamba its states, of attention keys and values.
"""

import argparse
import json
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from random_model import random_model

from sambalm.model.hf import SambaForCausalLM, Stream
from sambalm.pretrain.config_file import load_config

MIB = 2**20
Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", type=Path, help="runs' configs; none are needed to read results")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines")
    parser.add_argument("--lengths", nargs="*", type=int, default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--steps", type=int, default=16, help="tokens after each prompt")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")
    parser.add_argument("--table", action="store_true", help="only read the output")
    arguments = parser.parse_args()
    if not arguments.table:
        measure(arguments)
    print_table([json.loads(line) for line in arguments.output.read_text().splitlines()])


def measure(arguments: argparse.Namespace) -> None:
    dtype = getattr(torch, arguments.dtype)
    models = {
        path.stem: random_model(load_config(path, []).model, device=torch.device("cpu"), dtype=dtype)
        for path in arguments.configs
    }
    common = {"torch": torch.__version__, "threads": torch.get_num_threads(), "dtype": arguments.dtype}
    for model in models.values():
        measured(model, 64, steps=2)  # warms up
    for length in arguments.lengths:
        for name, model in models.items():
            record = {"model": name, **measured(model, length, steps=arguments.steps), **common}
            print(json.dumps(record), flush=True)
            with arguments.output.open("a") as file:
                file.write(json.dumps(record) + "\n")


@torch.inference_mode()
def measured(model: SambaForCausalLM, length: int, *, steps: int) -> Record:
    """Reads a random prompt of so many tokens, and then `steps` more."""
    ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(length))
    stream = Stream(model)
    began_s = time.perf_counter()
    logits = stream.read(ids)
    moments_s = [time.perf_counter()]
    for _ in range(steps):
        logits = stream.step(logits.argmax(dim=-1))
        moments_s.append(time.perf_counter())
    return {
        "length": length,
        "first_token_s": moments_s[0] - began_s,
        "token_s": statistics.median(stop - start for start, stop in pairwise(moments_s)),
        "state_mib": state_bytes(stream) / MIB,
        "weights_mib": sum(parameter.nbytes for parameter in model.parameters()) / MIB,
    }


def state_bytes(stream: Stream) -> int:
    """Returns the bytes of the file that a stream is saved as, but for the logits after its last token."""
    assert stream.logits is not None
    with tempfile.TemporaryDirectory() as folder:
        stream.save(Path(folder) / "state")
        return (Path(folder) / "state").stat().st_size - stream.logits.nbytes


def print_table(records: list[Record]) -> None:
    models = list(dict.fromkeys(record["model"] for record in records))
    (setting,) = {(record["torch"], record["threads"], record["dtype"]) for record in records}
    print("torch {}, {} threads, {}\n".format(*setting))
    for name in models:
        (weights,) = {round(record["weights_mib"]) for record in records if record["model"] == name}
        print(f"- {name}: {weights:,} MiB of weights")
    columns = [f"{what}, {name}" for what in ("first token, s", "tokens/s after it", "state, MiB") for name in models]
    print("\n| tokens of the prompt | " + " | ".join(columns) + " |")
    print("| ---: |" + " ---: |" * len(columns))
    for length in sorted({record["length"] for record in records}):
        own = {record["model"]: record for record in records if record["length"] == length}
        found = [own.get(name) for name in models]
        cells = [f"{one['first_token_s']:.2f}" if one else "" for one in found]
        cells += [f"{1 / one['token_s']:.1f}" if one else "" for one in found]
        cells += [f"{one['state_mib']:.1f}" if one else "" for one in found]
        print(f"| {length:,} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
