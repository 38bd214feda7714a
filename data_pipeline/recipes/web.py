"""Web pages or other text to token shards: read, filter by language and quality, deduplicate, encode, join.

A program: `python -m sambalm.data_pipeline.recipes.web --help`. Its stages are pipelines of datatrove, which run one
after another on this machine, on Slurm or on Ray. What is read goes through `KeepLanguage` or datatrove's fastText
filter, Gopher's rules for repetition and quality (arXiv 2112.11446), MinHash over 5-grams of words in 14 buckets of 8
hashes, and `EncodeShards`. Copy it, and change its stages, where yours differ.
"""

import json
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, BooleanOptionalAction
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import DataError, first_line
from ..files import atomic_write
from ..output import shard_files_of_any_part
from ..shards import manifest_path

if TYPE_CHECKING:
    from datatrove.executor.base import PipelineExecutor
    from datatrove.pipeline.base import PipelineStep

    from ..datatrove import ShardOutput

_EXTRACT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class WebRecipe:
    """What decides the shards. `tasks` is how many shares the input files are dealt to, in turn."""

    input: str
    format: Literal["jsonl", "parquet", "warc"]
    glob: str | None
    text_key: str
    language: str | None
    language_model: Literal["py3langid", "fasttext"]
    language_threshold: float
    quality: bool
    deduplicate: bool
    tokenizer: Path
    eos: bool
    eos_token: str | None
    special_tokens: bool
    shard_tokens: int
    output: Path
    work: Path
    tasks: int


@dataclass(frozen=True, kw_only=True)
class Machines:
    """Where the tasks run; the shards do not depend on it. The last three are Slurm's and Ray's."""

    executor: Literal["local", "slurm", "ray"]
    workers: int
    partition: str | None
    time: str
    memory_gb: int


@dataclass(frozen=True)
class Stage:
    """One pipeline: its steps run in each of its tasks."""

    name: str
    tasks: int
    steps: "list[PipelineStep]"


def stages(recipe: WebRecipe) -> list[Stage]:
    """The pipelines in the order in which they run. Raises ImportError for a package that one of them lacks."""
    from ..datatrove import EncodeShards, JoinShards

    output = _output(recipe)
    read = [_reader(recipe), *_filters(recipe)]
    join = Stage("join", 1, [JoinShards(output, ranks=recipe.tasks)])
    if not recipe.deduplicate:
        return [Stage("encode", recipe.tasks, [*read, EncodeShards(output)]), join]
    return [*_deduplicated(recipe, read, output), join]


def _output(recipe: WebRecipe) -> "ShardOutput":
    from ..datatrove import ShardOutput

    return ShardOutput(
        recipe.output,
        recipe.tokenizer,
        shard_tokens=recipe.shard_tokens,
        append_eos=recipe.eos,
        eos_token=recipe.eos_token,
        special_tokens=recipe.special_tokens,
    )


def _deduplicated(recipe: WebRecipe, read: "list[PipelineStep]", output: "ShardOutput") -> list[Stage]:
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.hashing import HashConfig

    from ..datatrove import EncodeShards

    # Hashes of 32 bits meet by chance among billions of documents.
    config = MinhashConfig(hash_config=HashConfig(precision=64))
    kept, signatures, pairs, removals = (
        str(recipe.work / name) for name in ("kept", "signatures", "pairs", "removals")
    )
    write = JsonlWriter(kept, "${rank}.jsonl.zst", compression="zstd")
    again = JsonlReader(kept, glob_pattern="*.jsonl.zst", compression="zstd")
    words = recipe.language or "en"
    return [
        Stage("filter", recipe.tasks, [*read, write]),
        Stage("signatures", recipe.tasks, [again, MinhashDedupSignature(signatures, config, language=words)]),
        Stage("pairs", config.num_buckets, [MinhashDedupBuckets(signatures, pairs, config=config)]),
        Stage("clusters", 1, [MinhashDedupCluster(pairs, removals, config=config)]),
        Stage("encode", recipe.tasks, [again, MinhashDedupFilter(removals), EncodeShards(output)]),
    ]


def _reader(recipe: WebRecipe) -> "PipelineStep":
    from datatrove.pipeline.readers import JsonlReader, ParquetReader, WarcReader

    options: dict[str, Any] = {"paths_file": str(_input_list(recipe))}
    if recipe.format == "warc":
        return WarcReader(recipe.input, **options)
    options["text_key"] = recipe.text_key
    return (JsonlReader if recipe.format == "jsonl" else ParquetReader)(recipe.input, **options)


def _filters(recipe: WebRecipe) -> "list[PipelineStep]":
    from datatrove.pipeline.extractors import Trafilatura
    from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter, LanguageFilter

    from ..datatrove import KeepLanguage

    steps: list[PipelineStep] = []
    if recipe.format == "warc":
        # Its own deduplication would make a page's text depend on the pages before it.
        steps.append(Trafilatura(timeout=_EXTRACT_S, deduplicate=False))
    if recipe.language and recipe.language_model == "fasttext":
        steps.append(LanguageFilter(recipe.language, language_threshold=recipe.language_threshold))
    elif recipe.language:
        steps.append(KeepLanguage(recipe.language, threshold=recipe.language_threshold))
    if recipe.quality:
        words = recipe.language or "en"
        stop_words = 2 if words == "en" else None  # the rule's list of them is English
        steps.append(GopherRepetitionFilter(language=words))
        steps.append(GopherQualityFilter(language=words, min_stop_words=stop_words))
    return steps


def _input_list(recipe: WebRecipe) -> Path:
    return recipe.work / "inputs.txt"


def prepare(recipe: WebRecipe) -> None:
    """Note the recipe and its input files in the work folder, so that a later call shares them out alike.

    Raises DataError where the folder belongs to another recipe, where there is no input or a tokenizer that cannot be
    used, and where the output exists: what a stage would find out hours later.
    """
    from datatrove.io import get_datafolder
    from datatrove.utils.word_tokenizers import load_tokenizer_assignments

    if recipe.tasks < 1 or recipe.shard_tokens < 1:
        raise DataError(f"tasks={recipe.tasks} and shard_tokens={recipe.shard_tokens} must be at least 1")
    if recipe.language and recipe.language not in load_tokenizer_assignments():
        raise DataError(
            f"the language {recipe.language!r} is none that datatrove can split into words; give 'en' or alike"
        )
    noted = recipe.work / "recipe.json"
    values = json.loads(json.dumps(asdict(recipe), default=str))
    if noted.exists():
        before = json.loads(noted.read_text("utf-8"))
        if other := [name for name in values if values[name] != before.get(name)]:
            raise DataError(
                f"{recipe.work} belongs to a recipe with other values of {', '.join(other)}; give those, or another "
                "--work and --output"
            )
        return
    _output(recipe).encoder().load_tokenizer()
    for path in (manifest_path(recipe.output), *shard_files_of_any_part(recipe.output)):
        if path.exists():
            raise DataError(f"{path} exists already; choose another output prefix, or remove it")
    try:
        files = get_datafolder(recipe.input).list_files(glob_pattern=recipe.glob)
    except FileNotFoundError:
        files = []
    if not files:
        pattern = f" for --glob {recipe.glob!r}" if recipe.glob else ""
        raise DataError(f"the input {recipe.input} holds no file{pattern}; give a folder with files")
    with atomic_write(_input_list(recipe)) as file:
        file.write("".join(f"{name}\n" for name in files).encode())
    with atomic_write(noted) as file:
        file.write(json.dumps(values, indent=2).encode() + b"\n")


def run(recipe: WebRecipe, machines: Machines) -> None:
    """Run all stages, or on Slurm submit them. The same call goes on with the tasks that have not ended.

    Raises DataError as `prepare` does and where tasks of a stage did not end, and ImportError for a missing package.
    """
    if machines.workers < 1:
        raise DataError(f"workers={machines.workers} must be at least 1")
    prepare(recipe)
    if machines.executor == "slurm" and not machines.partition:
        raise DataError("Slurm needs a partition; name it with --partition")
    if machines.executor == "ray":
        import ray

        ray.init()
    last: PipelineExecutor | None = None
    for stage in stages(recipe):
        executor = _executor(stage, recipe, machines, after=last)
        if machines.executor != "slurm":
            _run(executor, stage, recipe)
            if left := executor.get_incomplete_ranks():
                raise DataError(
                    f"{len(left)} of {stage.tasks} tasks of the stage {stage.name!r} did not end; see "
                    f"{recipe.work / 'logs' / stage.name}, and the same command goes on"
                )
        last = executor
    if machines.executor == "slurm" and last:
        last.run()  # submits those before it as well


def _run(executor: "PipelineExecutor", stage: Stage, recipe: WebRecipe) -> None:
    try:
        executor.run()
    except (DataError, ImportError):
        raise
    except Exception as error:  # whatever a step of datatrove raises, which its log has in full
        raise DataError(
            f"a task of the stage {stage.name!r} failed: {first_line(error)}; see {recipe.work / 'logs' / stage.name}, "
            "and the same command goes on"
        ) from error


def _executor(
    stage: Stage, recipe: WebRecipe, machines: Machines, *, after: "PipelineExecutor | None"
) -> "PipelineExecutor":
    logs, workers = str(recipe.work / "logs" / stage.name), machines.workers
    if machines.executor == "local":
        from datatrove.executor import LocalPipelineExecutor

        return LocalPipelineExecutor(
            stage.steps, tasks=stage.tasks, workers=min(workers, stage.tasks), logging_dir=logs
        )
    if machines.executor == "ray":
        from datatrove.executor import RayPipelineExecutor

        return RayPipelineExecutor(
            stage.steps, tasks=stage.tasks, workers=workers, logging_dir=logs, mem_per_cpu_gb=machines.memory_gb
        )
    from datatrove.executor import SlurmPipelineExecutor

    return SlurmPipelineExecutor(
        stage.steps,
        tasks=stage.tasks,
        time=machines.time,
        partition=machines.partition,
        mem_per_cpu_gb=machines.memory_gb,
        workers=workers,
        job_name=f"{recipe.output.name}-{stage.name}",
        qos=None,
        venv_path=f"{sys.prefix}/bin/activate",
        logging_dir=logs,
        depends=after,
    )


def _absolute(place: str) -> str:
    """As a task finds it, which another machine may start in another folder."""
    return place if "://" in place else str(Path(place).absolute())


def _absolute_path(place: str) -> Path:
    return Path(place).absolute()


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m sambalm.data_pipeline.recipes.web",
        description="Text to token shards by datatrove. The same command goes on after whatever has ended it.",
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--input", required=True, type=_absolute, help="folder with the input files, or its URL")
    add("--format", required=True, choices=("jsonl", "parquet", "warc"), help="what the files are")
    add("--glob", help="which files of the folder, as in '*/wet/*.gz'; all without it")
    add("--text-key", default="text", help="key or column of the text")
    add("--language", help="keep this language, two letters of ISO 639-1; all without it")
    add("--language-model", choices=("py3langid", "fasttext"), default="py3langid", help="fasttext downloads its model")
    add("--language-threshold", type=float, default=0.65, help="least probability of the language")
    add("--quality", action=BooleanOptionalAction, default=True, help="Gopher's rules for repetition and quality")
    add("--deduplicate", action=BooleanOptionalAction, default=True, help="MinHash over all input")
    add("--tokenizer", type=_absolute_path, required=True, help="as in `sambalm data preprocess`")
    add("--eos", action=BooleanOptionalAction, default=True, help="the end-of-text token after each document")
    add("--eos-token", help="the end-of-text token, where the tokenizer does not name it")
    add("--special-tokens", action="store_true", help="special tokens written out in the text become their ids")
    add("--shard-tokens", type=int, default=2**30, help="a shard takes at most so many tokens, or one longer document")
    add("--output", type=_absolute_path, required=True, help="prefix of the shards")
    add(
        "--work",
        type=_absolute_path,
        required=True,
        help="folder for logs and what lies between the stages, seen by all machines",
    )
    add("--tasks", type=int, default=1, help="how many shares the input files are dealt to; the shards depend on it")
    add("--executor", choices=("local", "slurm", "ray"), default="local", help="where tasks run")
    add("--workers", type=int, default=1, help="how many tasks run at the same time")
    add("--partition", help="Slurm's")
    add("--time", default="24:00:00", help="Slurm's limit of a task")
    add("--memory-gb", type=int, default=4, help="of a task, for Slurm and Ray")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code: 2 for what the user can put right."""
    values = vars(_parser().parse_args(arguments))
    machines = Machines(**{field.name: values.pop(field.name) for field in fields(Machines)})
    try:
        run(WebRecipe(**values), machines)
    except ImportError as error:
        print(f"{first_line(error)}; install what the recipe needs: pip install -e '.[data]'", file=sys.stderr)
        return 2
    except DataError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
