"""Where things lie: the data of all experiments, and the runs of one folder with what was measured of them."""

import json
from dataclasses import dataclass
from pathlib import Path

from sambalm.data_pipeline.files import atomic_write

TOKENIZER = "tokenizer.model"
MEASURED = "measured"
READING = "reading.jsonl"
ERROR = "error: "  # how the last line of a job's log begins that says what is wrong
_SHARED = "shared_device.json"


@dataclass(frozen=True)
class DataFolder:
    """What `prepare` writes: a tokenizer and three prefixes of token shards."""

    folder: Path

    @property
    def tokenizer(self) -> Path:
        return self.folder / TOKENIZER

    @property
    def train(self) -> Path:
        return self.folder / "train"

    @property
    def held_out(self) -> Path:
        return self.folder / "held_out"

    @property
    def long(self) -> Path:
        """Long documents, which no model is trained on."""
        return self.folder / "long"


@dataclass(frozen=True)
class Layout:
    """The folder of a comparison.

    runs/EXPERIMENT/MODEL/TURN/          a run as `sambalm train` leaves it; TURN is seed1, or lr0.002 of the sweep
    runs/.../measured/LABEL/TASK-HASH/   a result of `sambalm evaluate`
    runs/.../shared_device.json          that other jobs ran on the device meanwhile; in measured/ of reading.jsonl
    configs/EXPERIMENT/MODEL/TURN.yaml   what the run was started from; `sambalm train` takes it as well
    logs/                                output of every job

    Args:
        label: sets runs that are tuned otherwise apart, empty for the usual ones.
    """

    folder: Path
    label: str = ""

    def tuned(self, experiment: str) -> str:
        """Returns where in `runs` the tuned runs of an experiment lie."""
        return f"{experiment}-{self.label}" if self.label else experiment

    def run(self, *names: str) -> Path:
        return self.folder.joinpath("runs", *names)

    def config(self, *names: str) -> Path:
        path = self.folder.joinpath("configs", *names)
        return path.with_name(f"{path.name}.yaml")

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name.replace('/', '-')}.log"


def note_jobs_on_device(folder: Path, jobs: int) -> None:
    """Notes beside what is timed that a device has had several jobs at a time; the largest number stays."""
    if jobs > jobs_on_device(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / _SHARED) as file:
            file.write(json.dumps({"jobs": jobs}).encode())


def jobs_on_device(folder: Path) -> int:
    """Returns how many jobs shared a device with what a folder holds, itself among them, at the most."""
    note = folder / _SHARED
    return json.loads(note.read_text())["jobs"] if note.is_file() else 1


def last_line(log: Path) -> str:
    """Returns the last line of a job's output; empty where it has printed nothing or was not started."""
    lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def results_of(run: Path, label: str) -> Path | None:
    """Returns results.json of what was measured under a label, None where it is not finished."""
    return next(iter(sorted(run.joinpath(MEASURED, label).glob("*/results.json"))), None)
