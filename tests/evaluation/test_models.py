"""Models behind one interface: scores, greedy text and tokenizers are those of transformers on the same folder."""

import json
import shutil

import pytest
import tokenizers
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from sambalm.evaluation.errors import EvaluationError
from sambalm.evaluation.models import causal_lm
from sambalm.evaluation.models.base import greedy
from sambalm.evaluation.models.loading import open_model
from sambalm.model.hf import stream
from sambalm.pretrain.errors import CheckpointError
from sambalm.pretrain.generation.errors import GenerationError
from tests.conftest import VOCAB_SIZE

KINDS = ("samba", "llama", "gpt2", "mamba")
TEXT = "  def main(self):\n    return [1, 2]\n\nclass Name: the naïve 漢字"


def opened(path, **options):
    return open_model(path, **{"device": "cpu", "dtype": None, "tokenizer": None} | options).model


def ids_of(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def short_pieces(monkeypatch):
    monkeypatch.setattr(stream, "PIECE_TOKENS", 7)
    monkeypatch.setattr(causal_lm, "_PIECE_TOKENS", 7)


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_scores_and_greedy_text_are_those_of_transformers(kind, hf_folders):
    model, ids = opened(hf_folders[kind]), ids_of(2, 30)
    reference = AutoModelForCausalLM.from_pretrained(hf_folders[kind])
    expected = reference(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    reader, told = model.new_reader(2), []
    first, second = reader.score(ids[:, :20], progress=told.append), reader.score(ids[:, 20:])
    scores, is_likeliest = (torch.cat(parts, dim=1) for parts in zip(first, second, strict=True))
    assert torch.equal(is_likeliest[:, 1:], reference(ids).logits.argmax(-1)[:, :-1] == ids[:, 1:])
    assert scores[:, 0].isnan().all()
    torch.testing.assert_close(scores[:, 1:], expected, atol=2e-5, rtol=2e-5)
    assert sum(told) == 40
    steps = reader.step(ids[:, 0])
    again = reference(torch.cat([ids, ids[:, :1]], dim=1)).logits[:, -1]
    torch.testing.assert_close(steps, again, atol=2e-5, rtol=2e-5)
    reference.generation_config.eos_token_id = None
    wanted = reference.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[:, 30:].tolist()
    assert len({*wanted[0], *wanted[1]}) > 2, "a constant continuation proves nothing"
    model.eos_ids = frozenset([wanted[0][4]])
    found = greedy(model, ids, max_new_tokens=12)
    assert found[0] == wanted[0][: wanted[0].index(wanted[0][4])]
    end = wanted[1].index(wanted[0][4]) if wanted[0][4] in wanted[1] else 12
    assert found[1] == wanted[1][:end]


def test_models_that_lose_their_state_between_pieces_are_recognised(hf_folders):
    """As transformers' own Mamba does; it then reads the first piece whole, which the test above relies on."""
    assert {kind: opened(hf_folders[kind]).carries_state for kind in KINDS[1:]} == {
        "llama": True,
        "gpt2": True,
        "mamba": False,
    }


@pytest.mark.parametrize("kind", ["samba", "llama"])
def test_text_is_that_of_the_tokenizer(kind, hf_folders, tokens):
    model, tokenizer = opened(hf_folders[kind]), AutoTokenizer.from_pretrained(hf_folders[kind])
    ids = model.encode(TEXT)
    assert ids == tokenizer.encode(TEXT, add_special_tokens=False)
    assert model.decode([*ids, 2]) == TEXT
    assert model.bytes_until(ids)[-1] == len(TEXT.encode())
    words = model.encode("one two")
    assert [int(size) for size in model.bytes_until(words)] == [
        len(model.decode(words[:n])) for n in range(1, len(words) + 1)
    ]
    assert (model.eos_ids >= {2}, model.end_id, model.max_tokens) == (True, 2, None)
    own = opened(hf_folders[kind], tokenizer=tokens.parent / "tokenizer.model")
    assert own.encode(TEXT) == ids
    assert own.tokenizer_hash() == model.tokenizer_hash()
    assert (own.begin_ids, own.begin_id, own.end_id) == ([], 1, 2)
    assert own.eos_ids >= {2}


def test_of_several_ends_of_a_text_documents_have_the_first(hf_folders, tmp_path):
    folder = tmp_path / "samba"
    shutil.copytree(hf_folders["samba"], folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2]}))
    model = opened(folder)
    assert (model.eos_ids, model.end_id) == ({2, 7}, 2)


@pytest.mark.parametrize("kind", ["samba", "llama"])
def test_what_the_tokenizer_puts_before_a_text_stands_there_once(kind, hf_folders, tmp_path):
    folder = tmp_path / kind
    shutil.copytree(hf_folders[kind], folder)
    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    inner.save(str(folder / "tokenizer.json"))
    model, without = opened(folder), opened(hf_folders[kind])
    assert (model.begin_ids, without.begin_ids) == ([1], [])
    assert model.encode(TEXT) == without.encode(TEXT)
    assert model.encode_first(TEXT) == [1, *without.encode_first(TEXT)]
    assert model.encode_next(" is 12") == without.encode_next(" is 12")


@pytest.mark.parametrize("kind", ["samba", "llama"])
def test_what_follows_a_text_has_the_ids_that_it_has_there(kind, hf_folders):
    model = opened(hf_folders[kind])
    for following in (" is 12", "\nThe end", "\n\n  return"):
        assert model.encode("key") + model.encode_next(following) == model.encode(f"key{following}")


def test_results_say_which_weights_they_are_of(run_dir, hf_folders):
    model = opened(run_dir)
    assert (model.identity.step, model.identity.kind) == (6, "SambaForCausalLM")
    before = opened(run_dir, step=3).identity
    assert before.step == 3
    assert before.fingerprint != model.identity.fingerprint
    assert opened(hf_folders["samba"]).identity.step is None
    assert opened(hf_folders["llama"], dtype="bf16").identity.dtype == "bfloat16"
    assert open_model(run_dir, device="cpu", dtype=None, tokenizer=None).run.run.seed == 7


def test_what_cannot_be_opened_ends_in_a_sentence(run_dir, hf_folders, tmp_path):
    with pytest.raises(EvaluationError, match=r"--step is for a run, and .*llama is a Hugging Face folder"):
        opened(hf_folders["llama"], step=3)
    with pytest.raises(CheckpointError, match="4"):
        opened(run_dir, step=4)
    with pytest.raises(GenerationError, match="nowhere is no model"):
        opened(tmp_path / "nowhere")
    with pytest.raises(GenerationError, match="the device 'tpu' cannot be used"):
        opened(hf_folders["llama"], device="tpu")
    with pytest.raises(EvaluationError, match="has learned positions for 64 tokens, and a text of 65 was to be read"):
        opened(hf_folders["gpt2"]).new_reader(1).score(ids_of(1, 65))
    reader = opened(hf_folders["gpt2"]).new_reader(1)
    reader.read(ids_of(1, 64))  # all that there are positions for
    with pytest.raises(EvaluationError, match="has learned positions for 64 tokens, and a text of 65 was to be read"):
        reader.step(ids_of(1, 1)[0])
    broken = tmp_path / "broken"
    shutil.copytree(hf_folders["llama"], broken)
    for name in broken.glob("tokenizer*"):
        name.unlink()
    with pytest.raises(
        EvaluationError, match=r"the tokenizer in .*broken cannot be loaded .* give one with --tokenizer"
    ):
        opened(broken)
    (broken / "model.safetensors").unlink()
    shutil.copy(hf_folders["llama"] / "tokenizer.json", broken)
    with pytest.raises(EvaluationError, match=r"transformers cannot load a causal language model from .*broken"):
        opened(broken)
    (broken / "config.json").write_text('{"model_type": "of_code_in_its_folder", "auto_map": {"AutoConfig": "x.Y"}}')
    with pytest.raises(EvaluationError, match="broken"):
        opened(broken)
