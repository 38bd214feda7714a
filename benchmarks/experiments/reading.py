"""Memory and speed of reading texts of several lengths, a line of JSON each.

    python -m benchmarks.experiments.reading runs/demo --lengths 1024 4096 --output reading.jsonl

A length that the output has is not measured again. Where there is no GPU, memory is that of the process so far.
"""

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch

from sambalm.evaluation.models.base import LanguageModel
from sambalm.evaluation.models.loading import open_model

REPEATS = 2  # of which the faster counts
MAX_WARM_UP_TOKENS = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--lengths", type=int, nargs="+", required=True, help="tokens of each text")
    parser.add_argument("--output", type=Path, required=True, help="JSONL that gets a line for each length")
    parser.add_argument("--dtype", default="fp32", help="of the weights: fp32 or bf16")
    arguments = parser.parse_args()
    known = {record["length"] for record in read_lines(arguments.output)}
    opened = open_model(arguments.run, device=None, dtype=arguments.dtype, tokenizer=None)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    _read(opened.model, min(max(arguments.lengths), MAX_WARM_UP_TOKENS))
    for length in sorted(set(arguments.lengths) - known):
        record = measured(opened.model, length)
        with arguments.output.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(record, flush=True)


def measured(model: LanguageModel, length: int) -> dict[str, Any]:
    """Returns the length, tokens a second, the device, and bytes at the most: of the GPU, or of the process."""
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
    seconds = min(_read(model, length) for _ in range(REPEATS))
    memory = (
        torch.cuda.max_memory_allocated(model.device)
        if on_gpu
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    device = torch.cuda.get_device_name(model.device) if on_gpu else "cpu"
    return {"length": length, "tokens_per_second": length / seconds, "peak_bytes": memory, "device": device}


def _read(model: LanguageModel, length: int) -> float:
    """Reads random tokens from nothing; returns the seconds."""
    ids = torch.randint(model.vocab_size, (1, length), generator=torch.Generator().manual_seed(length))
    began_s = time.perf_counter()
    model.new_reader(1).read(ids).float().sum().item()  # waits for the device
    return time.perf_counter() - began_s


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a JSONL file, none where it is missing; a last line that a kill cut short is left out."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


if __name__ == "__main__":
    main()
