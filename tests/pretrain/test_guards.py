"""Skipped steps of whole runs: statistics that they do not enter, counts over resumes, budgets, and going back."""

import contextlib
import gc
import io
import json
import math
import shutil
import signal
import weakref
from types import SimpleNamespace

import pytest
import torch

from sambalm.parallel.zero.step_guard import NO_LIMIT
from sambalm.pretrain.checkpointing.format import newest_checkpoint, open_checkpoint
from sambalm.pretrain.config_file import parse_config
from sambalm.pretrain.errors import DivergedError, ExitCode, ReplicasDifferError
from sambalm.pretrain.launched_step import StepResult
from sambalm.pretrain.lifecycle.guards import Guards
from sambalm.pretrain.lifecycle.hooks import FinishedStep
from sambalm.pretrain.lifecycle.ledger import Account, Ledger
from sambalm.pretrain.lifecycle.phases import Marks
from sambalm.pretrain.lifecycle.rollback import RollBack, Rollbacks
from sambalm.pretrain.lifecycle.signals import Request
from sambalm.pretrain.reporting.goodput import read_goodput
from sambalm.pretrain.reporting.metrics_file import read_metrics
from tests.support.whole_runs import changed, run_dir, without_measured
from tests.support.worlds import run_world

NEVER = dict.fromkeys(("norm_spike_factor", "loss_spike_nats"))


@pytest.fixture
def values(run_values):
    """8 samples a step, in two micro-batches of each of two data-parallel ranks."""
    return changed(
        run_values,
        train={"steps": 8},
        validation={"every_steps": 100, "tokens": 64, "length_multiples": [1]},
        checkpoint={"every_steps": 3, "keep": 10},
        checks={"window_steps": 2},
    )


def train_with_faults(
    values: dict, faults: dict[int, float], *, by: str = "step", rank: int = -1, term_after: int | None = None
) -> dict:
    """Trains while the gradients of one micro-batch on one rank are bad.

    Args:
        faults: what they are filled with, by the step, or by the step's first sample where `by` is "sample".
        rank: counted from the last one when negative.
        term_after: TERM comes once the hooks have heard of the attempt's so many-th step, and is heeded after the next.
    """
    from sambalm.parallel.zero.engine import tensors_of_run
    from sambalm.parallel.zero.parameter_info import info_of
    from sambalm.pretrain import trainer
    from sambalm.pretrain.lifecycle.hooks import Hook
    from sambalm.pretrain.lifecycle.signals import Signals

    signals, engines, said = Signals(), [], io.StringIO()
    signals.listen()
    hooks_of, pass_over = trainer.Trainer._hooks, trainer.Trainer._pass_over_left_out

    class Terminates(Hook):
        steps = 0

        def after_step(self, step):
            self.steps += 1
            if self.steps == term_after:
                signals._note(signal.SIGTERM)

    def more_hooks(self, *args):
        hooks = hooks_of(self, *args)
        return [Terminates(), *hooks] if term_after else hooks

    def break_one_micro_batch(self):
        count = pass_over(self)
        engines.append(weakref.ref(self.training.engine))
        value = faults.get(self.step + 1 if by == "step" else self.samples)
        if value is not None and self.world.rank == rank % self.world.size:
            parameter = next(p for p in self.training.chunks[0].parameters() if info_of(p).owned and p.dim() == 1)

            def spoil(gradient):
                hook.remove()
                return torch.full_like(gradient, value)

            hook = parameter.register_hook(spoil)
        return count

    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stderr(said):
        monkeypatch.setattr(trainer.Trainer, "_hooks", more_hooks)
        monkeypatch.setattr(trainer.Trainer, "_pass_over_left_out", break_one_micro_batch)
        try:
            exit_code = trainer.train(parse_config(values, source="test"), signals=signals)
        except DivergedError as error:
            exit_code, text = error.exit_code, str(error)
        else:
            text = ""
    gc.collect()
    first = engines[0]()
    held = sum(tensor.untyped_storage().size() for tensor in tensors_of_run(first)) if first else 0
    return {"exit_code": exit_code, "text": text, "said": said.getvalue(), "held_by_first_engine": held}


def records(values: dict) -> list[dict]:
    return [without_measured(record) for record in read_metrics(run_dir(values))]


def hook_states(values: dict) -> dict:
    return newest_checkpoint(run_dir(values), warn=pytest.fail).state["hooks"]


LAYOUTS = {
    "DP2": {"zero_stage": 1},
    "TP2+SP": {"tensor": 2, "sequence": True},
    "PP2": {"pipeline": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bad_micro_batch_on_one_rank_skips_one_step_on_all(layout, values):
    """NaN, and a finite spike once there are limits; neither enters the statistics."""
    values = changed(values, parallel=LAYOUTS[layout])
    spoil = _on_first if layout == "TP2+SP" else train_with_faults  # the other tensor-parallel rank owns no norm
    results = run_world(spoil, values, {3: math.nan, 6: 1e5}, ranks=2)
    assert [result["exit_code"] for result in results] == [ExitCode.FINISHED] * 2
    found = records(values)
    assert [r["step"] for r in found if r["skipped"]] == [3, 6]
    assert math.isnan(found[2]["grad_norm"])
    assert 1e4 < found[5]["grad_norm"] < math.inf
    guards = hook_states(values)["guards"]
    assert [step[0] for step in guards["window"]] == [5, 7, 8]
    assert (guards["in_a_row"], guards["skipped"]) == (0, 2)
    said = results[0]["said"]
    nan = "step 3: the gradient's norm is nan, so the optimizer skipped it (samples 16 to 23; 1 in a row, 1 in all)"
    assert nan in said
    assert "beyond the limit of" in said
    assert said.count("so the optimizer skipped it") == 2


def _on_first(values, faults):
    return train_with_faults(values, faults, rank=0)


@pytest.mark.slow
def test_limits_change_no_bit_of_a_clean_run(values):
    """With a window that is full from the second step on, in place of none."""
    values = changed(values, parallel={"zero_stage": 1})
    run_world(train_with_faults, values, {}, ranks=2)
    off = changed(values, run={"dir": values["run"]["dir"] + "-off"}, checks=NEVER | {"replicas_every_steps": None})
    run_world(train_with_faults, off, {}, ranks=2)
    assert records(values) == records(off)
    first, second = (newest_checkpoint(run_dir(v), warn=pytest.fail) for v in (values, off))
    assert all(torch.equal(first.read(name), second.read(name)) for name in first.shapes())
    assert first.state["hooks"]["replicas"] == {"equal_after": 7}


@pytest.mark.slow
def test_counts_are_kept_over_resumes(values):
    """NaN from step 3 on, and TERM after every third step of an attempt."""
    values = changed(values, train={"max_skipped_steps": 4}, checkpoint={"every_steps": 4})
    faults, codes = dict.fromkeys(range(3, 9), math.nan), []
    for _ in range(3):
        (result,) = run_world(_terminated, values, faults, ranks=1)
        codes.append(result["exit_code"])
    assert codes == [ExitCode.REQUEUE, ExitCode.REQUEUE, ExitCode.DIVERGED]
    assert result["text"].startswith("steps 3 to 7 were skipped, more than train.max_skipped_steps 4 in a row: ")
    # Nothing is saved of steps that were skipped but what an attempt leaves behind, marked as such.
    saved = [open_checkpoint(path) for path in sorted((run_dir(values) / "checkpoints").iterdir())]
    assert [(checkpoint.step, checkpoint.saved_while_skipping) for checkpoint in saved] == [(3, True), (6, True)]


def _terminated(values, faults):
    return train_with_faults(values, faults, term_after=2)


def test_every_second_step_ends_by_the_budget_of_a_window(values):
    values = changed(values, train={"steps": 40, "max_skipped_in_window": 4}, checks={"window_steps": 20} | NEVER)
    (result,) = run_world(train_with_faults, values, dict.fromkeys(range(2, 41, 2), math.nan), ranks=1)
    assert result["exit_code"] == ExitCode.DIVERGED
    assert result["text"].startswith(
        "5 of the 20 steps up to 10 were skipped, more than train.max_skipped_in_window 4: "
    )
    assert len(records(values)) == 10


@pytest.mark.parametrize("layout", ["DP2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("TP2+SP", "PP2"))])
def test_a_run_goes_back_and_leaves_out_the_samples(layout, values):
    """Samples 32 to 55 are bad: steps 5 to 7 are skipped, and replayed from step 3 without them and those before."""
    values = changed(values, train={"max_skipped_steps": 2}, parallel=LAYOUTS[layout])
    results = run_world(_bad_samples, values, ranks=2)
    assert [result["exit_code"] for result in results] == [ExitCode.FINISHED] * 2
    assert not any(result["held_by_first_engine"] for result in results)
    found = records(values)
    assert [r["step"] for r in found] == list(range(1, 9))
    assert not any(r["skipped"] for r in found)
    goodput = read_goodput(run_dir(values), is_alive=False)
    assert sum(goodput.seconds.values()) == pytest.approx(goodput.wall_s, rel=0.01)
    assert goodput.seconds[Account.SKIPPED] > 0
    assert goodput.seconds[Account.LOST] == 0
    assert [(event.what, event.step) for event in goodput.events if event.what in ("begin", "rollback")] == [
        ("begin", 0),
        ("rollback", 3),
        ("begin", 3),
    ]
    assert [r["tokens"] // 256 for r in found] == [1, 2, 3, 8, 9, 10, 11, 12]
    assert hook_states(values)["rollbacks"] == {"count": 1, "left_out": [[24, 32], [32, 40], [40, 48], [48, 56]]}
    # A process of its own goes on from a checkpoint after it to the same bits.
    shutil.rmtree(run_dir(values) / "checkpoints" / "step_00000008")
    run_world(_bad_samples, values, ranks=2)
    assert records(values) == found


def _bad_samples(values):
    return train_with_faults(values, dict.fromkeys((32, 40, 48), math.nan), by="sample")


@pytest.mark.slow
def test_a_run_goes_back_as_often_as_it_may(values):
    values = changed(values, train={"max_skipped_steps": 1, "max_rollbacks": 1})
    (result,) = run_world(train_with_faults, values, dict.fromkeys((5, 6), math.nan), ranks=1)
    assert result["exit_code"] == ExitCode.DIVERGED
    assert result["text"].startswith("steps 5 to 6 were skipped, more than train.max_skipped_steps 1 in a row")
    (again,) = run_world(train_with_faults, values, {}, ranks=1)
    assert again["exit_code"] == ExitCode.FINISHED


def train_with_an_infinite_weight(values: dict) -> tuple[int, str]:
    """A norm weight becomes infinite before step 6, once."""
    from sambalm.pretrain import trainer

    pass_over, spoilt = trainer.Trainer._pass_over_left_out, []

    def spoil(self):
        if self.step + 1 == 6 and not spoilt:
            spoilt.append(True)
            next(p for p in self.training.chunks[0].parameters() if p.dim() == 1).data[0] = math.inf
        return pass_over(self)

    said = io.StringIO()
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stderr(said):
        monkeypatch.setattr(trainer.Trainer, "_pass_over_left_out", spoil)
        return trainer.train(parse_config(values, source="test")), said.getvalue()


def test_weights_that_are_not_finite_are_never_saved(values):
    """The last step's would be, though steps are being skipped; the run goes back to step 4 instead and ends well."""
    values = changed(values, checkpoint={"every_steps": 4, "keep": 2})
    ((exit_code, said),) = run_world(train_with_an_infinite_weight, values, ranks=1)
    assert exit_code == ExitCode.FINISHED
    assert said.count("so the optimizer skipped it") == 3
    assert "norm.weight is not finite, so the state was not saved" in said
    assert "instead, the run goes back to step 4" in said
    last = newest_checkpoint(run_dir(values), warn=pytest.fail)
    assert last.step == 8
    assert all(last.read(name).isfinite().all() for name in last.shapes())
    assert not any(record["skipped"] for record in records(values))


def finite_on_rank(values: dict) -> list[bool]:
    """Whether the optimizer is finite at first, and once the last rank has one number that is not."""
    from sambalm.parallel.groups import start_world
    from sambalm.parallel.zero import deepspeed_adapter
    from sambalm.parallel.zero.engine import optimizer_is_finite
    from sambalm.pretrain.training import build_training

    config = parse_config(values, source="test")
    with start_world(config.parallel) as world:
        engine = build_training(config, world=world, checkpoint=None).engine
        found = [optimizer_is_finite(engine)]
        tensor = deepspeed_adapter.stepped_tensors(engine)[-1]
        for spoilt in (tensor.data, *(deepspeed_adapter.adamw(engine).state[tensor][key] for key in ("exp_avg_sq",))):
            kept = spoilt.flatten()[0].clone()
            if world.rank == world.size - 1:
                spoilt.view(-1)[0] = math.nan
            found.append(optimizer_is_finite(engine))
            spoilt.view(-1)[0] = kept
        return found


@pytest.mark.parametrize("parallel", [{"zero_stage": 1}, {"zero_stage": 2}, {"zero_stage": 3}, {"tensor": 2}], ids=str)
def test_one_number_that_is_not_finite_is_seen_where_it_is(parallel, values):
    first, second = run_world(finite_on_rank, changed(values, parallel=parallel), ranks=2)
    assert first == [True, True, True]
    assert second == [True, False, False]


def flipped_on_rank(values: dict) -> tuple[int, str]:
    """Trains while the second rank's copy of a norm gets another bit before step 5; what the run ends with."""
    from sambalm.pretrain import trainer

    pass_over, flipped = trainer.Trainer._pass_over_left_out, []

    def flip(self):
        if self.step + 1 == 5 and self.world.rank == 1 and not flipped:
            flipped.append(True)
            self.training.chunks[0].final_norm.weight.data.view(torch.int32)[3] ^= 1
        return pass_over(self)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(trainer.Trainer, "_pass_over_left_out", flip)
        try:
            return trainer.train(parse_config(values, source="test")), ""
        except ReplicasDifferError as error:
            return error.exit_code, str(error)


def test_replicas_that_differ_end_the_run_before_a_save(values):
    values = changed(values, parallel={"tensor": 2}, checks={"replicas_every_steps": 100})
    for code, text in run_world(flipped_on_rank, values, ranks=2):
        assert code == ExitCode.REPLICAS_DIFFER
        assert text.startswith("at step 6 final_norm.weight is not the same on rank 1 as on rank 0; ")
        assert "they were last found equal after step 2: " in text
    assert newest_checkpoint(run_dir(values), warn=pytest.fail).step == 3


@pytest.mark.slow
def test_replicas_that_differ_are_restored_where_the_config_says_so(values, tmp_path):
    values = changed(values, parallel={"tensor": 2}, checks={"replicas_every_steps": 1, "on_difference": "restore"})
    clean = changed(values, run={"dir": str(tmp_path / "clean")})
    run_world(train_with_faults, clean, {}, ranks=2)
    assert run_world(flipped_on_rank, values, ranks=2) == [(ExitCode.FINISHED, "")] * 2
    assert records(values) == records(clean)
    assert hook_states(values)["rollbacks"] == {"count": 1, "left_out": []}


class Host:
    """Guards without a device: what they would set as limits, and what they say of given results."""

    def __init__(self, values: dict, *, late: bool = False) -> None:
        self.config = parse_config(values, source="test")
        self.late = late  # whether a step's results are known only once the next one is under way
        self.limits, self.unread = {}, []
        self.guards = Guards(
            self.config, world=SimpleNamespace(is_main=False), rollbacks=Rollbacks(1), ledger=Ledger(Marks())
        )
        guard = SimpleNamespace(set_limits=lambda **limits: self.limits.__setitem__(self.number, limits))
        self.guards.on_start(SimpleNamespace(executor=SimpleNamespace(guard=guard)))

    def step(self, number: int, *, loss: float = 3.0, norm: float = 1.0) -> None:
        self.number = number
        self.guards.before_step(number)
        limits = self.limits[number]
        skipped = not (loss <= limits["loss"] and norm <= limits["norm"])
        size = self.config.train.global_batch_tokens
        result = StepResult(
            tokens=number * size,
            batch_tokens=size,
            loss=loss,
            grad_norm=norm,
            lr=1e-3,
            step_time_s=1.0,
            skipped=skipped,
        )
        self.unread.append(FinishedStep(number, result, Request.NOTHING))
        if len(self.unread) > self.late:
            self.guards.after_step(self.unread.pop(0))


@pytest.mark.parametrize("late", [False, True])
def test_limits_are_medians_of_the_steps_that_were_taken(late, values):
    """The same whether results are read at once or a step late, and over a resume; a low norm is never beyond it."""
    values = changed(values, checks={"window_steps": 3}, optimizer={"clip_norm": 0.5})
    host = Host(values, late=late)
    norms = [1.0, 4.0, 2.0, 3.0, 90.0, math.nan, 8.0, 1e-3, 1e-3, 1e-3, 0.4, 0.4]
    for number, norm in enumerate(norms, start=1):
        host.step(number, norm=norm, loss=3.0 if number != 8 else 3.9)
        if number == 7 and not late:
            state = json.loads(json.dumps(host.guards.state()))
            host.guards.load_state(state)
            assert host.guards.state() == state
    limits = [host.limits[number]["norm"] for number in range(1, 13)]
    assert limits == [NO_LIMIT] * 4 + [20.0, 30.0, 30.0, 30.0, 30.0, 30.0, 0.5, 0.5]
    assert host.limits[5]["loss"] == 4.0
    assert host.guards.skipped == 2
    assert max(step.norm for step in host.guards.window) < 1


def test_limits_begin_anew_with_each_phase_of_the_data(values):
    """Losses and norms of another mix are others; a run's last phase has no end."""
    size = values["train"]["global_batch_tokens"]
    phased = changed(values, checks={"window_steps": 2}, data={"phases": [{"tokens": 6 * size}, {"tokens": 6 * size}]})
    del phased["train"]["steps"]
    host = Host(phased)
    for number in range(1, 15):
        host.step(number, loss=3.0 if number <= 6 else 7.0)
    assert [host.limits[number]["loss"] for number in range(1, 15)] == (
        [NO_LIMIT] * 3 + [4.0] * 3 + [NO_LIMIT] * 3 + [8.0] * 5
    )
    assert host.guards.skipped == 0


def test_a_loss_must_be_beyond_nats_and_deviations(values):
    host = Host(changed(values, checks={"window_steps": 4}))
    for number, loss in enumerate([2.0, 3.0, 4.0, 3.0, 3.0, 3.0], start=1):
        host.step(number, loss=loss)
    # Of 2, 3, 4 and 3 the median is 3 and the median deviation from it 0.5.
    assert host.limits[6]["loss"] == pytest.approx(3 + 10 * 1.4826 * 0.5)
    off = Host(changed(values, checks={"window_steps": 2} | NEVER))
    for number in range(1, 8):
        off.step(number)
    assert set(map(tuple, (limits.values() for limits in off.limits.values()))) == {(NO_LIMIT, NO_LIMIT)}


def test_what_a_budget_leaves_out(values):
    """In a row: the skipped steps and the one before them. Now and then: the skipped ones."""
    host = Host(changed(values, train={"max_skipped_steps": 1}, checks={"window_steps": 100}))
    for number, norm in enumerate([1.0, 1.0, math.inf, 1.0, 1.0, math.nan], start=1):
        host.step(number, norm=norm)
    with pytest.raises(RollBack, match="steps 6 to 7 were skipped") as found:
        host.step(7, norm=math.nan)
    assert found.value.newest_step == 4
    assert found.value.record == {"count": 1, "left_out": [[32, 40], [40, 48], [48, 56]]}
    host.guards.in_a_row = 0
    with pytest.raises(DivergedError, match="steps 8 to 9 were skipped"):
        [host.step(number, norm=math.inf) for number in (8, 9)]
    host = Host(changed(values, train={"max_skipped_in_window": 1}, checks={"window_steps": 5}))
    for number, norm in enumerate([1.0, math.nan, 1.0, 1.0, 1.0, 1.0, math.nan, 1.0], start=1):
        host.step(number, norm=norm)
    with pytest.raises(RollBack, match="2 of the 5 steps up to 9 were skipped") as found:
        host.step(9, norm=math.nan)
    assert found.value.newest_step == 5
    assert found.value.record["left_out"] == [[48, 56], [64, 72]]
