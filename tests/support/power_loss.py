"""Whether what is written survives a power loss: contents reach the disk before the rename that shows them."""

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

Operation = tuple[str, ...]  # sync and a path, or rename and two


def noted_operations(monkeypatch: pytest.MonkeyPatch) -> list[Operation]:
    """Returns a list that grows by each sync and rename from now on."""
    calls: list[Operation] = []
    fsync, renames = os.fsync, {name: getattr(os, name) for name in ("replace", "rename")}

    def noted_fsync(file) -> None:
        number = file if isinstance(file, int) else file.fileno()
        calls.append(("sync", os.readlink(f"/proc/self/fd/{number}")))
        fsync(file)

    def noted(rename):
        def run(source, target) -> None:
            calls.append(("rename", os.fspath(source), os.fspath(target)))
            rename(source, target)

        return run

    monkeypatch.setattr(os, "fsync", noted_fsync)
    for name, rename in renames.items():
        monkeypatch.setattr(os, name, noted(rename))
    return calls


def assert_lasts(calls: list[Operation], final: Path, *, parts: Iterable[str] = ()) -> None:
    """Fails unless a file, or a folder and the named files in it, was synced, then renamed to `final`, then its parent
    synced."""
    (place,) = (n for n, call in enumerate(calls) if call[0] == "rename" and call[2] == str(final))
    source = calls[place][1]
    for path in (source, *(f"{source}/{part}" for part in parts)):
        assert ("sync", path) in calls[:place], f"{path} may be renamed before its content is on the disk"
    assert ("sync", str(final.parent)) in calls[place:], f"the rename to {final} may be lost"
