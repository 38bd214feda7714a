"""Throughput of `sambalm data preprocess` beside what it replaces, on the same text and the same cores.

    python benchmarks/preprocess.py --input text.jsonl --tokenizer tokenizer.model [--workers 2] [--repeats 3]

Ours is the whole command: start-up, the proof of the fast path, reading, checksums, fsync and the manifest. Beside it
SentencePiece alone encodes the same texts, which are in memory already, with as many threads as there are workers; and
Megatron-LM's tools/preprocess_data.py where --megatron names its checkout. They take turns, so that other load on the
machine meets all of them; the ratio is of each turn. Processor time is less disturbed by such load.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import sentencepiece

from sambalm.data_pipeline.documents import read_documents


def ours(input_path: Path, tokenizer: Path, workers: int) -> None:
    with tempfile.TemporaryDirectory(dir=input_path.parent) as folder:
        command = [sys.executable, "-m", "sambalm.pretrain.cli", "data", "preprocess", "--input", str(input_path)]
        command += ["--tokenizer", str(tokenizer), "--output", f"{folder}/data", "--workers", str(workers)]
        execute(command)


def plain_sentencepiece(texts: list[str], tokenizer: Path, threads: int) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    for first in range(0, len(texts), 1000):
        processor.encode(texts[first : first + 1000], num_threads=threads)


def megatron_lm(checkout: Path, input_path: Path, tokenizer: Path, workers: int) -> None:
    with tempfile.TemporaryDirectory(dir=input_path.parent) as folder:
        command = [sys.executable, str(checkout / "tools/preprocess_data.py"), "--input", str(input_path)]
        command += ["--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", str(tokenizer), "--append-eod"]
        command += ["--output-prefix", f"{folder}/data", "--workers", str(workers)]
        execute(command, PYTHONPATH=str(checkout))


def execute(command: list[str], **environment: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **environment})


def timed(run: Callable[[], None]) -> tuple[float, float]:
    """Seconds that pass, and seconds of processor time, of child processes too."""
    start_s, start_cpu_s = time.perf_counter(), cpu_s()
    run()
    return time.perf_counter() - start_s, cpu_s() - start_cpu_s


def cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="a .jsonl file, best of 100 MB or more")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a SentencePiece model")
    parser.add_argument("--megatron", type=Path, help="a checkout of Megatron-LM whose packages are installed")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    texts = [document.text for document in read_documents(arguments.input)]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{len(texts):,} documents, {megabytes:.1f} MB of text, {arguments.workers} workers or threads")
    runs = {
        "sambalm data preprocess": lambda: ours(arguments.input, arguments.tokenizer, arguments.workers),
        "sentencepiece alone": lambda: plain_sentencepiece(texts, arguments.tokenizer, arguments.workers),
    }
    if arguments.megatron:
        runs["Megatron-LM preprocess_data.py"] = lambda: megatron_lm(
            arguments.megatron, arguments.input, arguments.tokenizer, arguments.workers
        )
    turns = [{name: timed(run) for name, run in runs.items()} for _ in range(arguments.repeats)]
    for name in runs:
        speeds = sorted(megabytes / turn[name][0] for turn in turns)
        ratios = sorted(turn[name][0] / turn["sambalm data preprocess"][0] for turn in turns)
        cpu = statistics.median(turn[name][1] for turn in turns)
        spread = f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(
            f"{name:<30}{statistics.median(speeds):6.1f} MB/s ({speeds[0]:.1f} to {speeds[-1]:.1f}), {cpu:5.1f} s of "
            f"processor time; ours is {statistics.median(ratios):.2f} times as fast {spread}"
        )
    if not arguments.megatron:
        print("Megatron-LM's own tool was not run: give its checkout with --megatron")


if __name__ == "__main__":
    main()
