"""Models behind one interface: scores, greedy text and tokenizers are those of transformers on the same folder."""

import json
import shutil

import pytest
import sentencepiece
import tokenizers
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from sambalm.evaluation.errors import EvaluationError
from sambalm.evaluation.models import causal_lm, folder_tokenizer, loading
from sambalm.evaluation.models.base import greedy
from sambalm.evaluation.models.loading import open_model
from sambalm.model.hf import stream
from sambalm.model.hf.errors import HFError
from sambalm.model.hf.tokenizer import save_tokenizer
from sambalm.pretrain.errors import CheckpointError
from sambalm.pretrain.generation.errors import GenerationError
from tests.conftest import VOCAB_SIZE
from tests.evaluation import oracle
from tests.evaluation.oracle import Oracle
from tests.support.data import make_texts

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
    assert not is_likeliest[:, 0].any()
    torch.testing.assert_close(scores[:, 1:], expected, atol=2e-5, rtol=2e-5)
    assert told == ([40] if kind == "mamba" else [14, 14, 12])  # tokens of both rows in pieces of 7
    model.new_reader(2).read(ids[:, :20], progress=told.append)
    assert told == told[: len(told) // 2] * 2
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


def test_pieces_are_so_short_that_their_logits_fit(hf_folders, monkeypatch):
    reader, told = opened(hf_folders["llama"]).new_reader(2), []
    for logit_bytes in (4 * 2 * VOCAB_SIZE * 5, 1):
        monkeypatch.setattr(causal_lm, "_LOGIT_BYTES", logit_bytes)
        reader.read(ids_of(2, 10), progress=told.append)
    assert told == [10, 10] + [2] * 10


def test_greedy_text_takes_no_more_steps_than_its_longest_row(tokenizer, hf_folders, monkeypatch):
    said = {"a": " one", "b": " one two three"}
    model, stepped, step = Oracle(tokenizer, said.get), [], oracle._Reader.step

    def counted(self, ids):
        stepped.append(ids)
        return step(self, ids)

    monkeypatch.setattr(oracle._Reader, "step", counted)
    prompts = torch.tensor([model.encode("a"), model.encode("b")])
    expected = [model.encode_next(said[text]) for text in "ab"]
    assert greedy(model, prompts, max_new_tokens=50) == expected
    assert len(stepped) == len(expected[1])
    stepped.clear()
    assert greedy(model, prompts, max_new_tokens=2) == [ids[:2] for ids in expected]
    assert len(stepped) == 1
    assert len(greedy(opened(hf_folders["gpt2"]), ids_of(1, 60), max_new_tokens=5)[0]) <= 5  # of 64 positions


def test_learned_positions_are_those_of_a_table():
    """OPT's has two more; a table of words may have as many rows as there are positions."""
    import transformers as hf

    ends = {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": 96, "num_hidden_layers": 1}
    heads = {"hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 32}
    opt = hf.OPTForCausalLM(hf.OPTConfig(**ends, **heads, ffn_dim=16, word_embed_proj_dim=16))
    gpt2 = hf.GPT2LMHeadModel(hf.GPT2Config(**ends, n_embd=16, n_head=2, n_positions=32))
    llama = hf.LlamaForCausalLM(hf.LlamaConfig(**ends, **heads | {"max_position_embeddings": 96}, intermediate_size=16))
    assert [causal_lm._learned_positions(model) for model in (opt, gpt2, llama)] == [32, 32, None]


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
    assert (model.eos_ids, model.end_id, model.max_tokens) == ({2}, 2, None)
    assert (model.begin_ids, model.begin_id, model.vocab_size) == ([], 1, VOCAB_SIZE)
    assert model.decode(model.encode("é")[:-1]).endswith("\ufffd")  # half of a character
    own = opened(hf_folders[kind], tokenizer=tokens.parent / "tokenizer.model")
    assert own.encode(TEXT) == ids
    assert own.tokenizer_hash() == model.tokenizer_hash()
    assert (own.begin_ids, own.begin_id, own.end_id) == ([], 1, 2)
    assert own.eos_ids >= {2}


@pytest.mark.parametrize(
    ("kind", "ends", "found"),
    [("samba", [7, 2], {2, 7}), ("llama", [7], {2, 7}), ("llama", 7, {2, 7}), ("llama", None, {2})],
)
def test_of_several_ends_of_a_text_documents_have_the_first(kind, ends, found, hf_folders, tmp_path):
    folder = tmp_path / kind
    shutil.copytree(hf_folders[kind], folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": ends}))
    model = opened(folder)
    assert (model.eos_ids, model.end_id) == (found, 2)


def test_a_tokenizer_is_told_by_texts_of_many_kinds(tokenizer, monkeypatch):
    model = Oracle(tokenizer, str)
    hashes, tokenize = {model.tokenizer_hash()}, model.tokenize
    parts = ("grass", "\n", "12345", "def f", "    ", "**", "\u00e9", "\u6f22", "\U0001f600", "\t", "<s>")
    for part in parts:
        monkeypatch.setattr(model, "tokenize", lambda text, part=part: tokenize(text.replace(part, "")))
        hashes.add(model.tokenizer_hash())
    assert len(hashes) == 1 + len(parts)


def test_ids_that_the_model_does_not_know_are_refused(tokenizer):
    model = Oracle(tokenizer, str)
    model.vocab_size = max(model.encode(TEXT)) + 1
    assert max(model.encode(TEXT)) == model.vocab_size - 1
    model.vocab_size -= 1
    with pytest.raises(EvaluationError, match=f"gives the id {model.vocab_size}, but oracle knows ids below"):
        model.encode(TEXT)


def test_a_text_that_joins_the_one_before_has_its_own_ids(tokenizer, monkeypatch):
    model = Oracle(tokenizer, str)
    monkeypatch.setattr(model, "tokenize", {"a": [5], "ab": [6], "b": [7]}.get)
    assert model.encode_next("b") == [7]


@pytest.mark.parametrize("kind", ["samba", "llama"])
@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>"])
def test_what_the_tokenizer_puts_before_a_text_stands_there_once(kind, template, hf_folders, tmp_path):
    folder = tmp_path / kind
    shutil.copytree(hf_folders[kind], folder)
    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    inner.save(str(folder / "tokenizer.json"))
    model, without = opened(folder), opened(hf_folders[kind])
    assert (model.begin_ids, without.begin_ids) == ([1], [])
    assert model.encode(TEXT) == without.encode(TEXT)
    assert model.encode_first(TEXT) == [1, *without.encode_first(TEXT)]
    assert model.encode_next(" is 12") == without.encode_next(" is 12")


@pytest.mark.parametrize("begin", [1, None])
def test_a_tokenizer_that_sentencepiece_alone_reads_is_taken(begin, tmp_path):
    path, options = tmp_path / "unigram.model", {"vocab_size": 300, "hard_vocab_limit": False}
    options |= {"bos_id": -1 if begin is None else begin, "eos_id": 2}
    with path.open("wb") as model:
        texts = iter(make_texts(100, seed=1))
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=texts, model_writer=model, **options)
    by_file = folder_tokenizer.folder_tokenizer(tmp_path, path)
    assert (by_file.begin_ids, by_file.begin_id, by_file.end_id) == ([], begin, 2)
    save_tokenizer(path, tmp_path)
    found = folder_tokenizer.folder_tokenizer(tmp_path, None)
    assert not (tmp_path / "tokenizer.json").exists()
    ids = sentencepiece.SentencePieceProcessor(model_file=str(path)).encode("stone river")
    assert (found.encode("stone river"), found.begin_ids, found.begin_id, found.end_id) == (ids, [], begin, 2)


@pytest.mark.parametrize("kind", ["samba", "llama"])
def test_what_follows_a_text_has_the_ids_that_it_has_there(kind, hf_folders):
    model = opened(hf_folders[kind])
    for following in (" is 12", "\nThe end", "\n\n  return"):
        assert model.encode("key") + model.encode_next(following) == model.encode(f"key{following}")


def test_results_say_which_weights_they_are_of(run_dir, hf_folders, tmp_path):
    model = opened(run_dir)
    assert (model.identity.step, model.identity.kind) == (6, "SambaForCausalLM")
    before = opened(run_dir, step=3).identity
    assert before.step == 3
    assert before.fingerprint != model.identity.fingerprint
    assert opened(hf_folders["samba"]).identity.step is None
    assert opened(hf_folders["llama"], dtype="bf16").identity.dtype == "bfloat16"
    assert opened(hf_folders["samba"], dtype="bf16").identity.dtype == "bfloat16"
    for kind in ("samba", "llama"):
        folder, reference = hf_folders[kind], AutoModelForCausalLM.from_pretrained(hf_folders[kind])
        identity = opened(folder).identity
        assert (identity.path, identity.kind) == (str(folder), type(reference).__name__)
        assert (identity.parameters, identity.dtype, identity.device) == (reference.num_parameters(), "float32", "cpu")
        shutil.copytree(folder, tmp_path / kind)
        assert (opened(tmp_path / kind).identity.fingerprint, len(identity.fingerprint)) == (identity.fingerprint, 64)
    assert open_model(run_dir, device="cpu", dtype=None, tokenizer=None).run.run.seed == 7


def test_a_model_of_few_positions_is_opened(tokens, tmp_path):
    """With fewer than are read to see whether it carries its state."""
    import transformers as hf

    sizes = {"vocab_size": VOCAB_SIZE, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 20}
    hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).save_pretrained(tmp_path)
    save_tokenizer(tokens.parent / "tokenizer.model", tmp_path)
    model = opened(tmp_path)
    assert (model.max_tokens, model.carries_state) == (20, True)


def test_what_cannot_be_opened_ends_in_a_sentence(run_dir, hf_folders, tokens, tmp_path, monkeypatch):
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
    reader.read(ids_of(1, 40))
    reader.read(ids_of(1, 24))  # all that there are positions for
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
    by_file = opened(broken, tokenizer=tokens.parent / "tokenizer.model")
    assert by_file.encode(TEXT) == opened(hf_folders["llama"]).encode(TEXT)
    (broken / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    with pytest.raises(EvaluationError, match=r"broken cannot be loaded \(it cannot be made a tokenizer.json\); give"):
        opened(broken)
    (broken / "tokenizer_config.json").unlink()
    (broken / "model.safetensors").unlink()
    shutil.copy(hf_folders["llama"] / "tokenizer.json", broken)
    with pytest.raises(EvaluationError, match=r"transformers cannot load a causal language model from .*broken"):
        opened(broken)
    (broken / "config.json").write_text('{"model_type": "of_code_in_its_folder", "auto_map": {"AutoConfig": "x.Y"}}')
    with pytest.raises(EvaluationError, match="broken"):
        opened(broken)
    for content in ("[]", "{no json"):
        (broken / "config.json").write_text(content)
        with pytest.raises(HFError, match=r"config.json"):
            opened(broken)

    def too_large(*words, **options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(loading, "CausalLM", too_large)
    with pytest.raises(EvaluationError, match="llama does not fit the memory of cpu; take another --device or --dt"):
        opened(hf_folders["llama"])


def test_of_a_library_s_message_the_first_line_is_told():
    assert folder_tokenizer.first_line(ValueError("\none \ntwo")) == "one"
    assert folder_tokenizer.first_line(ValueError()) == "ValueError"
