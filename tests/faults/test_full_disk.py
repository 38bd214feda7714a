"""A real file system without room while a run trains on it."""

import contextlib
import re
import signal
import subprocess
from pathlib import Path

import pytest

from sambalm.pretrain.checkpointing.retention import examine_checkpoints
from sambalm.pretrain.errors import ExitCode
from sambalm.pretrain.reporting.metrics_file import read_metrics
from tests.support.program import wait_until
from tests.support.runs import Run
from tests.support.whole_runs import changed, endless


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    for size in (1 << 16, 1):
        with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(size)):
                pass
    return filler


@pytest.mark.long
def test_a_run_goes_on_while_its_disk_is_full(run_values, small_disk, tmp_path):
    values = changed(endless(run_values, save_every_steps=5), run={"dir": str(small_disk / "run")})
    run = Run(changed(values, checkpoint={"keep": 2, "max_failed_saves": 1000}), tmp_path)
    with run.started() as ranks:
        wait_until(lambda: len(run.saved_steps()) == 2, 120, run.text)
        filler = fill(small_disk)
        wait_until(lambda: run.text().count(" was not saved: ") > 1, 120, run.text)
        assert re.search("No space left on device.*: make room there", run.text())
        good = [report for report in examine_checkpoints(run.dir) if report.problem is None]
        assert len(good) >= 2
        assert [rank.poll() for rank in ranks] == [None, None]
        filler.unlink()
        wait_until(lambda: run.saved_steps()[-1] > good[-1].step + 5, 120, run.text)
        ranks[0].send_signal(signal.SIGTERM)
        assert run.exit_codes() == [ExitCode.REQUEUE] * 2
    assert "Traceback" not in run.text()
    assert [path for path in (run.dir / "checkpoints").iterdir() if path.name.endswith(".partial")] == []
    records = read_metrics(run.dir)
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    failures = [record["checkpoint_failures"] for record in records if "checkpoint_failures" in record]
    assert failures == list(range(1, len(failures) + 1))
    assert len(failures) > 1
