"""Damage to a run's folder, as a failing disk or a careless hand leaves it, and what must hold all the same."""

import contextlib
import functools
import io
import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from sambalm.pretrain.checkpointing.format import open_checkpoint, stored_step
from sambalm.pretrain.checkpointing.load import find_resume_point
from sambalm.pretrain.checkpointing.retention import Retention, examine_checkpoints
from sambalm.pretrain.config_file import parse_config
from sambalm.pretrain.lifecycle import attempts, run_folder
from sambalm.pretrain.lifecycle.lease import held_lease
from sambalm.pretrain.lifecycle.phases import Marks
from sambalm.pretrain.reporting.metrics import _drop_after
from sambalm.pretrain.reporting.metrics_file import read_metrics
from sambalm.pretrain.reporting.run_data import read_runs
from sambalm.pretrain.reporting.status import read_status, show_status
from sambalm.slurm.outcome import describe_outcome

WRONG_TYPES = b'{"step": "x", "files": 3, "token": 1, "pid": [], "exit_code": "x", "started_s": {}}'
JSON_OF_ANOTHER_TYPE = (b"[]", b"null", b"3", b'"x"', b"{}", WRONG_TYPES, b"\xff")


def flip_a_bit(path: Path, numbers: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[numbers.randrange(len(content))] ^= 1 << numbers.randrange(8)
    path.write_bytes(content)


def cut_short(path: Path, numbers: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: numbers.randrange(path.stat().st_size)])


def empty(path: Path, numbers: random.Random) -> None:
    path.write_bytes(b"")


def zero_a_page(path: Path, numbers: random.Random) -> None:
    content = bytearray(path.read_bytes())
    start = numbers.randrange(len(content))
    content[start : start + 4096] = bytes(len(content[start : start + 4096]))
    path.write_bytes(content)


def delete(path: Path, numbers: random.Random) -> None:
    path.unlink()


def make_a_folder(path: Path, numbers: random.Random) -> None:
    path.unlink()
    path.mkdir()
    (path / "x").touch()


def make_a_dead_link(path: Path, numbers: random.Random) -> None:
    path.unlink()
    path.symlink_to(path.parent / "nowhere")


def write_another_type(path: Path, numbers: random.Random) -> None:
    path.write_bytes(numbers.choice(JSON_OF_ANOTHER_TYPE))


def take_rights(path: Path, numbers: random.Random) -> None:
    path.chmod(0)


Damage = Callable[[Path, random.Random], None]
DAMAGES: Sequence[Damage] = (
    *(flip_a_bit,) * 4,
    *(cut_short, empty, zero_a_page, delete, make_a_folder, make_a_dead_link, write_another_type, take_rights),
)


def add_a_stray(run_dir: Path, numbers: random.Random) -> None:
    """What does not belong there, beside the checkpoints or the attempts or in one of them."""
    checkpoints = run_dir / "checkpoints"
    newest = max(checkpoints.glob("step_*"))
    choice = numbers.randrange(7)
    if choice == 0:
        shutil.copytree(newest, newest.with_name(f"{newest.name}.bak"))
    elif choice == 1:
        shutil.copytree(newest, newest.with_name("step_00000099"))
    elif choice == 2:
        newest.with_name("step_00000098").mkdir()
    elif choice == 3:
        newest.with_name("step_00000097").touch()
    elif choice == 4:
        shutil.copy(next(newest.glob("*.safetensors")), newest / "shard-of-another.safetensors")
    elif choice == 5:
        (run_dir / "attempts" / "stray").touch()
    else:
        checkpoints.with_name("attempts").joinpath("nothing").mkdir()


def damage(run_dir: Path, numbers: random.Random) -> list[str]:
    """Damages one file or two, or adds a stray; returns what it did."""
    if numbers.random() < 0.1:
        add_a_stray(run_dir, numbers)
        return ["stray"]
    done = []
    for _ in range(numbers.choice((1, 1, 1, 2))):
        files = sorted(path for path in run_dir.rglob("*") if path.is_file() and path.stat().st_size)
        small = [path for path in files if path.suffix != ".safetensors" and "tensorboard" not in path.parts]
        path, how = numbers.choice(numbers.choice((files, small, small))), numbers.choice(DAMAGES)
        how(path, numbers)
        done.append(f"{how.__name__} {path.relative_to(run_dir)}")
    return done


def add_a_dead_holder(run_dir: Path) -> None:
    """Leaves the lease of a process that was killed."""
    with held_lease(run_dir):
        content = (run_dir / "lease.json").read_bytes()
    (run_dir / "lease.json").write_bytes(content.replace(f'"pid": {os.getpid()}'.encode(), b'"pid": 4194305'))


class OneWorld:
    """A world of this process alone, without a process group."""

    is_main = True

    def broadcast_object(self, value):
        return value

    def of_main(self, action):
        return action()


def in_a_sentence(action: Callable[[], object]) -> object:
    """What an action returns; None where it ends in an error that has an exit code and a message of one line."""
    try:
        return action()
    except Exception as error:
        if getattr(error, "exit_code", None) is None or len(str(error).splitlines()) != 1:
            raise
        return None


def starts_or_says_why(values: dict, whole: dict[int, dict[str, bytes]]) -> int | None:
    """Starts on a run's folder as training does, without a model; returns the step it goes on from, None for a refusal.

    Args:
        whole: of each step the files of its checkpoint as they were saved.
    """
    config = parse_config(values, source="test")
    run_dir = Path(config.run.dir)
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run_folder, "held_lease", functools.partial(held_lease, stale_s=0.02))
        patched.setattr(attempts, "_git", lambda *_: "")  # which takes most of a start
        patched.setattr(attempts, "distributions", lambda: ())
        with contextlib.redirect_stderr(said):

            def start() -> int:
                with run_folder.open_run_folder(config, Marks()) as folder:
                    folder.check_lease()
                    found = find_resume_point(config, world=OneWorld(), opened=folder.checkpoint)
                    _drop_after(run_dir, found.step if found else 0)
                    if found:
                        files = {path.name: path.read_bytes() for path in found.path.iterdir()}
                        assert files == whole[found.step], "a damaged checkpoint was taken"
                    return found.step if found else 0

            step = in_a_sentence(start)
    warnings = said.getvalue().splitlines()
    assert all(line.startswith("warning: ") for line in warnings), warnings
    assert len(warnings) == len(set(warnings)), warnings
    return step


def read_all(run_dir: Path) -> None:
    """Everything else that reads a run's folder ends well, or in a sentence."""
    read_metrics(run_dir)
    in_a_sentence(lambda: show_status(read_status(run_dir)))
    in_a_sentence(lambda: read_runs([run_dir]))
    in_a_sentence(lambda: examine_checkpoints(run_dir))
    in_a_sentence(lambda: Retention(run_dir, keep=1).removable())
    for attempt in run_dir.glob("attempts/*"):
        describe_outcome(attempt)


def checkpoints_of(run_dir: Path) -> dict[int, dict[str, bytes]]:
    """Returns the files of each checkpoint of a run, by its step and their names."""
    folders = sorted((run_dir / "checkpoints").glob("step_*"))
    assert all(open_checkpoint(folder).step == stored_step(folder) for folder in folders)
    return {stored_step(folder): {path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders}
