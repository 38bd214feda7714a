"""Commands that train, tune and measure, each with what it waits for and how one sees that it is done."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sambalm.data_pipeline.shards import manifest_path
from sambalm.pretrain.errors import ExitCode
from sambalm.pretrain.lifecycle.attempts import read_attempts

from .layout import MEASURED, READING, results_of

PROGRAM = (sys.executable, "-m", "sambalm.pretrain.cli")


@dataclass(frozen=True)
class Job:
    """A command that goes on where it was stopped.

    Args:
        name: one of its own among the jobs of an experiment.
        is_done: whether what it leaves behind is complete.
        needs: names of jobs that are done first.
        prepare: is called before a start, and may raise ExperimentError.
        timed: folder of what the job times, if it does; speeds do not count where other jobs share the device.
        on_device: whether it computes on a GPU where there is one.
    """

    name: str
    command: Sequence[str]
    is_done: Callable[[], bool]
    needs: Sequence[str] = ()
    prepare: Callable[[], None] = lambda: None
    timed: Path | None = None
    on_device: bool = True


def training(name: str, config: Path, run: Path, *, needs: Sequence[str], prepare: Callable[[], None]) -> Job:
    """Trains a config that `prepare` writes."""
    return Job(name, [*PROGRAM, "train", str(config)], lambda: is_trained(run), needs, prepare, timed=run)


def is_trained(run: Path) -> bool:
    """Whether an attempt has reached the last step and saved it."""
    return any(attempt.exit_code == ExitCode.FINISHED for attempt in read_attempts(run))


def evaluation(
    name: str,
    run: Path,
    label: str,
    *,
    task: str,
    keys: Sequence[str],
    data: Sequence[Path],
    precision: str,
    batch_tokens: int,
    needs: Sequence[str],
    prepare: Callable[[], None],
) -> Job:
    """Measures a run by one task of `sambalm evaluate`.

    Args:
        label: under which the result lies in the run's folder.
        keys: of the task, as in "lengths=[4K,8K]".
    """
    words = [*PROGRAM, "evaluate", str(run), "--task", task, "--dtype", precision, "--batch-tokens", str(batch_tokens)]
    words += ["--output", str(run / MEASURED / label)]
    words += [word for prefix in data for word in ("--data", str(prefix))]
    words += [f"{task}.{key}" for key in keys]
    return Job(name, words, lambda: results_of(run, label) is not None, needs, prepare)


def passkey_documents(name: str, prefix: Path, *, tokenizer: Path, documents: int, tokens: int) -> Job:
    """Makes passkeys to tune on."""
    words = [*PROGRAM, "data", "passkey", "--tokenizer", str(tokenizer), "--output", str(prefix)]
    words += ["--documents", str(documents), "--tokens", str(tokens), "--overwrite"]
    return Job(name, words, lambda: manifest_path(prefix).is_file(), on_device=False)


def task_documents(
    name: str, prefix: Path, *, tasks: Sequence[str], tokenizer: Path, documents: int, tokens: int
) -> Job:
    """Makes texts of tasks on long texts to tune on."""
    words = [sys.executable, "-m", f"{__package__}.documents", "--tokenizer", str(tokenizer), "--output", str(prefix)]
    words += ["--documents", str(documents), "--tokens", str(tokens)]
    words += [word for task in tasks for word in ("--task", task)]
    return Job(name, words, lambda: manifest_path(prefix).is_file(), on_device=False)


def reading(name: str, run: Path, *, lengths: Sequence[int], precision: str, needs: Sequence[str]) -> Job:
    """Measures memory and speed of reading texts of several lengths."""
    output = run / MEASURED / READING
    words = [sys.executable, "-m", f"{__package__}.reading", str(run), "--output", str(output), "--dtype", precision]
    words += ["--lengths", *map(str, lengths)]
    return Job(name, words, partial(_has_lines, output, len(lengths)), needs, timed=output.parent)


def _has_lines(path: Path, count: int) -> bool:
    return path.is_file() and path.read_text().count("\n") >= count
