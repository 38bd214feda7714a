"""Fine-tuning as whole runs: conversations, masks and whole documents, on layouts, over a resume, in validation."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from sambalm.data_pipeline.dataset import build_validation_dataset
from sambalm.data_pipeline.preprocess import preprocess
from sambalm.data_pipeline.sources import open_sources
from sambalm.parallel.groups import ContextParallel, Pipeline
from sambalm.pretrain.checkpointing.format import newest_checkpoint
from sambalm.pretrain.checkpointing.to_hf import checkpoint_to_hf
from sambalm.pretrain.config_file import load_config, parse_config
from sambalm.pretrain.generation.source import load_source
from sambalm.pretrain.planner.search import describe_run
from sambalm.pretrain.reporting.data_index import index_data
from sambalm.pretrain.validation import Validator
from tests.support import program
from tests.support.marks import slow_except
from tests.support.whole_runs import changed, run_dir, stopped_after, train

CONFIGS = Path(__file__).parents[2] / "configs"
TEMPLATE = CONFIGS / "finetune" / "chat_template.jinja"


@pytest.fixture
def values(run_values, tokens, tmp_path) -> dict:
    """A run on conversations, several in a sample and each by itself, of which the answers count."""
    chats = tmp_path / "chats.jsonl"
    lines = []
    for number in range(120):
        said = "import os\n" * (number % 4)
        turns = [{"role": "user", "content": f"def f{number}"}, {"role": "assistant", "content": f"{said}return"}]
        lines.append(json.dumps({"messages": turns}))
    chats.write_text("\n".join(lines))
    preprocess(
        [chats],
        tokenizer=tokens.with_name("tokenizer.model"),
        output_prefix=tmp_path / "chats",
        chat_template=TEMPLATE,
        workers=1,
    )
    data = {"train": str(tmp_path / "chats"), "packing": "documents", "reset_at_document": True, "sequence_length": 64}
    return changed(run_values, data=data, train={"steps": 4}, checkpoint={"every_steps": 2})


LAYOUTS = [
    (2, {"zero_stage": 1}),
    (2, {"context": 2}),
    (2, {"pipeline": 2}),
    (2, {"tensor": 2}),
    (2, {"zero_stage": 3}),
]


@pytest.mark.parametrize(("ranks", "parallel"), slow_except([], LAYOUTS))
def test_a_fine_tuning_run_is_the_same_on_every_layout(ranks, parallel, values, tmp_path):
    alone = train(values)
    other = changed(values, run={"dir": str(tmp_path / "other")}, parallel=parallel)
    assert train(other, ranks=ranks) == [pytest.approx(record, rel=1e-4) for record in alone]


def test_a_fine_tuning_run_goes_on_with_the_same_bits(values, tmp_path):
    records = train(values)
    assert train(stopped_after(values, 2, tmp_path / "stopped")) == records
    data = newest_checkpoint(run_dir(values), warn=pytest.fail).state["data"]
    assert data["packing"] == "documents"


def test_documents_that_lose_their_ends_are_told_of(values, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(changed(values, data={"sequence_length": 32}, train={"steps": 1})))
    said = program.run("train", config).stderr
    assert re.search(r"warning: \d+ documents of .*chats have more tokens than data.sequence_length 32", said)


def test_validation_is_the_mean_over_the_tokens_that_count(values):
    """Where the loss of a token is its id."""
    config = parse_config(changed(values, validation={"tokens": 10**6}), source="test")
    world = SimpleNamespace(
        device=torch.device("cpu"), context=ContextParallel(), pipeline=Pipeline(), data_rank=0, data_size=1
    )
    world.sum_over_replicas = lambda sums: sums
    sources = open_sources(config.data)
    executor = SimpleNamespace(losses=lambda batches: [batch.labels.float() for batch in batches])
    found = Validator(config, sources, world=world).losses(executor)

    (stream,) = [source.stream(held_out=True) for source in sources]
    ids, counts = stream.read(0, len(stream)), stream.counts(0, len(stream))
    assert 0 < counts.mean() < 0.9
    assert found["validation_loss_64"] == pytest.approx(ids[counts].mean())
    assert found["validation_loss_128"] == pytest.approx(ids[counts].mean())
    dataset = build_validation_dataset(config.data, sources, num_samples=10**6)
    assert sum(float(dataset[n].loss_weights.sum()) for n in range(len(dataset))) == np.count_nonzero(counts)


def test_what_is_packed_is_told_ahead_and_the_template_stays_with_the_data(values, capsys):
    config = parse_config(values, source="test")
    index_data(config, progress=lambda *_: None)
    assert "samples of whole documents, which fill " in capsys.readouterr().out
    assert config.data.chat_template() == TEMPLATE.read_text()


@pytest.mark.slow
def test_a_run_and_its_exported_folder_talk_by_the_template_of_its_data(values, tmp_path):
    train(changed(values, train={"steps": 1}))
    options = {"step": None, "precision": "fp32", "documents": None, "tokenizer": None, "shard_size": "1GB"}
    options |= {"chat_template": None, "overwrite": False, "progress": lambda *_: None}
    checkpoint_to_hf(run_dir(values), tmp_path / "hf", **options)
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == TEMPLATE.read_text()
    said = [{"role": "user", "content": "def f"}, {"role": "assistant", "content": "return"}]
    said.append({"role": "user", "content": "import os\n  twice?"})
    found = []
    for path in (run_dir(values), tmp_path / "hf"):
        chat = load_source(path, device="cpu", dtype=None, tokenizer=None).chat
        found.append([(text := chat.render(said[:turns])) and (text, chat.encode(text)) for turns in (1, 3)])
    assert found[0] == found[1]
    assert found[0][1][0].endswith("twice?\nAssistant:")


@pytest.mark.parametrize(
    ("name", "pretrained"),
    [("passkey_1.7b", "samba_1.7b"), ("phonebook_1.7b", "samba_1.7b"), ("chat_3.8b", "samba_3.8b")],
)
def test_the_recipes_fit_their_models_and_64_gpus(name, pretrained):
    config = load_config(CONFIGS / "finetune" / f"{name}.yaml")
    assert config.model == load_config(CONFIGS / f"{pretrained}.yaml").model
    assert config.train.init_from == f"runs/{pretrained}"
    assert describe_run(config, world_size=64).startswith("64 ranks: DP64 ZeRO-1")


def test_the_passkey_recipe_is_the_paper_s():
    config = load_config(CONFIGS / "finetune" / "passkey_1.7b.yaml")
    rates = [
        config.optimizer.learning_rate(step, steps=config.train.steps) for step in range(1, config.train.steps + 1)
    ]
    assert (len(rates), rates.index(max(rates)) + 1, max(rates)) == (500, 250, 1e-4)
    assert (config.global_batch_samples, config.data.sequence_length) == (2048, 4096)
