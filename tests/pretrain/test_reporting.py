"""What a report tells of a run, from records that are written by hand."""

from rich.console import Console

from sambalm.data_pipeline.baselines import Baselines
from sambalm.pretrain.config_file import parse_config
from sambalm.pretrain.reporting import summary
from tests.support.layout_runs import run_values


def shown(table) -> list[str]:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table)
    return [" ".join(line.replace("│", " ").split()) for line in capture.get().splitlines()]


def test_a_report_compares_losses_and_tells_the_median_speed(tmp_path):
    config = parse_config(run_values(), source="test")  # of 32 tokens a sequence
    record = {"step": 7, "validation_loss_32": 2.5, "validation_loss_64": 2.25, "source_validation_loss_32/web": 3.0}
    lines = shown(summary._losses(record, config, Baselines(unigram_entropy=6.0, unigram=6.5, bigram=4.5)))
    assert lines[0] == "Held-out loss after step 7"
    for line in (
        "Samba, 32 tokens (1x the training length) 2.5000",
        "Samba, 64 tokens (2x the training length) 2.2500",
        "Samba, web alone 3.0000",
        "unigram entropy of these tokens 6.0000",
        "bigram, Kneser-Ney, of the training tokens 4.5000",
    ):
        assert line in lines
    records = [
        {"step": step, "tokens": 640 * step, "tokens_per_second": speed} for step, speed in ((1, 9), (2, 5), (3, 6))
    ]
    for folder in ("tensorboard", "checkpoints/step_00000002", "checkpoints/step_00000003"):
        (tmp_path / folder).mkdir(parents=True)
    lines = shown(summary._facts(records, tmp_path, tmp_path / "loss.png"))
    assert "steps 3 (1,920 tokens)" in lines
    assert "speed 6 tokens/s (median step)" in lines
    assert [line.split()[0] for line in lines if line] == ["steps", "speed", "TensorBoard", "checkpoint"]
    assert any(line.endswith("step_00000003") for line in lines)


def test_a_run_that_validates_on_named_data_alone_has_a_report(tmp_path):
    lines = ['{"step": 1, "named_validation_loss_32/a": 2.0', '{"step": 2']
    rest = ', "loss": 3.0, "tokens": 64, "step_time_s": 1.0, "tokens_per_second": 64.0}\n'
    (tmp_path / "metrics.jsonl").write_text("".join(line + rest for line in lines))
    assert summary._last_validation(tmp_path)["step"] == 1


def test_baselines_are_of_the_tokens_that_a_run_validates_on(monkeypatch):
    values = run_values() | {"validation": {"tokens": 100}}
    told = []
    monkeypatch.setattr(summary, "baseline_losses", lambda data, **named: told.append(named))
    for tokens in (100, 31):
        summary._baselines(parse_config(values | {"validation": {"tokens": tokens}}, source="test"))
    assert told == [{"validation_samples": samples, "vocab_size": 96} for samples in (3, 1)]
