"""Throughput of each stage of `sambalm.data_pipeline.recipes.web` on one core, in processor time.

    python benchmarks/web_recipe.py --input FOLDER --format jsonl --tokenizer tokenizer.model [--tasks 1]

Other load on the machine disturbs processor time least, so that is what the rates are of. The bytes are those of the
texts that a stage reads, in UTF-8, and for the first stage those of the input's files. Reading, decompression and fsync
are inside; the start of Python is not. A step of the first stage has the part of the stage's processor time that its
clock has of all clocks. datatrove's log goes to standard error.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from sambalm.data_pipeline.documents import read_documents
from sambalm.data_pipeline.recipes.web import WebRecipe, prepare, stages
from sambalm.data_pipeline.shards import read_manifest


def measure(recipe: WebRecipe) -> None:
    from datatrove.executor import LocalPipelineExecutor

    prepare(recipe)
    folder = Path(recipe.input)
    size_bytes = sum(
        (folder / name).stat().st_size for name in (recipe.work / "inputs.txt").read_text().split("\n")[:-1]
    )
    print("| stage | MB | processor s | MB/s of one core |\n| --- | ---: | ---: | ---: |")
    for stage in stages(recipe):
        logs = str(recipe.work / "logs" / stage.name)
        executor = LocalPipelineExecutor(stage.steps, tasks=stage.tasks, workers=1, logging_dir=logs)
        start_s = time.process_time()
        executor.run()
        cpu_s = time.process_time() - start_s
        megabytes = size_bytes / 1e6
        print(f"| {stage.name} | {megabytes:.1f} | {cpu_s:.1f} | {megabytes / cpu_s:.2f} |", flush=True)
        if stage.name == "filter":
            kept = sorted((recipe.work / "kept").iterdir())
            texts = [document.text for path in kept for document in read_documents(path)]
            size_bytes = sum(len(text.encode()) for text in texts)
            print_steps(recipe.work / "logs" / stage.name / "stats.json", cpu_s)
    manifest = read_manifest(recipe.output)
    assert manifest is not None, "the last stage writes it"
    print(f"{sum(shard.tokens for shard in manifest.shards):,} tokens")


def print_steps(path: Path, stage_s: float) -> None:
    """The processor time of a stage's steps, and how many documents the filters have let pass."""
    steps = json.loads(path.read_text())
    clock_s = sum(step["time_stats"]["total"] for step in steps)
    for step in steps:
        total, forwarded = (step["stats"].get(name) for name in ("total", "forwarded"))
        passed = f" {forwarded:,} of {total:,} documents" if forwarded is not None else ""
        print(f"| {step['name']}{passed} | | {stage_s * step['time_stats']['total'] / clock_s:.1f} | |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True)
    parser.add_argument("--format", required=True, choices=("jsonl", "parquet"))
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--tasks", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe = WebRecipe(
            input=given.input,
            format=given.format,
            glob=None,
            text_key="text",
            language="en",
            language_model="py3langid",
            language_threshold=0.65,
            quality=True,
            deduplicate=True,
            tokenizer=given.tokenizer,
            eos=True,
            eos_token=None,
            special_tokens=False,
            shard_tokens=2**30,
            output=Path(folder) / "out" / "web",
            work=Path(folder) / "work",
            tasks=given.tasks,
        )
        measure(recipe)


if __name__ == "__main__":
    sys.exit(main())
