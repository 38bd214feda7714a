"""A run of real ranks without torchrun, each a process of its own that a test can signal."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from sambalm.pretrain.checkpointing.format import checkpoint_folders
from tests.support.program import Program, start_ranks, wait_until


class Run:
    """A run in its folder, whose ranks a test starts as often as it likes."""

    def __init__(self, values: dict, folder: Path, *, ranks: int = 2) -> None:
        self.dir, self.ranks = Path(values["run"]["dir"]), ranks
        self.config, self.log = folder / "run.yaml", folder / "log"
        self.config.write_text(yaml.safe_dump(values))

    def start(self, *, before: Callable[[], None] | None = None) -> list[Program]:
        self.processes = start_ranks("train", self.config, ranks=self.ranks, log=self.log, before=before)
        return self.processes

    @contextmanager
    def started(self, *, before: Callable[[], None] | None = None) -> Iterator[list[Program]]:
        try:
            yield self.start(before=before)
        finally:
            self.end()

    def exit_codes(self) -> list[int]:
        try:
            return [process.wait() for process in self.processes]
        finally:
            self.end()

    def end(self) -> None:
        for process in self.processes:
            with process:
                pass

    def wait_for_step(self, step: int, timeout_s: float = 120) -> None:
        wait_until(lambda: len(self.steps()) >= step, timeout_s, self.text)

    def steps(self) -> list[int]:
        path = self.dir / "metrics.jsonl"
        return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []

    def text(self) -> str:
        return self.log.read_text()

    def saved_steps(self) -> list[int]:
        return [int(folder.name.removeprefix("step_")) for folder in checkpoint_folders(self.dir)]
