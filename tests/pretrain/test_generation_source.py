"""What `sambalm generate` and `sambalm serve` load: weights, the tokenizer, its chat template and ends of a text."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from sambalm.pretrain.config_file import parse_config
from sambalm.pretrain.generation import source as source_file
from sambalm.pretrain.generation.command import Request, _prompt_ids
from sambalm.pretrain.generation.errors import GenerationError
from sambalm.pretrain.generation.sampling import Sampling
from sambalm.pretrain.generation.source import dtype_of_run, load_source
from tests.pretrain.test_serving import EOS_ID, make_folder
from tests.support.layout_runs import run_values as layout_values


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_folder(tmp_path / "hf")


def test_a_template_s_control_tokens_are_none_in_a_prompt_after_it(folder):
    source = load_source(folder, device="cpu", dtype=None, tokenizer=None)
    chat: Any = source.chat
    before = source.encode("a</s>")
    assert chat.encode("a</s>")[-1:] == [2]
    assert source.encode("a</s>") == before
    assert 2 not in before


def test_a_model_may_have_no_end_of_a_text(folder):
    assert load_source(folder, device="cpu", dtype=None, tokenizer=None).eos_ids == {2, EOS_ID}
    for name in ("config.json", "generation_config.json"):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({key: value for key, value in values.items() if key != "eos_token_id"}))
    assert load_source(folder, device="cpu", dtype=None, tokenizer=None).eos_ids == set()


def test_a_tokenizer_with_more_ids_than_the_model_is_refused():
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=10))
    request = Request(["a"], Sampling(temperature=0))
    for highest, fits in ((9, True), (10, False)):
        source: Any = SimpleNamespace(model=model, encode=lambda text, highest=highest: [3, highest, 4])
        if fits:
            assert _prompt_ids(source, "a", 0, request) == [3, highest, 4]
            continue
        with pytest.raises(GenerationError, match="gives the id 10, but the model's vocab_size is 10: give the tok"):
            _prompt_ids(source, "a", 0, request)


@pytest.mark.parametrize(
    ("given", "of_manifest", "own", "eos_ids"),
    [(None, 5, 2, {5}), (None, None, 2, {2}), (None, -1, 2, set()), ("t.model", 5, 2, {2}), ("t.model", 5, -1, set())],
)
def test_a_text_of_a_checkpoint_ends_where_its_data_s_documents_do(given, of_manifest, own, eos_ids, monkeypatch):
    """The manifest's token, which may be another than the tokenizer's own; but not where another tokenizer is given."""
    data = SimpleNamespace(prefixes=["data/text"], tokenizer_path=lambda: Path("run.model"), chat_template=lambda: None)
    config, files = SimpleNamespace(data=data), []
    manifest = None if of_manifest is None else SimpleNamespace(tokenizer=SimpleNamespace(eos_id=of_manifest))
    stubs = {
        "saved_run": lambda checkpoint: config,
        "saved_model": lambda checkpoint: None,
        "read_manifest": {"data/text": manifest}.__getitem__,
        "_training_tokenizer": lambda file: (files.append(str(file)), list, None, own)[1:],
        "model_of_state": lambda *_, dtype: nn.Identity(),
    }
    for name, stub in stubs.items():
        monkeypatch.setattr(source_file, name, stub)
    options = {"device": torch.device("cpu"), "dtype": torch.float32, "tokenizer": given and Path(given)}
    checkpoint: Any = SimpleNamespace(path=Path("run"))
    assert source_file._checkpoint_source(checkpoint, **options).eos_ids == eos_ids
    assert files == [given or "run.model"]


@pytest.mark.parametrize(
    ("precision", "device", "dtype"),
    [("bf16", "cuda", torch.bfloat16), ("fp32", "cuda", torch.float32), ("bf16", "cpu", torch.float32)],
)
def test_a_run_is_loaded_on_a_gpu_as_it_trained(precision, device, dtype):
    run = parse_config(layout_values(precision=precision), source="test")
    assert dtype_of_run(run, torch.device(device)) == dtype
    assert dtype_of_run(None, torch.device(device)) == torch.float32  # of a converted model nobody knows
