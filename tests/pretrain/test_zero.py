"""ZeRO and the layouts through whole runs: losses, norms and held-out losses of one process."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sambalm.pretrain.checkpointing.format import newest_checkpoint
from tests.support.marks import slow_except
from tests.support.whole_runs import changed, train

TIED, UNTIED = True, False
LAYOUTS = {
    "DP2, ZeRO-1": (2, {"zero_stage": 1}, TIED),
    "DP2, ZeRO-2": (2, {"zero_stage": 2}, UNTIED),
    "DP2, ZeRO-3": (2, {"zero_stage": 3}, TIED),
    "TP2": (2, {"tensor": 2}, UNTIED),
    "DP2xTP2, ZeRO-1": (4, {"tensor": 2, "sequence": True, "zero_stage": 1}, UNTIED),
    "DP2xTP2, ZeRO-2": (4, {"tensor": 2, "zero_stage": 2}, TIED),
    "DP2xTP2, ZeRO-3": (4, {"tensor": 2, "sequence": True, "zero_stage": 3}, UNTIED),
    "PP2": (2, {"pipeline": 2}, UNTIED),
    "PP2xVPP2xDP2": (4, {"pipeline": 2, "virtual_pipeline": 2}, TIED),
    "CP2, ZeRO-3": (2, {"context": 2, "zero_stage": 3}, UNTIED),
    "CP2xTP2+SP, full": (4, {"context": 2, "tensor": 2, "sequence": True, "recompute": "full"}, TIED),
    "PP2xCP2": (4, {"pipeline": 2, "context": 2}, TIED),
}
FP32_ENDINGS = (".A_log", ".D", ".dt_proj.bias")


@pytest.fixture(scope="module")
def one_process():
    """Ten steps of one process, by whether embeddings are tied; filled as they are asked for."""
    return {}


FEW_RANKS = [name for name, (ranks, _, _) in LAYOUTS.items() if ranks == 2]


@pytest.mark.parametrize(
    "layout",
    [
        *slow_except(["DP2, ZeRO-1"], FEW_RANKS, long=["DP2, ZeRO-2", "PP2"]),
        *(pytest.param(name, marks=pytest.mark.long) for name in LAYOUTS if name not in FEW_RANKS),
    ],
)
def test_every_layout_trains_like_one_process(layout, run_values, one_process, tmp_path):
    ranks, parallel, tied = LAYOUTS[layout]
    values = changed(run_values, train={"steps": 10}, model={"tie_embeddings": tied})
    if tied not in one_process:
        one_process[tied] = train(changed(values, run={"dir": str(tmp_path / "one")}))
    records = train(changed(values, parallel=parallel), ranks=ranks)
    assert len(records) == 10
    for record, expected in zip(records, one_process[tied], strict=True):
        assert record == pytest.approx(expected, rel=1e-5)
    assert records[-1]["loss"] < records[0]["loss"] - 0.3


@pytest.mark.parametrize("stage", slow_except([], [1, 2, 3], long=[2]))
def test_bf16_runs_keep_mambas_rates_in_fp32(stage, run_values):
    """A_log, D and the dt bias hold values that bf16 cannot, after steps, in weights and moments of a checkpoint."""
    values = changed(run_values, train={"precision": "bf16"}, parallel={"zero_stage": stage})
    train(values, ranks=2)
    checkpoint = newest_checkpoint(Path(values["run"]["dir"]), warn=pytest.fail)
    in_fp32 = changed(values, run={"dir": values["run"]["dir"] + "-fp32"}, train={"precision": "fp32"})
    train(in_fp32, ranks=2)
    exact = newest_checkpoint(Path(in_fp32["run"]["dir"]), warn=pytest.fail)
    names = [name for name in checkpoint.shapes() if name.endswith(FP32_ENDINGS)]
    assert len(names) == 3
    for name in names:
        value = checkpoint.read(name)
        assert not torch.equal(value, value.bfloat16().float()), f"{name} was rounded"
        torch.testing.assert_close(value, exact.read(name), rtol=2e-3, atol=2e-3)
    for file in checkpoint.path.glob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32}
