"""What the runs of an experiment's folder left: losses, speed, scores."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from sambalm.model.config import ModelConfig
from sambalm.model.parameters import count_parameters
from sambalm.pretrain.reporting.metrics_file import LOSS_AT, NAMED_LOSS_AT, read_steps

from .layout import MEASURED, READING, jobs_on_device, results_of
from .reading import read_lines


@dataclass(frozen=True)
class Run:
    """A run folder, read when it is asked."""

    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """The whole configuration, as the run wrote it; empty where it has not begun."""
        path = self.folder / "config.yaml"
        return yaml.safe_load(path.read_text()) if path.is_file() else {}

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """The records of its steps, in order."""
        return read_steps(self.folder)

    @property
    def is_complete(self) -> bool:
        return bool(self.steps) and self.steps[-1]["step"] >= self.config["train"]["steps"]

    @property
    def parameters(self) -> int:
        return count_parameters(ModelConfig(**self.config["model"]))["total"]

    @property
    def held_out(self) -> list[tuple[int, float]]:
        """Training tokens and the held-out loss, nats a token, at each validation."""
        found = []
        for record in self.steps:
            losses = [value for name, value in record.items() if name.startswith((NAMED_LOSS_AT, LOSS_AT))]
            found += [(record["tokens"], losses[0])] if losses else []
        return found

    @property
    def tokens_per_second(self) -> float | None:
        """The median of the last half of the steps, which no compilation slows; None where the device was shared."""
        if jobs_on_device(self.folder) > 1:
            return None
        return statistics.median(record["tokens_per_second"] for record in self.steps[len(self.steps) // 2 :])

    def scores(self, label: str, name: str, *, kind: str | None = None) -> dict[int, float]:
        """Returns a score by length, of what was measured under a label; empty where that is not finished.

        Args:
            kind: of the items, None where there is but one.
        """
        path = results_of(self.folder, label)
        scores = json.loads(path.read_text())["scores"] if path else []
        return {s["length"]: s["value"] for s in scores if s["score"] == name and s.get("kind") == kind}

    def cells(self, label: str) -> dict[tuple[float, int], float]:
        """Returns the accuracy of a passkey grid by depth and length."""
        path = results_of(self.folder, label)
        cells = json.loads(path.read_text())["details"]["cells"] if path else []
        return {(cell["depth"], cell["length"]): cell["accuracy"] for cell in cells}

    @property
    def reading(self) -> list[dict[str, Any]]:
        """Memory and speed by length, the shortest first."""
        return sorted(read_lines(self.folder / MEASURED / READING), key=lambda record: record["length"])

    @property
    def reading_was_shared(self) -> bool:
        """Whether other jobs ran on the device while `reading` was timed."""
        return jobs_on_device(self.folder / MEASURED) > 1


def best_rate(runs: Mapping[float, Path]) -> float | None:
    """Returns the learning rate whose run ends with the lowest held-out loss; None where none has one."""
    losses = {rate: run.held_out[-1][1] for rate, folder in runs.items() if (run := Run(folder)).held_out}
    return min(losses, key=lambda rate: losses[rate]) if losses else None


def turns(folder: Path, prefix: str) -> list[Run]:
    """Returns the runs of one model whose turn begins with a prefix and that have logged steps, by name."""
    return [run for path in sorted(folder.glob(f"{prefix}*")) if (run := Run(path)).steps]


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean, and half of the distance between the lowest and the highest."""
    return statistics.fmean(values), (max(values) - min(values)) / 2
