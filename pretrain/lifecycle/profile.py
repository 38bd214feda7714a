"""A trace of some steps by torch's profiler, for chrome://tracing and Perfetto."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from sambalm.parallel.groups import World
from sambalm.pretrain.errors import ExitCode, print_line, print_warning
from sambalm.pretrain.lifecycle.hooks import FinishedStep, Hook

FOLDER = "profile"


class Profiler(Hook):
    """Records the steps of train.profile_steps on the main rank, into RUN_DIR/profile/steps_FIRST_LAST.json.

    The trace begins as the first of them is launched and ends once the results of the last are known. A run that ends
    before, or that begins within them, has a trace of what it came to.
    """

    def __init__(self, steps: Sequence[int] | None, *, run_dir: Path, world: World) -> None:
        self.steps = steps if world.is_main else None
        self.bounds = steps
        self.folder = run_dir / FOLDER
        self._profile: profile | None = None
        self._first = self._last = 0
        self._done = False

    def before_step(self, number: int) -> None:
        if self.steps and self.steps[0] <= number <= self.steps[1] and not self._profile and not self._done:
            cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profile, self._first = profile(activities=[ProfilerActivity.CPU, *cuda]), number
            self._profile.start()

    def acts_on(self, step: int) -> bool:
        return self.bounds is not None and step == self.bounds[1]  # so that the trace holds no part of the next step

    def after_step(self, step: FinishedStep) -> None:
        self._last = step.number
        if self.steps and step.number >= self.steps[1]:
            self._end()

    def on_end(self, exit_code: ExitCode | None) -> None:
        with suppress(RuntimeError):  # after an error, the profiler's own would hide it
            self._end()

    def _end(self) -> None:
        if not self._profile:
            return
        found, self._profile, self._done = self._profile, None, True
        found.stop()
        path = self.folder / f"steps_{self._first}_{self._last}.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            found.export_chrome_trace(str(path))
        except OSError as error:  # a full disk is no reason to end a run
            print_warning(f"the trace {path} cannot be written: {error.strerror}")
            return
        print_line(f"{path}: a trace of steps {self._first} to {self._last}, for https://ui.perfetto.dev")
