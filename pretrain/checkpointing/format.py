"""Checkpoints on disk: safetensors files with canonical tensors, a state in JSON and a manifest of checksums.

    runs/NAME/checkpoints/step_00000200/
        shard-*.safetensors   slices of `model.NAME`, `exp_avg.NAME` and `exp_avg_sq.NAME` in fp32, as
                              torch.distributed.checkpoint's safetensors storage writes them
        state.json            step, samples seen, configuration, package versions
        manifest.json         format version; size and CRC-32 of every file above

A checkpoint is written under a temporary name and renamed once every rank has written its part: under its final name it
is complete. No file is ever executed by reading it (no pickle). Reading needs no process group and one tensor's memory.
"""

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY

from sambalm.data_pipeline.files import sync
from sambalm.pretrain.errors import CheckpointError, CheckpointsDamagedError

FORMAT_VERSION = 1
STATE, MANIFEST = "state.json", "manifest.json"
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

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical names and shapes of the model's tensors."""
        return {name.removeprefix("model."): self._shape(name) for name in self._slices if name.startswith("model.")}

    def read(self, name: str) -> Tensor:
        """A whole canonical tensor of the model, fp32. Raises KeyError for a name that is not in shapes()."""
        stored_name = f"model.{name}"
        whole = torch.empty(self._shape(stored_name), dtype=torch.float32)
        for piece in self._slices[stored_name]:
            with safe_open(piece.path, framework="pt") as file:
                region = tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.sizes, strict=True))
                whole[region] = file.get_tensor(stored_name)
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
            with safe_open(path, framework="pt") as file:
                placement = json.loads(file.metadata()[CUSTOM_METADATA_KEY])
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    offsets = tuple(placement[name][SAVED_OFFSETS_KEY])
                    sizes = tuple(file.get_slice(name).get_shape())
                    slices.setdefault(name, []).append(StoredSlice(path, offsets, sizes))
        return slices


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a checkpoint folder after checking every file of it against the manifest.

    Raises:
        CheckpointError: not a checkpoint, of another format version, or a file is missing or damaged.
    """
    manifest = _read_json(path / MANIFEST)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has checkpoint format version {manifest.get('format_version')} and this program reads "
            f"{FORMAT_VERSION}: use the release that wrote it"
        )
    for name, expected in manifest["files"].items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name} is missing: this checkpoint is damaged, use another one")
        if _checksum(path / name) != expected:
            raise CheckpointError(
                f"{path / name} has changed since it was saved: this checkpoint is damaged, use another"
            )
    return Checkpoint(path, _read_json(path / STATE))


def newest_checkpoint(path: Path, *, warn: Callable[[str], None]) -> Checkpoint:
    """Opens a checkpoint folder, or the newest good checkpoint of a run folder.

    Args:
        warn: called with one sentence for each newer checkpoint that is damaged.

    Raises:
        CheckpointError: there is no checkpoint.
        CheckpointsDamagedError: there is none that is good.
    """
    if (path / MANIFEST).is_file():
        return open_checkpoint(path)
    folders = checkpoint_folders(path)
    if not folders:
        raise CheckpointError(
            f"{path} is neither a checkpoint nor a run with one: it holds no {MANIFEST} and no checkpoints/step_*"
        )
    for folder in reversed(folders):
        try:
            return open_checkpoint(folder)
        except CheckpointError as error:
            warn(str(error))
    raise CheckpointsDamagedError(f"every checkpoint in {path / 'checkpoints'} is damaged: restore one from a copy")


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """The committed checkpoints of a run, oldest first."""
    return sorted((run_dir / "checkpoints").glob("step_*"))


def newest_step(run_dir: Path) -> int:
    """The newest step of a run's committed checkpoints, unopened; 0 without one."""
    return max((int(folder.name.removeprefix("step_")) for folder in checkpoint_folders(run_dir)), default=0)


def remove_leftovers(run_dir: Path) -> None:
    """Removes what killed attempts left half-written or half-removed."""
    for leftover in (run_dir / "checkpoints").glob(".step_*"):
        shutil.rmtree(leftover)


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


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
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    sync(final.parent)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: {path.parent} is not a complete checkpoint") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def _checksum(path: Path) -> dict[str, int]:
    crc = 0
    for block in _blocks(path):
        crc = zlib.crc32(block, crc)
    return {"bytes": path.stat().st_size, "crc32": crc}


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_CHUNK_BYTES):
            yield block
