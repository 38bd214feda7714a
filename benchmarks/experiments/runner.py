"""Starts jobs, one on each place of a GPU at a time and others beside them, and stops them all before a deadline."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from .jobs import Job
from .layout import ERROR, Layout, last_line, note_jobs_on_device
from .models import ExperimentError

POLL_S = 0.2
SAVE_S, START_S = 25.0, 30.0
CORES_OF_A_JOB = 2  # of those that make documents
GPU_VARIABLE = "CUDA_VISIBLE_DEVICES"
NO_GPU = ""


class Ending(Enum):
    """What is true of the jobs at the end of a call."""

    DONE = "all are done"
    FAILED = "one has failed"
    LEFT = "time was up"


@dataclass(frozen=True)
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    place: str | None
    began_s: float


@dataclass
class _Runner:
    layout: Layout
    places: list[str | None]
    beside: int  # how many jobs that need no GPU may be started beside the others
    running: dict[str, "_Running"] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)

    def next_start(self, jobs: Sequence[Job]) -> tuple[Job, str | None] | None:
        """Returns the first job that may be started and the place that it takes, or None."""
        begun = self.done | self.failed.keys() | self.running.keys()
        for job in jobs:
            if job.name in begun or not self.done.issuperset(job.needs):
                continue
            if not job.on_device and self.beside:
                self.beside -= 1
                return job, NO_GPU
            if self.places and (job.on_device or self.places[0] is None):
                return job, self.places.pop(0)
        return None

    def leave(self, place: str | None) -> None:
        if place == NO_GPU:
            self.beside += 1
        else:
            self.places.append(place)

    def start(self, job: Job, place: str | None) -> None:
        log = self.layout.log(job.name)
        log.parent.mkdir(parents=True, exist_ok=True)
        try:
            job.prepare()
        except ExperimentError as error:
            with log.open("a") as file:
                file.write(f"{ERROR}{error}\n")
            self._fail(job.name, str(error))
            self.leave(place)
            return
        environment = os.environ | ({GPU_VARIABLE: place} if place is not None else {})
        with log.open("ab") as file:
            process = subprocess.Popen(job.command, env=environment, stdout=file, stderr=file)
        self.running[job.name] = _Running(job, process, place, time.monotonic())
        self._note_sharing(place)
        print(f"started   {job.name}{f' on GPU {place}' if place else ''}", flush=True)

    def collect(self, jobs: Sequence[Job], *, stopping: bool) -> None:
        """Takes the jobs that have ended from those that run."""
        for job in jobs:
            if job.name not in self.running or (code := self.running[job.name].process.poll()) is None:
                continue
            ended = self.running.pop(job.name)
            self.leave(ended.place)
            if job.is_done():
                self.done.add(job.name)
                print(f"done      {job.name} after {time.monotonic() - ended.began_s:.0f} s", flush=True)
            elif stopping:
                print(f"stopped   {job.name}", flush=True)
            else:
                log = self.layout.log(job.name)
                self._fail(job.name, f"exit code {code}, {last_line(log) or 'no output'} ({log})")

    def signal(self, number: signal.Signals) -> None:
        for one in self.running.values():
            one.process.send_signal(number)

    def _note_sharing(self, place: str | None) -> None:
        """Notes what runs on a device together, beside all of it that is timed."""
        together = [one.job for one in self.running.values() if one.place == place]
        for job in together:
            if job.timed:
                note_jobs_on_device(job.timed, len(together))

    def _fail(self, name: str, reason: str) -> None:
        self.failed[name] = reason
        print(f"failed    {name}: {reason}", flush=True)


def run_jobs(
    jobs: Sequence[Job],
    layout: Layout,
    *,
    places: Sequence[str | None],
    minutes: float | None,
    save_s: float = SAVE_S,
    start_s: float = START_S,
) -> Ending:
    """Runs what is not done.

    A job that fails is not started again by this call, nor what needs it.

    Args:
        places: numbers of GPUs, each as often as it takes jobs at a time; None for the CPU.
        minutes: after which no job runs any more; None for no limit.
        save_s: that jobs have between the signal and the deadline.
        start_s: a job is not started for less.
    """
    end_s = time.monotonic() + 60 * minutes if minutes else float("inf")
    done = {job.name for job in jobs if job.is_done()}
    beside = 0 if None in places else max(1, len(os.sched_getaffinity(0)) // CORES_OF_A_JOB)
    runner = _Runner(layout, list(places), beside, done=done)
    print(f"{len(runner.done)} of {len(jobs)} jobs were done before", flush=True)
    try:
        while time.monotonic() < end_s - save_s:
            runner.collect(jobs, stopping=False)
            has_time = time.monotonic() < end_s - save_s - start_s
            if has_time and (found := runner.next_start(jobs)):
                runner.start(*found)
            elif not runner.running:
                break
            else:
                time.sleep(POLL_S)
    finally:
        _stop(runner, jobs, kill_s=min(end_s, time.monotonic() + save_s))
    left = [job.name for job in jobs if not job.is_done()]
    print(f"left: {', '.join(left)}" if left else "all jobs are done", flush=True)
    return Ending.FAILED if runner.failed else Ending.LEFT if left else Ending.DONE


def _stop(runner: _Runner, jobs: Sequence[Job], *, kill_s: float) -> None:
    """Lets the jobs save and leave, and kills those that are still there at some moment."""
    runner.signal(signal.SIGTERM)
    while runner.running:
        if time.monotonic() > kill_s:
            runner.signal(signal.SIGKILL)
        time.sleep(POLL_S)
        runner.collect(jobs, stopping=True)
