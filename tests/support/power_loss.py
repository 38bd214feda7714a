"""Whether what is written survives a power loss: contents reach the disk before the rename that shows them."""

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

Operation = tuple[str, ...]  # sync, a path and the bytes there; or rename and two paths


def noted_operations(monkeypatch: pytest.MonkeyPatch) -> list[Operation]:
    """Returns a list that grows by each sync and rename from now on."""
    calls: list[Operation] = []
    fsync, renames = os.fsync, {name: getattr(os, name) for name in ("replace", "rename")}

    def noted_fsync(file) -> None:
        number = file if isinstance(file, int) else file.fileno()
        calls.append(("sync", os.readlink(f"/proc/self/fd/{number}"), str(os.fstat(number).st_size)))
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
    for path, there in ((source, final), *((f"{source}/{part}", final / part) for part in parts)):
        sizes = [int(call[2]) for call in calls[:place] if call[:2] == ("sync", path)]
        assert sizes, f"{path} may be renamed before its content is on the disk"
        assert there.is_dir() or sizes[-1] == there.stat().st_size, f"{path} is synced before all of it is written"
    assert any(call[:2] == ("sync", str(final.parent)) for call in calls[place:]), f"the rename to {final} may be lost"
