"""Checkpoints on disk: safetensors files with canonical tensors, a state in JSON and a manifest of checksums.

    runs/NAME/checkpoints/step_00000200/
        shard-*.safetensors   slices of `model.NAME`, `exp_avg.NAME` and `exp_avg_sq.NAME` in fp32, as
                              torch.distributed.checkpoint's safetensors storage writes them
        state.json            step, samples seen, configuration, package versions
        manifest.json         format version; size and CRC-32 of every file above

A checkpoint is written under a temporary name, which holds the token of the writer's lease so that no two writers share
it, and renamed once every rank has written its part: under its final name it is complete. Its step is what state.json
says, whatever the folder is called. No file is ever executed by reading it (no pickle). Reading needs no process group
and one tensor's memory.

`saved.json` beside the folder `checkpoints` says which step was last saved. It stays when the checkpoints are lost, so
that a run whose work is gone is not taken for a new one.
"""

import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY

from sambalm.data_pipeline.errors import DataError
from sambalm.data_pipeline.files import atomic_write, remove, sync
from sambalm.pretrain.errors import CheckpointError, CheckpointsDamagedError, one_sentence

FORMAT_VERSION = 1
STATE, MANIFEST, SAVED = "state.json", "manifest.json", "saved.json"
ABANDONED = "abandoned_"  # before the name of a checkpoint that a run went back from
_FOLDER_NAME = re.compile(r"step_(\d{8,})")
_STATE_TYPES: dict[str, type] = {"step": int, "samples": int, "config": dict}
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class StoredSlice:
    """Where a rectangle of a canonical tensor is stored."""

    path: Path
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint folder, opened by `open_checkpoint`."""

    path: Path
    state: Mapping[str, Any]

    @property
    def step(self) -> int:
        return self.state["step"]

    @property
    def saved_while_skipping(self) -> bool:
        """Whether the optimizer skipped the step before it was saved; a run goes back to none such."""
        return self.state.get("hooks", {}).get("guards", {}).get("in_a_row", 0) > 0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical names and shapes of the model's tensors."""
        return {name.removeprefix("model."): self._shape(name) for name in self._slices if name.startswith("model.")}

    def read(self, name: str) -> Tensor:
        """A whole canonical tensor of the model, fp32. Raises KeyError for a name that is not in shapes()."""
        stored_name = f"model.{name}"
        whole = torch.empty(self._shape(stored_name), dtype=torch.float32)
        for piece in self._slices[stored_name]:
            with open_shard(piece.path) as file:
                region = tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.sizes, strict=True))
                whole[region] = torch.from_numpy(file.get_tensor(stored_name))
        return whole

    def stored(self) -> dict[str, list[StoredSlice]]:
        """Where each tensor is stored, by its name with its kind before it."""
        return self._slices

    def _shape(self, stored_name: str) -> tuple[int, ...]:
        ends = ([o + n for o, n in zip(p.offsets, p.sizes, strict=True)] for p in self._slices[stored_name])
        return tuple(max(dim) for dim in zip(*ends, strict=True))

    @cached_property
    def _slices(self) -> dict[str, list[StoredSlice]]:
        slices: dict[str, list[StoredSlice]] = {}
        for path in sorted(self.path.glob("*.safetensors")):
            with open_shard(path) as file:
                placement = json.loads(file.metadata()[CUSTOM_METADATA_KEY])
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    offsets = tuple(placement[name][SAVED_OFFSETS_KEY])
                    sizes = tuple(file.get_slice(name).get_shape())
                    slices.setdefault(name, []).append(StoredSlice(path, offsets, sizes))
        return slices


def open_shard(path: Path) -> Any:
    """Opens a file of tensors, which come as NumPy's, one at a time.

    For torch's, safetensors maps a file so that it could be written to, and Linux refuses that where the file is larger
    than memory.
    """
    return safe_open(path, framework="np")


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a checkpoint folder after checking every file of it against the manifest.

    Raises:
        CheckpointError: not a checkpoint, of another format version, or a file is missing or damaged.
    """
    manifest = _read_json(path / MANIFEST)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has checkpoint format version {manifest.get('format_version')!r} and this program reads "
            f"{FORMAT_VERSION}: use the release that wrote it"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or STATE not in files or not all(Path(name).name == name for name in files):
        raise CheckpointError(f"{path / MANIFEST} does not list the checkpoint's files: it is damaged, use another one")
    for name, expected in files.items():
        if not os.path.isfile(path / name):  # which no missing right makes raise
            raise CheckpointError(f"{path / name} is missing: this checkpoint is damaged, use another one")
        try:
            found = _checksum(path / name)
        except OSError as error:
            raise CheckpointError(f"{path / name} cannot be read: {error.strerror}") from None
        if found != expected:
            raise CheckpointError(
                f"{path / name} has changed since it was saved: this checkpoint is damaged, use another"
            )
    if foreign := sorted({shard.name for shard in path.glob("*.safetensors")} - files.keys()):
        raise CheckpointError(f"{path / foreign[0]} is not in {MANIFEST}: move it out of the checkpoint")
    state = _read_json(path / STATE)
    if wrong := [key for key, kind in _STATE_TYPES.items() if not isinstance(state.get(key), kind)]:
        raise CheckpointError(f"{path / STATE} has no valid {wrong[0]}: this checkpoint is damaged, use another one")
    return Checkpoint(path, state)


def newest_checkpoint(path: Path, *, warn: Callable[[str], None], step: int | None = None) -> Checkpoint:
    """Opens a checkpoint folder, or the newest good checkpoint of a run folder.

    Args:
        warn: called with one sentence for each newer checkpoint that is damaged.
        step: takes the checkpoint of this step and no other.

    Raises:
        CheckpointError: there is no checkpoint, or none of the step that is good.
        CheckpointsDamagedError: there is none that is good.
    """
    if os.path.isfile(path / MANIFEST):
        checkpoint = open_checkpoint(path)
        if step not in (None, checkpoint.step):
            raise CheckpointError(f"{path} is of step {checkpoint.step} and not of step {step}")
        return checkpoint
    folders = checkpoint_folders(path)
    if not folders:
        lacks = f"it holds no {MANIFEST} and no checkpoints/step_*" if path.is_dir() else "there is no such folder"
        reason = "it is a file" if path.is_file() else lacks
        raise CheckpointError(f"{path} is neither a checkpoint nor a run with one: {reason}; give one of them")
    if step is not None:
        return checkpoint_of_step(folders, step)
    for folder in reversed(folders):
        try:
            return open_checkpoint(folder)
        except CheckpointError as error:
            warn(str(error))
    raise CheckpointsDamagedError(f"every checkpoint in {path / 'checkpoints'} is damaged: restore one from a copy")


def checkpoint_of_step(folders: Sequence[Path], step: int) -> Checkpoint:
    """Opens the checkpoint of a step among the folders of a run.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    found = [folder for folder in folders if stored_step(folder) == step]
    if not found:
        steps = ", ".join(str(stored_step(folder)) for folder in folders) or "none"
        raise CheckpointError(f"there is no checkpoint of step {step}: the steps of the run's checkpoints are {steps}")
    return open_checkpoint(found[-1])


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """The committed checkpoints of a run by their steps, oldest first. None is opened, so that some may be damaged.

    Raises:
        CheckpointError: the folder that holds them cannot be read.
    """
    parent = run_dir / "checkpoints"
    try:
        found = [path for path in parent.iterdir() if _FOLDER_NAME.fullmatch(path.name)]
    except FileNotFoundError:
        return []
    except OSError as error:
        if run_dir.is_file():
            return []
        raise CheckpointError(f"{parent} cannot be read: {error.strerror}; make it a readable folder") from None
    return sorted(found, key=lambda path: (stored_step(path), path.name))


def stored_step(folder: Path) -> int:
    """The step that a checkpoint folder says it is of, unverified; of one that says nothing, the step in its name."""
    with suppress(CheckpointError):
        step = _read_json(folder / STATE).get("step")
        if isinstance(step, int):
            return step
    return _named_step(folder)


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def partial_folder(final: Path, token: str) -> Path:
    """Where a checkpoint is written until it is complete.

    Args:
        token: of the writer's lease; whoever takes the run over has another one, and so another folder.
    """
    return final.with_name(f".{final.name}.{token}.partial")


def remove_leftovers(run_dir: Path) -> None:
    """Removes what killed attempts left half-written or half-removed."""
    for leftover in (run_dir / "checkpoints").glob(".step_*"):
        remove(leftover)


def remove_checkpoint(folder: Path) -> None:
    """Removes a checkpoint, by renaming it first: a half-removed one is never taken for a checkpoint."""
    doomed = folder.with_name(f".{folder.name}.removed")
    remove(doomed)
    os.replace(folder, doomed)
    remove(doomed)


def set_aside(folders: Sequence[Path]) -> list[Path]:
    """Renames checkpoints of a run, newest first, so that nothing reads or removes them any more.

    Returns:
        The folders under their new names, which replace what had these names before.
    """
    moved = []
    for folder in folders:
        aside = folder.with_name(ABANDONED + folder.name)
        remove(aside)
        os.replace(folder, aside)
        sync(aside.parent)
        moved.append(aside)
    return moved


def checksums(folder: Path, names: Sequence[str]) -> dict[str, dict[str, int]]:
    """Size and CRC-32 of some files of a folder."""
    return {name: _checksum(folder / name) for name in names}


def write_json(path: Path, value: Any) -> None:
    """Writes JSON durably."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    sync(path)


def write_manifest(folder: Path, files: Mapping[str, Mapping[str, int]]) -> None:
    """Writes the checksums of all of a folder's files, durably: the folder is complete after this and its rename."""
    write_json(folder / MANIFEST, {"format_version": FORMAT_VERSION, "files": dict(sorted(files.items()))})


def commit(partial: Path, final: Path) -> None:
    """Gives a complete folder its final name, in one step and durably; replaces what an earlier attempt left there."""
    former = final.with_name(f".{final.name}.removed")
    remove(former)
    with suppress(FileNotFoundError):
        os.replace(final, former)
    os.replace(partial, final)
    sync(final.parent)
    sync(final.parent.parent)
    # From here on it is saved: what fails now must not say otherwise.
    with suppress(OSError):
        remove(former)
    with suppress(OSError, DataError), atomic_write(final.parent.parent / SAVED) as file:
        file.write(json.dumps({"step": _named_step(final)}).encode() + b"\n")


def last_saved_step(run_dir: Path) -> int | None:
    """The step that the run last saved, whether the checkpoint is still there or not; None for none.

    A record that cannot be read counts as step 1: something was saved.
    """
    try:
        step = _read_json(run_dir / SAVED).get("step")
    except CheckpointError:
        step = None
    if isinstance(step, int):
        return step
    return 1 if (run_dir / SAVED).exists() else None


def _named_step(folder: Path) -> int:
    match = _FOLDER_NAME.fullmatch(folder.name)
    return int(match[1]) if match else 0


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path} does not exist: {path.parent} is not a complete checkpoint") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {one_sentence(error)}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object: it is damaged")
    return value


def _checksum(path: Path) -> dict[str, int]:
    crc = 0
    for block in _blocks(path):
        crc = zlib.crc32(block, crc)
    return {"bytes": path.stat().st_size, "crc32": crc}


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_CHUNK_BYTES):
            yield block
