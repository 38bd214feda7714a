"""Where things lie: the data of all experiments, and the runs of one folder with what was measured of them."""

from dataclasses import dataclass
from pathlib import Path

TOKENIZER = "tokenizer.model"
MEASURED = "measured"
READING = "reading.jsonl"


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


def results_of(run: Path, label: str) -> Path | None:
    """Returns results.json of what was measured under a label, None where it is not finished."""
    return next(iter(sorted(run.joinpath(MEASURED, label).glob("*/results.json"))), None)
