"""A run of two ranks under seeded chaos, beside the same run without, which must come to the same bits.

    python -m tests.support.soak --minutes 30 --seed 1

Both have the same data, in which some micro-batches' gradients are NaN. The one is killed, stopped, signalled, hung and
damaged, its disk is full for a while, and bits of its weights flip; after each end it is started again by the same
command. When the time is over it leaves as it is asked to, and then every step's loss, gradient norm and learning rate
must equal the clean run's, the newest checkpoint that both have must hold the same bytes, and the ledger must sum to
the run's wall time within 1%. A full disk takes root, which mounts a small one; without, it is left out.
"""

import argparse
import collections
import contextlib
import functools
import json
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sambalm.pretrain.checkpointing.format import checkpoint_folder, checkpoint_folders
from sambalm.pretrain.checkpointing.retention import examine_checkpoints
from sambalm.pretrain.errors import ExitCode
from sambalm.pretrain.reporting.goodput import read_goodput
from sambalm.pretrain.reporting.metrics_file import METRICS, read_metrics
from tests.conftest import make_tokens, small_run
from tests.support import damage
from tests.support.program import Program, wait_until
from tests.support.runs import Run
from tests.support.soak_faults import flip_a_bit_later, hang_later, poison_micro_batches
from tests.support.whole_runs import changed, without_measured

DISK = "size=512m"
END_S = 120.0  # in which the ranks of an attempt that a fault hits are all gone, the watchdog's limits included
SAVE_STEPS = 20
QUIET_S = (0.5, 8.0)  # between the first step of an attempt and its fault
HANGS = ("fetch", "save", "writing")


def soak_values(tokens: Path, folder: Path) -> dict:
    """A run without an end, of short steps and many saves, whose watchdog waits for seconds."""
    return changed(
        small_run(tokens, folder),
        run={"max_attempts_without_progress": 8},
        train={"steps": 1_000_000, "max_rollbacks": 100_000},
        optimizer={"warmup_fraction": 1e-4},
        validation={"every_steps": 50},
        checkpoint={"every_steps": SAVE_STEPS, "keep": 3},
        checks={"replicas_every_steps": 1, "on_difference": "restore"},
        watchdog={"fetch_s": 10, "step_s": 10, "save_s": 10, "validation_s": 30, "leave_s": 30}
        | {"start_up_s": 60, "first_step_s": 30},
        parallel={"zero_stage": 1},
        stragglers={"every_steps": 0},
    )


class Chaos:
    """Starts a run again and again, and does something to each of its attempts.

    Attributes:
        counts: of what was done, by name.
        codes: exit codes of ranks, and how often each came.
    """

    def __init__(self, run: Run, *, seed: int, disk: Path | None) -> None:
        self.run, self.numbers, self.disk = run, random.Random(seed), disk
        self.counts: collections.Counter[str] = collections.Counter()
        self.codes: collections.Counter[int] = collections.Counter()
        self.slowest_end_s = 0.0
        self.faults: dict[str, Callable[[list[Program]], None]] = {
            "kill of a rank": lambda ranks: self.numbers.choice(ranks).kill(),
            "kill of all ranks": lambda ranks: [rank.kill() for rank in ranks],
            "TERM to a rank": lambda ranks: self.numbers.choice(ranks).send_signal(signal.SIGTERM),
            "INT to a rank": lambda ranks: self.numbers.choice(ranks).send_signal(signal.SIGINT),
            "USR1 to a rank": lambda ranks: self.numbers.choice(ranks).send_signal(signal.SIGUSR1),
            "STOP of a rank": self.stop,
            "STOP of a rank for a moment": self.stop_for_a_moment,
            "hang": lambda ranks: None,  # in the ranks themselves, as in the next
            "flipped bit": lambda ranks: None,
        }
        if disk:
            self.faults["full disk"] = self.fill_the_disk

    def attempt(self, end_s: float) -> None:
        """One attempt, with a fault or two, to the end of all its ranks or the soak's."""
        inner = self.numbers.choices(("none", "hang", "flipped bit"), weights=(6, 2, 1))[0]
        before, after_s = poison_micro_batches, self.numbers.uniform(2, 8)
        if inner == "hang":
            where, rank = self.numbers.choice(HANGS), self.numbers.randrange(2)
            before = functools.partial(hang_later, where=where, rank=rank, after_s=after_s)
            self.counts[f"hang in {where}"] += 1
        elif inner == "flipped bit":
            before = functools.partial(flip_a_bit_later, after_s=after_s)
            self.counts[inner] += 1
        ranks = self.run.start(before=before)
        try:
            self.wait_for_a_step(ranks)
            while not _any_ended(ranks) and time.monotonic() < end_s:
                self.pause(ranks, self.numbers.uniform(*QUIET_S))
                if inner == "hang":
                    break
                if not _any_ended(ranks):
                    self.inflict(ranks)
            if inner != "hang" and not _any_ended(ranks):
                ranks[0].send_signal(signal.SIGTERM)
            self.wait_for_the_end(ranks)
            self.codes.update(rank.wait() for rank in ranks)
        finally:
            self.run.end()

    def leave(self) -> None:
        """A last attempt, to which nothing happens; it saves a step that the clean run has saved too."""
        with self.run.started(before=poison_micro_batches) as ranks:
            start_s = time.time()
            wait_until(lambda: _any_ended(ranks) or self.has_saved_in_turn(start_s), END_S, self.run.text)
            ranks[1].send_signal(signal.SIGTERM)
            assert self.run.exit_codes() == [ExitCode.REQUEUE] * 2, self.run.text()[-4000:]

    def has_saved_in_turn(self, since_s: float) -> bool:
        folders = (checkpoint_folder(self.run.dir, step) for step in self.run.saved_steps() if step % SAVE_STEPS == 0)
        return any(_changed_s(folder) > since_s for folder in folders)

    def inflict(self, ranks: list[Program]) -> None:
        name = self.numbers.choice([name for name in self.faults if name not in ("hang", "flipped bit")])
        self.counts[name] += 1
        self.faults[name](ranks)
        if name.startswith(("kill", "TERM", "INT", "STOP of a rank")) and name != "STOP of a rank for a moment":
            self.wait_for_the_end(ranks)

    def stop(self, ranks: list[Program]) -> None:
        """The others leave by the watchdog; the rank itself goes on afterwards, and must find out."""
        stopped = self.numbers.choice(ranks)
        stopped.send_signal(signal.SIGSTOP)
        (other,) = (rank for rank in ranks if rank is not stopped)
        other.wait(END_S)
        if self.numbers.random() < 0.5:
            stopped.kill()
        stopped.send_signal(signal.SIGCONT)

    def stop_for_a_moment(self, ranks: list[Program]) -> None:
        stopped = self.numbers.choice(ranks)
        stopped.send_signal(signal.SIGSTOP)
        time.sleep(self.numbers.uniform(0.2, 2))
        stopped.send_signal(signal.SIGCONT)

    def fill_the_disk(self, ranks: list[Program]) -> None:
        """Leaves no room at all for some seconds."""
        filler = self.disk / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 20))
        with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(512))
        self.pause(ranks, self.numbers.uniform(1, 6))
        filler.unlink()

    def damage_what_it_left(self) -> None:
        """Damages a file of the newest checkpoint, where another good one is left, or the last attempt's records."""
        run_dir = self.run.dir
        good = [report.path for report in examine_checkpoints(run_dir) if report.problem is None]
        attempts = sorted((run_dir / "attempts").iterdir(), key=lambda path: path.stat().st_mtime)
        of_attempt = [path for path in (attempts[-1] / "outcome.json", attempts[-1] / "attempt.json") if path.is_file()]
        files = sorted(good[-1].iterdir()) if len(good) > 1 and self.numbers.random() < 0.7 else of_attempt
        if files:
            path, how = self.numbers.choice(files), self.numbers.choice(damage.DAMAGES)
            if path.stat().st_size:
                how(path, self.numbers)
                self.counts["damaged checkpoint" if "checkpoints" in path.parts else "damaged record"] += 1

    def wait_for_a_step(self, ranks: list[Program]) -> None:
        """Some attempts are hit before their first step."""
        path, is_early = self.run.dir / METRICS, self.numbers.random() < 0.15
        if is_early:
            return self.pause(ranks, self.numbers.uniform(0, 3))
        started_s = time.time()
        wait_until(lambda: _any_ended(ranks) or _changed_s(path) > started_s, END_S, self.run.text)
        return None

    def pause(self, ranks: list[Program], seconds: float) -> None:
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s and not _any_ended(ranks):
            time.sleep(0.02)

    def wait_for_the_end(self, ranks: list[Program]) -> None:
        start_s = time.monotonic()
        codes = [rank.wait(END_S) for rank in ranks]
        self.slowest_end_s = max(self.slowest_end_s, time.monotonic() - start_s)
        fatal = {ExitCode.BAD_INPUT, ExitCode.CHECKPOINTS_DAMAGED, ExitCode.NO_PROGRESS, ExitCode.DIVERGED}
        assert not fatal.intersection(codes), f"{codes}\n{self.run.text()[-4000:]}"


def _changed_s(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # the run has pruned it
        return 0.0


def _any_ended(ranks: list[Program]) -> bool:
    return any(rank.poll() is not None for rank in ranks)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A file system that can be filled, below a folder; None where mounting one is not allowed."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", DISK, "tmpfs", folder], capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def soak(folder: Path, *, minutes: float, seed: int) -> str:
    """Runs both, compares them, and returns what happened, as Markdown."""
    tokens = make_tokens(folder)
    for name in ("clean", "chaos"):
        (folder / name).mkdir()
    clean = Run(changed(soak_values(tokens, folder / "clean/run"), checkpoint={"keep": 1_000_000}), folder / "clean")
    with small_disk(folder / "disk") as disk:
        chaos = Chaos(
            Run(soak_values(tokens, (disk or folder / "chaos") / "run"), folder / "chaos"), seed=seed, disk=disk
        )
        with clean.started(before=poison_micro_batches) as ranks:
            start_s, started_s = time.monotonic(), time.time()
            end_s = start_s + 60 * minutes
            while time.monotonic() < end_s:
                chaos.attempt(end_s)
                if time.monotonic() < end_s and chaos.numbers.random() < 0.3:
                    chaos.damage_what_it_left()
            chaos.leave()
            wall_s, last = time.time() - started_s, read_metrics(chaos.run.dir)[-1]["step"]
            wait_until(lambda: _newest_step(clean) >= last or _any_ended(ranks), 3600, clean.text)
            ranks[0].send_signal(signal.SIGTERM)
            assert clean.exit_codes() == [ExitCode.REQUEUE] * 2, clean.text()
        return _compared(chaos, clean, wall_s=wall_s)


def _newest_step(run: Run) -> int:
    path = run.dir / METRICS
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().split(b"\n")[:-1]
    time.sleep(0.2)
    return json.loads(lines[-1])["step"] if len(lines) > 1 else 0


def _compared(chaos: Chaos, clean: Run, *, wall_s: float) -> str:
    """Compares a run under chaos, whose driver was at it for wall_s, with a clean one."""
    found, expected = ([without_measured(record) for record in read_metrics(run.dir)] for run in (chaos.run, clean))
    assert [record["step"] for record in found] == list(range(1, len(found) + 1))
    for record, other in zip(found, expected, strict=False):
        assert str(record) == str(other), f"step {record['step']} is not the same: {record} and {other}"
    folders = [{folder.name: folder for folder in checkpoint_folders(run.dir)} for run in (chaos.run, clean)]
    name = max(folders[0].keys() & folders[1].keys())
    shards = sorted(path.name for path in (folders[0][name]).glob("*.safetensors"))
    assert shards
    for shard in shards:
        assert (folders[0][name] / shard).read_bytes() == (folders[1][name] / shard).read_bytes(), f"{name}/{shard}"
    goodput = read_goodput(chaos.run.dir, is_alive=False)
    assert abs(sum(goodput.seconds.values()) / goodput.wall_s - 1) < 0.01
    assert abs(goodput.wall_s / wall_s - 1) < 0.01, f"the ledger tells of {goodput.wall_s:.1f} of {wall_s:.1f} s"
    skipped = sum(bool(record.get("skipped")) for record in found)
    rows = {
        "wall time": f"{wall_s:.0f} s",
        "attempts that began": len(goodput.attempts),
        "steps": f"{len(found):,}, of them {skipped} with NaN, which both runs skipped",
        "steps whose records equal the clean run's": f"{len(found):,}",
        "the newest checkpoint of both": f"step {int(name.removeprefix('step_')):,}, the same bytes",
        **dict(sorted(chaos.counts.items())),
        "times that a flipped bit was found and the run went back": sum(
            event.what == "rollback" for event in goodput.events
        ),
        "exit codes of ranks": ", ".join(f"{code}: {count}" for code, count in sorted(chaos.codes.items())),
        "longest wait for a hit attempt's ranks": f"{chaos.slowest_end_s:.1f} s",
        **{f"ledger: {name}": f"{seconds:.0f} s" for name, seconds in goodput.seconds.items()},
    }
    return "\n".join(["| | |", "| --- | ---: |", *(f"| {name} | {value} |" for name, value in rows.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(soak(Path(folder), minutes=options.minutes, seed=options.seed))


if __name__ == "__main__":
    main()
