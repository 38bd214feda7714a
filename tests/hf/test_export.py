"""Exported folders: complete, verified, and absent when anything is wrong."""

import json
import os
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from sambalm.model.hf import HFError, SambaForCausalLM, load_for_generation
from sambalm.model.hf import export as export_module
from sambalm.model.hf import tokenizer as tokenizer_module
from sambalm.model.hf.export import export_hf, plan_shards
from sambalm.model.hf.folder import INDEX_FILE, FolderState
from sambalm.model.hf.generate import load_config, load_model
from sambalm.model.hf.verify import verify_export
from sambalm.pretrain.checkpointing.to_hf import new_hf_folder, size_bytes
from tests.support.hf import RandomState, hf_model, tiny_config
from tests.support.power_loss import assert_lasts, noted_operations

FP32_LEAVES = ("A_log", "D", "dt_proj.bias")


@pytest.fixture
def export(tmp_path, sentencepiece_model, documents):
    """Exports a tiny model (or the given state and configuration) into tmp_path/out."""

    def run(state=None, config=None, **options):
        config = config or tiny_config("M-*-", vocab_size=1200)
        state = state or RandomState(config)
        output, overwrite = options.pop("output", tmp_path / "out"), options.pop("overwrite", False)
        defaults = {"tokenizer_model": sentencepiece_model, "documents": documents[:3]}
        with new_hf_folder(output, overwrite=overwrite) as folder:
            export_hf(state, config, folder=folder, **defaults | options)
        return tmp_path / "out", state, config

    return run


def stored(folder) -> dict[str, tuple[str, torch.Tensor]]:
    """File and tensor of each name, by the shards' own headers."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118
                assert name not in found
                found[name] = (path.name, file.get_tensor(name))
    return found


def read_back(folder, name: str) -> torch.Tensor:
    return FolderState(folder, load_config(folder)).read(name)


def test_the_index_is_that_of_the_shards(exported):
    folder, _, _ = exported
    tensors = stored(folder)
    index = json.loads((folder / INDEX_FILE).read_text())
    assert index["weight_map"] == {name: file for name, (file, _) in tensors.items()}
    assert index["metadata"]["total_size"] == sum(t.numel() * t.itemsize for _, t in tensors.values())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 2
    sizes = [sum(t.numel() * t.itemsize for f, t in tensors.values() if f == file) for file in files]
    assert max(sizes[1:]) <= 120_000 < sizes[0]  # the embedding alone is larger than a file may be


def test_plan_of_the_shards():
    sizes = {"a": 5, "b": 5, "c": 1, "d": 20, "e": 1}
    assert plan_shards(sizes, max_shard_bytes=10) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert plan_shards({"a": 4, "b": 3, "c": 3, "d": 2}, max_shard_bytes=6) == [["a"], ["b", "c"], ["d"]]
    assert plan_shards(sizes, max_shard_bytes=100) == [["a", "b", "c", "d", "e"]]


def test_weights_come_back_bit_by_bit(exported):
    folder, state, _ = exported
    back = FolderState(folder, load_config(folder))
    assert back.shapes() == state.shapes()
    for name, tensor in state.tensors.items():
        assert torch.equal(back.read(name), tensor), name


def test_a_folder_that_transformers_saved_is_read_too(tmp_path):
    config = tiny_config("M-*-", tie_embeddings=False)
    state = RandomState(config)
    hf_model(config, state).save_pretrained(tmp_path)
    back = FolderState(tmp_path, load_config(tmp_path))
    assert all(torch.equal(back.read(name), tensor) for name, tensor in state.tensors.items())


def test_what_the_folder_says(exported):
    folder, state, config = exported
    keys = json.loads((folder / "config.json").read_text())
    assert keys["auto_map"]["AutoModelForCausalLM"] == "modeling_samba.SambaForCausalLM"
    assert keys["architectures"] == ["SambaForCausalLM"]
    assert (keys["dtype"], keys["training_sequence_tokens"], keys["hidden_act"]) == ("float32", 64, "swish")
    assert load_config(folder).max_position_embeddings == 2**20
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    card = (folder / "README.md").read_text()
    parameters = sum(tensor.numel() for tensor in state.tensors.values())
    for fact in (f"parameters: {parameters:,}", "tokens seen: 123,456", "3.2500", "peak lr: 4e-4", config.pattern):
        assert fact in card


def test_bf16_but_for_the_decay_and_the_step_bias(export):
    folder, state, config = export(dtype=torch.bfloat16)
    for name, (_, tensor) in stored(folder).items():
        expected = torch.float32 if name.endswith(FP32_LEAVES) else torch.bfloat16
        assert tensor.dtype == expected, name
    assert torch.equal(read_back(folder, "layers.0.mixer.A_log"), state.read("layers.0.mixer.A_log"))
    model, _ = load_for_generation(folder)
    assert model.dtype == torch.bfloat16
    assert model.backbone.layers[0].mixer.A_log.dtype == torch.float32
    assert config.pattern in (folder / "README.md").read_text()


def test_fp16_but_for_the_decay_and_the_step_bias(export):
    folder, state, _ = export(dtype=torch.float16)
    tensors = {name: tensor for name, (_, tensor) in stored(folder).items()}
    fp32 = {name for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    assert {name.split(".mixer.")[1] for name in fp32} == {"A_log", "D", "dt_proj.bias"}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16, torch.float32}
    expected = state.read("final_norm.weight").half()
    assert torch.equal(tensors["backbone.norm_f.weight"], expected)


def test_a_weight_beyond_fp16_is_refused(export, tmp_path):
    state = RandomState(tiny_config("M-*-", vocab_size=1200))
    state.tensors["layers.2.mixer.o_proj.weight"][3, 4] = 70_000
    with pytest.raises(HFError, match=r"o_proj\.weight holds values beyond fp16's 65504: export it as bf16"):
        export(state, dtype=torch.float16)
    assert leaves_nothing(tmp_path)
    export(state, dtype=torch.bfloat16)


TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def test_a_chat_template_is_part_of_the_folder(export):
    """Its control tokens are taken for what they name; plain text gives the ids of training all the same."""
    folder, _, _ = export(chat_template=TEMPLATE)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "def main("}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.bos_token_id != tokenizer.eos_token_id
    assert (ids[0], ids.count(tokenizer.bos_token_id), ids.count(tokenizer.eos_token_id)) == (
        tokenizer.bos_token_id,
        2,
        1,
    )


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{% for m in messages %}", "chat template cannot be applied"),
        ("{{ raise_exception('no users') }}", "chat template cannot be applied .*no users"),
        ("hello", "leaves out what a user says"),
    ],
)
def test_a_chat_template_that_does_not_render_is_refused(template, sentence, export, tmp_path):
    with pytest.raises(HFError, match=sentence):
        export(chat_template=template)
    assert leaves_nothing(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"), [("5GB", 5e9), ("500 mb", 5e8), ("1.5GiB", 1.5 * 2**30), ("64B", 64), ("2TiB", 2**41)]
)
def test_sizes_of_shards(text, expected):
    assert size_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "5", "0GB", "-1GB", "5 gigabytes", "1e9B"])
def test_what_is_no_size(text):
    with pytest.raises(HFError, match="is no size: give one as 5GB"):
        size_bytes(text)


@pytest.mark.parametrize("pattern", ["M", "--M*", "MM*--"])
def test_other_patterns_untied(export, pattern):
    folder, _, _ = export(config=tiny_config(pattern, vocab_size=1300, tie_embeddings=False))
    model, tokenizer = load_for_generation(folder)
    inputs = tokenizer(["def f(", "import"], padding=True, return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3, min_new_tokens=3).shape[1] == inputs.input_ids.shape[1] + 3
    assert "cannot load this folder" in (folder / "README.md").read_text()


class OnceDifferent(RandomState):
    """Every tensor reads right the first time; one value of `target` is different afterwards."""

    target, change = "layers.2.mixer.qkv_proj.k.weight", 0.5

    def read(self, name):
        tensor = super().read(name)
        if name == self.target:
            self.tensors[name].view(-1)[7] += self.change
        return tensor


def leaves_nothing(tmp_path) -> bool:
    return not list(tmp_path.iterdir())


def test_a_corrupted_weight_is_refused(export, tmp_path):
    config = tiny_config("M-*-", vocab_size=1200)
    with pytest.raises(HFError, match=r"layers\.2\.mixer\.qkv_proj\.k\.weight"):
        export(OnceDifferent(config), config)
    assert leaves_nothing(tmp_path)
    unchanged = OnceDifferent(config)
    unchanged.change = 0.0
    export(unchanged, config)


@pytest.mark.parametrize(("key", "value"), [("rope_theta", 9000.0), ("window_size", 7)])
def test_different_logits_are_refused(export, monkeypatch, tmp_path, key, value):
    """The weights are right here, and only the model built of them is not."""
    write = export_module._write_config

    def write_wrong(folder, hf, tokens):
        hf.attn = hf.attn | {key: value}
        write(folder, hf, tokens)

    monkeypatch.setattr(export_module, "_write_config", write_wrong)
    with pytest.raises(HFError, match="logits of the exported model differ"):
        export()
    assert leaves_nothing(tmp_path)


def test_a_corrupted_merge_is_refused(export, monkeypatch, tmp_path):
    merges = tokenizer_module._merges
    monkeypatch.setattr(tokenizer_module, "_merges", lambda *args: merges(*args)[3:])
    with pytest.raises(HFError, match="differs from"):
        export()
    assert leaves_nothing(tmp_path)


def test_not_a_number_is_refused(export):
    config = tiny_config("M-*-", vocab_size=1200)
    state = RandomState(config)
    state.tensors["final_norm.weight"][3] = float("nan")
    with pytest.raises(HFError, match=r"final_norm\.weight"):
        export(state, config)
    state.tensors["final_norm.weight"] = torch.full_like(state.tensors["final_norm.weight"], 3e38)
    with pytest.raises(HFError, match=r"logits of the exported model differ .* by nan"):  # both models' overflow
        export(state, config)


def test_verification_alone(exported, documents, sentencepiece_model):
    folder, state, config = exported
    assert verify_export(folder, state, config, documents[:3], sentencepiece_model) < 2e-5
    with pytest.raises(HFError, match="give at least 32"):
        verify_export(folder, state, config, ["short"], sentencepiece_model)


def test_an_existing_folder_is_kept_unless_told_otherwise(export, tmp_path):
    folder, _, config = export()
    with pytest.raises(HFError, match="not empty"):
        export()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(HFError, match=r"also holds notes\.txt, which is no file of a model"):
        export(config=config, overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "notes.txt").unlink()
    (folder / "stale.json").touch()
    other = RandomState(config, seed=9)
    export(other, config, overwrite=True)
    assert not (folder / "stale.json").exists()
    assert torch.equal(read_back(folder, "final_norm.weight"), other.read("final_norm.weight"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_export_keeps_the_folder_that_it_was_to_replace(export, tmp_path):
    folder, state, config = export()
    with pytest.raises(HFError):
        export(OnceDifferent(config), config, overwrite=True)
    assert torch.equal(read_back(folder, "final_norm.weight"), state.read("final_norm.weight"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_new_folder_survives_a_power_loss(tmp_path, monkeypatch):
    calls = noted_operations(monkeypatch)
    with new_hf_folder(tmp_path / "out", overwrite=False) as folder:
        (folder / "config.json").write_text("{}")
    assert_lasts(calls, tmp_path / "out", parts=["config.json"])


def test_a_folder_that_cannot_be_renamed_leaves_the_old_one_in_its_place(tmp_path, monkeypatch):
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text('{"model_type": "samba", "is": "old"}')
    rename = os.rename

    def refuse(source, target):
        if Path(source).suffix == ".tmp":
            raise OSError("no more inodes")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(HFError, match=r"cannot write .*no more inodes"), new_hf_folder(output, overwrite=True):
        pass
    assert "old" in (output / "config.json").read_text()
    assert list(tmp_path.iterdir()) == [output]


def test_a_folder_of_something_else_is_never_replaced(export, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(HFError, match="something else than a Samba folder"):
        export(overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_an_output_that_cannot_be_written(export, tmp_path):
    (tmp_path / "file").touch()
    for output, message in ((tmp_path / "file", "something else"), (tmp_path / "file" / "out", "cannot write")):
        with pytest.raises(HFError, match=message):
            export(output=output)


def test_an_error_of_the_checkpoint_is_not_the_outputs(export, tmp_path):
    class Unreadable(RandomState):
        def read(self, name):
            raise FileNotFoundError(2, "No such file", "/checkpoint/shard")

    config = tiny_config("M-*-", vocab_size=1200)
    with pytest.raises(FileNotFoundError):
        export(Unreadable(config), config)
    assert leaves_nothing(tmp_path)


def test_an_empty_folder_is_filled_and_progress_reported(export, tmp_path):
    (tmp_path / "out").mkdir()
    seen = []
    folder, _, _ = export(progress=lambda done, total: seen.append((done, total)))
    total = json.loads((folder / INDEX_FILE).read_text())["metadata"]["total_size"]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (total, total)


def test_unfit_arguments_are_refused(export, tmp_path):
    config = tiny_config("M-*-", vocab_size=1200)
    with pytest.raises(HFError, match="float64"):
        export(dtype=torch.float64)
    with pytest.raises(HFError, match="1200 pieces"):
        export(config=tiny_config("M-*-", vocab_size=1100))
    with pytest.raises(HFError, match=r"lacks tensor layers\.4"):
        export(RandomState(config), tiny_config("M-*-M", vocab_size=1200))
    with pytest.raises(HFError, match=r"unknown tensor layers\.3"):
        export(RandomState(config), tiny_config("M-*", vocab_size=1200))
    assert leaves_nothing(tmp_path)


def test_one_tensor_at_a_time(export):
    """No tensor that was read is still alive when the next is."""
    alive = []

    class Watched(RandomState):
        def read(self, name):
            tensor = super().read(name)
            assert sum(reference() is not None for reference in alive) <= 1
            alive.append(weakref.ref(tensor))
            return tensor

    config = tiny_config("M-*-", vocab_size=1200)
    export(Watched(config), config)
    assert len(alive) >= 3 * len(RandomState(config).tensors)


def test_folders_that_cannot_be_loaded(exported, tmp_path, sentencepiece_model):
    folder = exported[0]
    with pytest.raises(HFError, match=r"no config\.json"):
        load_for_generation(tmp_path)

    def broken(name: str):
        return shutil.copytree(folder, tmp_path / name)

    other = broken("other type")
    (other / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(HFError, match="model_type 'llama'"):
        load_for_generation(other)
    (other / "config.json").write_text("{")
    with pytest.raises(HFError, match="cannot be read"):
        load_for_generation(other)
    wrong = broken("contradiction")
    keys = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps(keys | {"num_hidden_layers": 7}))
    with pytest.raises(HFError, match="num_hidden_layers is 7"):
        load_for_generation(wrong)
    (wrong / "config.json").write_text(json.dumps(keys | {"mlp_size": 512, "hidden_ratio": None}))
    with pytest.raises(HFError, match="cannot be loaded"):
        load_for_generation(wrong)
    (wrong / "config.json").write_text(json.dumps(keys | {"tie_word_embeddings": False}))
    with pytest.raises(HFError, match=r"lack lm_head\.weight"):
        load_for_generation(wrong)
    with pytest.raises(HFError, match=r"lacks tensor lm_head\.weight"):
        FolderState(wrong, load_config(wrong))
    other = broken("other weights")
    shard, index = sorted(other.glob("*.safetensors"))[0], json.loads((other / INDEX_FILE).read_text())
    save_file(load_file(shard) | {"backbone.more.weight": torch.ones(1)}, shard, {"format": "pt"})
    index["weight_map"]["backbone.more.weight"] = shard.name
    (other / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(HFError, match=r"have an unknown backbone\.more\.weight"):
        load_for_generation(other)
    truncated = broken("truncated")
    shard = sorted(truncated.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-50])
    with pytest.raises(HFError, match="cannot be loaded"):
        load_for_generation(truncated)
    for path in truncated.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(HFError, match=r"neither model\.safetensors\.index\.json nor"):
        load_for_generation(truncated)
    silent = broken("no tokenizer")
    (silent / "tokenizer.json").unlink()
    with pytest.raises(HFError, match=r"no tokenizer\.json"):
        load_for_generation(silent)


def test_weights_saved_by_this_packages_class_refer_to_no_code(exported, tmp_path):
    load_model(exported[0]).save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    assert not list(tmp_path.glob("*.py"))
    SambaForCausalLM.from_pretrained(tmp_path)
