"""benchmarks/compare.py: what it takes for a difference."""

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.support.benchmark_files import load_benchmark

ROOT = Path(__file__).parents[1]
STEP = {"step": 1, "loss": 5.0, "grad_norm": 1.25}


@pytest.fixture(scope="module")
def compare():
    return load_benchmark("compare")


def test_every_number_that_training_computes_counts(compare):
    assert compare.metric_differences([STEP], [dict(STEP)]) == []
    assert compare.metric_differences([STEP], [STEP | {"new": 1.0}]) == []
    bits = math.nextafter(1.25, 2)
    assert compare.metric_differences([STEP], [STEP | {"grad_norm": bits}]) == [
        f"grad_norm of step 1 is 1.25 and {bits}"
    ]
    assert compare.metric_differences([STEP | {"validation_loss_32": 5.0}], [STEP]) == [
        "validation_loss_32 of step 1 is no longer logged"
    ]
    assert compare.metric_differences([STEP], [STEP, STEP | {"step": 2}]) == ["logged steps are [1] and [1, 2]"]
    assert compare.metric_differences([], []) != []
    assert compare.metric_differences([{"step": 1}], [{"step": 1}]) != []


def test_times_and_memory_are_left_out(compare, tmp_path):
    measured = {"step_time_s": 0.5, "tokens_per_second": 7.0, "peak_host_memory_bytes": 3, "mfu": 0.1}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(STEP | measured) + "\n")
    assert compare.read_metrics(tmp_path) == [STEP]


def write(path, tensors):
    """A checkpoint's file of slices, given as (offsets, values) by name."""
    placement = {name: {"saved_offsets": offsets} for name, (offsets, _) in tensors.items()}
    values = {name: np.ascontiguousarray(slice) for name, (_, slice) in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(values, path, metadata={"DCP_SHARDING_INFO": json.dumps(placement)})


WHOLE = np.arange(12, dtype=np.float32).reshape(4, 3)


def test_checkpoints_are_compared_however_they_are_cut(compare, tmp_path):
    write(tmp_path / "one/a.safetensors", {"w": ([0, 0], WHOLE)})
    write(tmp_path / "two/a.safetensors", {"w": ([0, 0], WHOLE[:3])})
    write(tmp_path / "two/b.safetensors", {"w": ([3, 0], WHOLE[3:])})
    one, two = (compare.read_tensors(tmp_path / name) for name in ("one", "two"))
    assert compare.tensor_differences(one, two) == []

    changed = WHOLE.copy()
    changed[2, 1] = np.nextafter(changed[2, 1], np.float32(100))
    (found,) = compare.tensor_differences(one, {"w": changed})
    assert found.startswith("w differs by ")
    assert compare.tensor_differences({"w": np.zeros(2)}, {"w": -np.zeros(2)}) == ["w differs by 0.0e+00"]
    assert compare.tensor_differences(one, {}) == ["w is only in the older one"]
    assert compare.tensor_differences(one, {"w": WHOLE.T}) == ["w is float32 (4, 3) and float32 (3, 4)"]
    assert compare.tensor_differences({}, {}) != []


def test_slices_that_contradict_or_lack_something_are_refused(compare, tmp_path):
    write(tmp_path / "gap/a.safetensors", {"w": ([0, 0], WHOLE[:2])})
    write(tmp_path / "gap/b.safetensors", {"w": ([3, 0], WHOLE[3:])})
    with pytest.raises(compare.CompareError, match="no slice holds a part"):
        compare.read_tensors(tmp_path / "gap")
    write(tmp_path / "copies/a.safetensors", {"w": ([0, 0], WHOLE)})
    write(tmp_path / "copies/b.safetensors", {"w": ([1, 0], WHOLE[:1])})
    with pytest.raises(compare.CompareError, match="two stored copies differ"):
        compare.read_tensors(tmp_path / "copies")


def changed_tree(folder):
    """The product with one number changed: AdamW's weight decay, by a thousandth.

    A step multiplies weights by 1 - 3e-4, to which a thousandth more is five units in the last place of fp32; the
    first loss and gradient are the same.
    """
    for name in ("data_pipeline", "model", "parallel", "pretrain", "slurm"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    file = folder / "pretrain/optimizer.py"
    right, wrong = '"weight_decay": self.weight_decay if', '"weight_decay": self.weight_decay * 1.001 if'
    text = file.read_text()
    assert right in text
    file.write_text(text.replace(right, wrong))
    return folder


@pytest.mark.long
def test_one_changed_number_is_found(compare, tmp_path, capsys):
    sides = []
    for name, tree in (("base", ROOT), ("same", ROOT), ("changed", changed_tree(tmp_path / "tree"))):
        (tmp_path / name).mkdir()
        sides.append(compare.make_side(name, tree, tmp_path / name))
    base, same, changed = sides
    compare.make_data(base, tmp_path / "data")
    cases = [compare.Case("one-process", "fp32")]
    assert compare.compare_all(cases, base, same, data=tmp_path / "data")
    assert "differ" not in capsys.readouterr().out
    shutil.rmtree(base.folder / "one-process-fp32")
    assert not compare.compare_all(cases, base, changed, data=tmp_path / "data")
    out = capsys.readouterr().out
    assert " differ" in out.splitlines()[1]
    assert " of step 1 is " not in out  # which is computed before the first weight decay
    assert " differs by " in out


def test_the_arguments_name_what_is_known(compare, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare.py", "main", "--layouts", "CP2,CP3"])
    with pytest.raises(SystemExit) as error:
        compare.parse_arguments()
    assert error.value.code == 2
    assert "--layouts has CP3: known are one-process, TP2+SP" in capsys.readouterr().err
