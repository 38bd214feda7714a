"""Relative paths of a config that do not exist from the working directory, found from the config's own folder."""

from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from sambalm.pretrain.config_yaml import Key

# What a run reads. Of what it writes, data.cache_dir is never moved, and run.dir by `with_found_run` alone.
PREFIX_KEYS: tuple[Key, ...] = (("data", "train"), ("data", "validation"))
PHASES: Key = ("data", "phases")  # each with a prefix or several under `train`
FILE_KEYS: tuple[Key, ...] = (("data", "tokenizer"), ("train", "init_from"))
RUN_DIR: Key = ("run", "dir")


def folders_of_paths(folder: Path, values: dict[str, Any]) -> list[Path]:
    """Where to look for the paths of a config in a folder.

    The config of a run's folder was read where the run was started, which lies above the folder by run.dir.
    """
    run = values.get("run")
    run_dir = run.get("dir") if isinstance(run, dict) else None
    started = started_in(folder, run_dir) if isinstance(run_dir, str) else None
    return [folder, started] if started else [folder]


def started_in(run_folder: Path, run_dir: str) -> Path | None:
    """The working directory from which a relative run.dir names a run's folder; None where none is."""
    parts, folder = Path(run_dir).parts, run_folder.absolute()
    if not parts or Path(run_dir).is_absolute() or folder.parts[-len(parts) :] != parts:
        return None
    return folder.parents[len(parts) - 1]


def with_found_paths(
    values: dict[str, Any],
    *,
    folders: Iterable[Path],
    tell: Callable[[str], None],
    keys: Collection[Key] | None = None,
) -> dict[str, Any]:
    """Returns values whose relative paths exist, where one of the folders has what the working directory lacks.

    Args:
        values: plain ones, which stay as they are.
        folders: in the order in which they are tried.
        tell: takes a sentence for each path that was found so.
        keys: of PREFIX_KEYS and FILE_KEYS those to look at; None: all.
    """
    folders = list(folders)
    for key in (*PREFIX_KEYS, *FILE_KEYS):
        section, name = key
        given = values.get(section)
        if (keys is not None and key not in keys) or not isinstance(given, dict) or name not in given:
            continue

        def find(text: str, key: Key = key) -> str:
            found = _find(text, folders, is_prefix=key in PREFIX_KEYS)
            if found != text:
                tell(f"{'.'.join(key)}: {text} does not exist from here, and {found} is taken")
            return found

        values = values | {section: given | {name: _in_entries(given[name], find)}}
    return _in_phases(values, folders, tell) if keys is None or PHASES in keys else values


def with_found_run(
    values: dict[str, Any], *, folders: Iterable[Path], tell: Callable[[str], None], tells_of_new: bool
) -> dict[str, Any]:
    """Returns values whose relative run.dir exists, where one of the folders has what the working directory lacks.

    So a run that is started again from another folder goes on instead of beginning anew there.

    Args:
        tells_of_new: tell also where a run goes that is in none of them.
    """
    run = values.get("run")
    run_dir = run.get("dir") if isinstance(run, dict) else None
    if not isinstance(run, dict) or not isinstance(run_dir, str) or Path(run_dir).is_dir():
        return values
    found = _find(run_dir, list(folders), is_prefix=False)
    if found != run_dir:
        tell(f"run.dir: {run_dir} does not exist from here, and {found} is taken")
    elif tells_of_new and not Path(run_dir).is_absolute():
        tell(f"run.dir: {run_dir} is new, and made here as {Path.cwd() / run_dir}")
    return values | {"run": run | {"dir": found}}


def _in_phases(values: dict[str, Any], folders: list[Path], tell: Callable[[str], None]) -> dict[str, Any]:
    """The same for the sources of phases."""
    data = values.get("data")
    phases = data.get("phases") if isinstance(data, dict) else None
    if not isinstance(data, dict) or not isinstance(phases, list):
        return values

    def find(text: str) -> str:
        if (found := _find(text, folders, is_prefix=True)) != text:
            tell(f"data.phases: {text} does not exist from here, and {found} is taken")
        return found

    moved = [
        phase | {"train": _in_entries(phase["train"], find)} if isinstance(phase, dict) and "train" in phase else phase
        for phase in phases
    ]
    return values | {"data": data | {"phases": moved}}


def _in_entries(value: Any, find: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return find(value)
    if isinstance(value, list):
        return [_in_entries(one, find) if isinstance(one, str | dict) else one for one in value]
    if isinstance(value, dict) and isinstance(value.get("prefix"), str):
        return value | {"prefix": find(value["prefix"])}
    return value


def _find(text: str, folders: list[Path], *, is_prefix: bool) -> str:
    if not text or Path(text).is_absolute() or "://" in text or _exists(Path(text), is_prefix=is_prefix):
        return text
    found = (folder / text for folder in folders if _exists(folder / text, is_prefix=is_prefix))
    return str(next(found, text))


def _exists(path: Path, *, is_prefix: bool) -> bool:
    try:
        if is_prefix:  # a manifest, or one bare shard
            return any(path.with_name(path.name + ending).exists() for ending in (".json", ".idx"))
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False
