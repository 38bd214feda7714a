"""The configuration: what is read, what is refused and in which words, and the configs that are shipped."""

import copy
import re
from pathlib import Path

import pytest

from sambalm.model.parameters import count_parameters
from sambalm.parallel.errors import ParallelError
from sambalm.pretrain import config_docs
from sambalm.pretrain.config_file import dump_config, load_config, parse_config
from sambalm.pretrain.errors import ConfigError
from sambalm.pretrain.optimizer import OptimizerConfig

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "configs" / "demo.yaml"
LIBRARY_WORDS = re.compile(
    r"pydantic|https?:|Value error|after validation|instance of|Section|Config\b|dict|\[type=|\n"
)


def refusal(*overrides, path=DEMO, error=ConfigError):
    """The message for a file with overrides; every message is one sentence without a library's vocabulary."""
    with pytest.raises(error) as raised:
        load_config(path, overrides)
    message = str(raised.value)
    assert not LIBRARY_WORDS.search(message), message
    assert not re.search(r"\.\s", message), f"more than one sentence: {message}"
    return message


def test_overrides_reach_their_keys_with_their_types():
    config = load_config(
        DEMO,
        [
            "train.steps=50",
            "optimizer.peak_lr=4e-4",
            "optimizer.eps=1E-10",
            "model.pattern=M- x 3",
            "parallel.sequence=true",
            "model.dt_rank=5",
            "validation.length_multiples=[1, 8]",
            "data.train=[{prefix: a, weight: 1}, {prefix: b, weight: 2.5}]",
            "run.dir=runs/x=y",
        ],
    )
    assert (config.train.steps, config.optimizer.peak_lr, config.optimizer.eps) == (50, 4e-4, 1e-10)
    assert (config.model.pattern, config.model.dt_rank, config.parallel.sequence) == ("M-M-M-", 5, True)
    assert config.validation.length_multiples == [1, 8]
    assert (config.data.prefixes, config.data.weights) == (["a", "b"], [1, 2.5])
    assert config.run.dir == "runs/x=y"
    assert config.run.seed == load_config(DEMO).run.seed


def test_a_former_name_of_a_key_is_taken_with_one_notice(tmp_path, capsys, monkeypatch):
    path = tmp_path / "old.yaml"
    text = DEMO.read_text()
    assert "\nrun:\n" in text
    path.write_text(text.replace("\nrun:\n", "\nrun:\n  fruitless_attempts: 7\n"))
    notice = "run.fruitless_attempts is now called run.max_attempts_without_progress\n"
    assert load_config(path).run.max_attempts_without_progress == 7
    assert capsys.readouterr().err == f"{path}: {notice}"
    assert load_config(DEMO, ["run.fruitless_attempts=5"]).run.max_attempts_without_progress == 5
    assert capsys.readouterr().err == f"the override 'run.fruitless_attempts=5': {notice}"
    assert load_config(path, ["run.max_attempts_without_progress=2"]).run.max_attempts_without_progress == 2

    config = load_config(DEMO)
    assert "fruitless" not in dump_config(config)
    saved = config.model_dump()  # as a checkpoint from before the new name has it
    del saved["run"]["max_attempts_without_progress"]
    saved["run"]["fruitless_attempts"] = 4
    before = copy.deepcopy(saved)
    capsys.readouterr()
    assert parse_config(saved, source="a checkpoint").run.max_attempts_without_progress == 4
    assert capsys.readouterr().err == f"a checkpoint: {notice}"
    assert saved == before  # the caller's values stay as they are
    monkeypatch.setenv("RANK", "1")
    parse_config(saved, source="a checkpoint")
    assert capsys.readouterr().err == ""  # the first rank says it for all


def test_a_key_under_both_of_its_names_is_refused(tmp_path):
    path = tmp_path / "both.yaml"
    both = "\nrun:\n  fruitless_attempts: 7\n  max_attempts_without_progress: 7\n"
    path.write_text(DEMO.read_text().replace("\nrun:\n", both))
    message = refusal(path=path)
    assert "run.max_attempts_without_progress and its former name run.fruitless_attempts: remove the latter" in message


def test_an_override_reaches_a_section_that_the_file_lacks():
    path = ROOT / "configs" / "samba_421m.yaml"
    assert "parallel:" not in path.read_text()
    assert load_config(path, ["parallel.zero_stage=3"]).parallel.zero_stage == 3


@pytest.mark.parametrize("number", ["4e-4", "4E-4", "4.0e-4", "0.4e-3", "0.0004", "+4e-4"])
def test_exponents_in_a_file_are_numbers(number, tmp_path):
    path = tmp_path / "run.yaml"
    content, replaced = re.subn(r"peak_lr: \S+", f"peak_lr: {number}", DEMO.read_text())
    assert replaced == 1
    path.write_text(content)
    assert load_config(path).optimizer.peak_lr == pytest.approx(4e-4, rel=1e-12)


def test_what_only_looks_like_an_exponent_stays_text():
    assert load_config(DEMO, ["run.dir=12e3x"]).run.dir == "12e3x"


def test_a_dumped_config_reads_back_the_same(tmp_path):
    config = load_config(DEMO, ["optimizer.peak_lr=4e-4", "optimizer.eps=1e-9"])
    (tmp_path / "run.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "run.yaml") == config


@pytest.mark.parametrize(
    ("override", "key", "value", "allowed"),
    [
        ("windw=3", "windw", "3", "format_version, run, model, data, train"),
        ("model.windw=3", "model.windw", "3", "pattern, hidden_size"),
        ("parallel.data=2", "parallel.data", "2", "tensor, sequence, context, pipeline"),
        ("data.train=[{prefix: a, weight: 1, share: 2}]", "data.train.0.share", "2", "unknown key"),
        ("train.steps=abc", "train.steps", "'abc'", "integer"),
        ("train.steps=true", "train.steps", "True", "integer"),
        ("train.steps=1.5", "train.steps", "1.5", "integer"),
        ("train.steps=", "train.steps", "None", "integer"),
        ("train.steps={}", "train.steps", "{}", "integer"),
        ("train.steps=0", "train.steps", "0", "greater than 0"),
        ("train=5", "train", "5", "steps, global_batch_tokens"),
        ("train.precision=fp16", "train.precision", "'fp16'", "'bf16' or 'fp32'"),
        ("train.precision=fp8", "train.precision", "'fp8'", "; train.matmul_precision takes 'fp8'"),
        ("optimizer.peak_lr=.inf", "optimizer.peak_lr", "inf", "finite"),
        ("optimizer.peak_lr=fast", "optimizer.peak_lr", "'fast'", "number"),
        ("optimizer.beta1=1", "optimizer.beta1", "1", "less than 1"),
        ("model.tie_embeddings=1", "model.tie_embeddings", "1", "boolean"),
        ("data.train=3", "data.train", "3", "string"),
        ("data.train=[]", "data.train", "[]", "at least one prefix"),
        ("data.train=[{prefix: a, weight: 0}]", "data.train.0.weight", "0", "greater than 0"),
        ("validation.length_multiples=[]", "validation.length_multiples", "[]", "at least 1"),
        ("validation.length_multiples=[1, 0]", "validation.length_multiples.1", "0", "greater than 0"),
        ("parallel.zero_stage=0", "parallel.zero_stage", "0", "1, 2 or 3"),
        ("parallel.pipeline=0", "parallel.pipeline", "0", "greater than 0"),
        ("kernels.scan=triton", "kernels.scan", "'triton'", "'torch'"),
        ("model.window=0", "model.window", "0", "greater than 0"),
        ("model.pattern=M-x", "model.pattern", "'M-x'", "letters M, *, -, F, ="),
        ("model.num_query_heads=5", "model.num_query_heads", "5", "a divisor"),
        ("model.num_kv_heads=3", "model.num_kv_heads", "3", "a divisor"),
        ("train.global_batch_tokens=1000", "train.global_batch_tokens", "1000", "multiple of data.sequence_length 256"),
    ],
)
def test_a_bad_value_is_refused_by_key_value_and_what_is_allowed(override, key, value, allowed):
    message = refusal(override)
    assert f"{key} is {value}" in message or f"{key} (value {value})" in message
    assert allowed in message
    assert message.startswith(f"the override {override!r}: ")


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["parallel.tensor=1", "parallel.sequence=true"], ["parallel.sequence is true", "parallel.tensor is 1"]),
        (["model.vocab_size=1"], ["model.vocab_size is 1,", "parallel.tensor 2"]),
        (["model.mlp_size=1"], ["model.mlp_size is 1", "parallel.tensor 2"]),
        (["parallel.tensor=3", "model.vocab_size=2049"], ["parallel.tensor is 3", "model.num_kv_heads"]),
        (["parallel.tensor=8"], ["parallel.tensor is 8", "model.num_query_heads"]),
        (
            ["parallel.sequence=true", "data.sequence_length=255", "train.global_batch_tokens=4080"],
            ["data.sequence_length is 255", "parallel.tensor"],
        ),
    ],
)
def test_impossible_combinations_name_both_keys(overrides, named):
    message = refusal(*overrides)
    assert all(part in message for part in named), message


def test_heads_and_widths_that_the_pattern_does_not_use_are_not_checked():
    load_config(DEMO, ["model.pattern=M", "model.mlp_size=511", "model.num_kv_heads=1"])


def test_a_key_that_is_missing_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    content, removed = re.subn(r"  window: \d+\n", "", DEMO.read_text())
    assert removed == 1
    path.write_text(content)
    assert "model.window is missing" in refusal(path=path)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.steps", "section.key=value"),
        ("=5", "section.key=value"),
        ("run.dir.x=3", "'dir' is not a section"),
        ("train.steps={a", "not valid YAML"),
        ("model.pattern=*-*-", "quote a text twice, the outer marks for the shell, as in \"model.pattern='...'\""),
        ("run.dir=2026-13-45", "not valid YAML"),
    ],
)
def test_a_malformed_override_is_quoted(override, named):
    message = refusal(override)
    assert repr(override) in message
    assert named in message


@pytest.mark.parametrize("content", ["", "- a\n", "a: [\n", "\tx: 1\n"])
def test_a_file_that_is_no_config_is_refused(content, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    assert str(path) in refusal("train.steps=3", path=path)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    assert "nowhere.yaml: No such file" in refusal(path=tmp_path / "nowhere.yaml")
    assert "Is a directory" in refusal(path=tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "binary.yaml is not valid YAML" in refusal(path=tmp_path / "binary.yaml")


def test_another_format_version_is_refused_with_both_named():
    message = refusal("format_version=2")
    assert "format_version is 2" in message
    assert "reads format 1" in message


def test_the_world_must_hold_whole_models_and_whole_micro_batches():
    config = load_config(DEMO)  # tensor 2, 16 samples a step, micro-batches of 8
    for world_size in (2, 4):
        config.check_world(world_size)
    with pytest.raises(
        ParallelError, match=r"^3 processes .* \(parallel.tensor 2 x [^\n]*start a multiple of 2 [^\n]*$"
    ):
        config.check_world(3)
    with pytest.raises(
        ConfigError, match=r"^train.global_batch_tokens is 4096, .* 8 x .* 256 x 4 .* = 8192: change one of them$"
    ):
        config.check_world(8)


def test_accumulation_fills_the_global_batch():
    config = load_config(DEMO, ["train.micro_batch_size=2"])
    assert [config.accumulation_steps(data_size=size) for size in (1, 2, 4, 8)] == [8, 4, 2, 1]


def test_the_page_of_keys_is_up_to_date():
    assert (ROOT / "docs" / "config.md").read_text() == config_docs.render()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path):
    config = load_config(path)
    assert config.run.dir == f"runs/{path.stem}"


# arXiv 2406.07522, table 12 and appendix A: pattern, width, heads, MLP, vocabulary, parameters, steps, batch, peak LR.
PAPER = {
    "samba_421m": ("M-*-" * 6, 1536, (12, 12, 128), 4096, 32000, 421_793_280, 9537, 512 * 4096, 4e-4),
    "samba_1.3b": ("M-*-" * 9, 2304, (18, 18, 128), 6144, 32000, 1_330_207_488, 47684, 512 * 4096, 4e-4),
    "samba_1.7b": ("M-*-" * 12, 2048, (32, 4, 64), 8196, 50304, 1_742_194_688, 27418, 2048 * 4096, 6e-4),
    "samba_3.8b": ("M-*-" * 16, 2816, (11, 1, 256), 9984, 32064, 3_864_275_712, 381470, 2048 * 4096, 6e-4),
}
TRAINED_TOKENS = {"samba_421m": 20e9, "samba_1.3b": 100e9, "samba_1.7b": 230e9, "samba_3.8b": 3.2e12}


@pytest.mark.parametrize("name", PAPER)
def test_shipped_models_and_recipes_are_the_papers(name):
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    model, train, optimizer = config.model, config.train, config.optimizer
    assert (
        model.pattern,
        model.hidden_size,
        (model.num_query_heads, model.num_kv_heads, model.head_dim),
        model.mlp_size,
        model.vocab_size,
        count_parameters(model)["total"],
        train.steps,
        train.global_batch_tokens,
        optimizer.peak_lr,
    ) == PAPER[name]
    assert (model.window, model.d_state, model.d_conv, model.expand, model.tie_embeddings) == (2048, 16, 4, 2, True)
    assert model.dt_rank_size == {1536: 96, 2304: 144, 2048: 128, 2816: 176}[model.hidden_size]
    assert train.steps * train.global_batch_tokens == pytest.approx(TRAINED_TOKENS[name], rel=1e-4)
    assert (config.data.sequence_length, train.precision) == (4096, "bf16")
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay, optimizer.clip_norm) == (0.9, 0.95, 0.1, 1.0)
    assert (optimizer.schedule, optimizer.warmup_fraction, optimizer.final_lr_ratio) == ("cosine", 0.01, 0.1)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # Warm-up over 100 of 1000 steps; then 4e-5 + 3.6e-4 x what remains of the cosine, (1 + cos(pi x progress)) / 2.
        ("cosine", {1: 4e-6, 50: 2e-4, 100: 4e-4, 325: 3.4727922e-4, 550: 2.2e-4, 775: 9.272078e-5, 1000: 4e-5}),
        # The last 200 steps are linear.
        ("wsd", {1: 4e-6, 50: 2e-4, 100: 4e-4, 101: 4e-4, 800: 4e-4, 850: 3.1e-4, 900: 2.2e-4, 1000: 4e-5}),
    ],
)
def test_learning_rates(schedule, expected):
    optimizer = OptimizerConfig(peak_lr=4e-4, schedule=schedule, warmup_fraction=0.1, decay_fraction=0.2)
    rates = {step: optimizer.learning_rate(step, steps=1000) for step in expected}
    assert rates == pytest.approx(expected, rel=1e-7)


def test_a_run_without_warm_up_starts_near_its_peak():
    optimizer = OptimizerConfig(peak_lr=1.0, warmup_fraction=0.0, final_lr_ratio=0.0)
    # (1 + cos(pi / 2)) / 2 at half the run, 0 at its end.
    assert [optimizer.learning_rate(step, steps=2) for step in (1, 2)] == pytest.approx([0.5, 0.0])


def test_warm_up_is_a_share_of_the_steps_up_to_rounding_errors():
    optimizer = OptimizerConfig(peak_lr=1.0, warmup_fraction=0.07)  # 0.07 * 100 is 7.000000000000001 in fp64
    assert optimizer.learning_rate(7, steps=100) == 1.0


def test_a_share_of_the_steps_is_rounded_up():
    optimizer = OptimizerConfig(peak_lr=1.0, warmup_fraction=0.01)  # of the 9,537 steps of 421M: 95.37
    assert optimizer.learning_rate(95, steps=9537) == pytest.approx(95 / 96)
    assert optimizer.learning_rate(96, steps=9537) == 1.0 > optimizer.learning_rate(97, steps=9537)
