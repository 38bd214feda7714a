"""Models of others, and folders of ours, as run folders that training goes on from."""

import json
import os
import re
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from sambalm.model.config import ModelConfig
from sambalm.model.hf.errors import HFError
from sambalm.model.hf.export import export_hf
from sambalm.model.hf.folder import INDEX_FILE, SINGLE_FILE, FolderState
from sambalm.model.hf.lit_gpt import LitGPTState
from sambalm.pretrain.checkpointing import from_hf, other_models
from sambalm.pretrain.checkpointing.format import checkpoint_folders, newest_checkpoint
from sambalm.pretrain.checkpointing.from_hf import MODEL_FILE, checkpoint_from_hf
from sambalm.pretrain.errors import CheckpointError
from tests.support.hf import DrawnState, RandomState, hf_model, random_tokens, tiny_config, training_model
from tests.support.lit_gpt import lit_gpt_logits, lit_gpt_weights
from tests.support.whole_runs import changed, train

SIZES = {"query_heads": 4, "kv_heads": 2}
LIT_GPT = partial(lit_gpt_weights, "M*M*", width=32, mlp_size=48, vocabulary=97)


def convert(source: Path, output: Path, *, query_heads: int | None = None, window: int | None = None) -> ModelConfig:
    seen: list[tuple[int, int | None]] = []
    config = checkpoint_from_hf(
        source, output, query_heads=query_heads, window=window, progress=lambda *now: seen.append(now)
    )
    assert seen[-1][0] == seen[-1][1]
    return config


def saved(config: ModelConfig, folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """A folder with random weights, as transformers saves it."""
    model = hf_model(config, RandomState(config)).to(dtype)
    model.save_pretrained(folder)
    return folder


def edit_config(folder: Path, **keys: object) -> None:
    content = json.loads((folder / "config.json").read_text())
    content = {key: value for key, value in (content | keys).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(content))


def edit_weights(folder: Path, change) -> None:
    weights = {name: tensor.clone() for name, tensor in load_file(folder / SINGLE_FILE).items()}  # which maps the file
    change(weights)
    save_file(weights, folder / SINGLE_FILE, {"format": "pt"})


def exported_weights(folder: Path) -> dict[str, Tensor]:
    files = set(json.loads((folder / INDEX_FILE).read_text())["weight_map"].values())
    return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}


def test_a_folder_comes_back_bit_by_bit(exported, documents, sentencepiece_model, tmp_path):
    folder, state, config = exported
    assert convert(folder, tmp_path / "run") == config
    checkpoint = newest_checkpoint(tmp_path / "run", warn=pytest.fail)
    assert (checkpoint.step, checkpoint.state["samples"]) == (0, 0)
    assert checkpoint.shapes() == state.shapes()
    again = tmp_path / "again"
    again.mkdir()
    export_hf(
        checkpoint,
        config,
        folder=again,
        tokenizer_model=sentencepiece_model,
        documents=documents[:5],
        dtype=torch.float32,
    )
    first, second = exported_weights(folder), exported_weights(again)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name].view(torch.int32), second[name].view(torch.int32)) for name in first)


def test_the_moments_are_zero_and_nothing_else_is_in_the_folder(tmp_path):
    convert(saved(tiny_config(), tmp_path / "hf"), tmp_path / "run")
    (folder,) = checkpoint_folders(tmp_path / "run")
    (shard,) = folder.glob("*.safetensors")
    stored = load_file(shard)
    shapes = newest_checkpoint(folder, warn=pytest.fail).shapes()
    assert set(stored) == {f"{kind}.{name}" for kind in ("model", "exp_avg", "exp_avg_sq") for name in shapes}
    assert all(tensor.dtype == torch.float32 for tensor in stored.values())
    assert not any(tensor.any() for name, tensor in stored.items() if not name.startswith("model."))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]
    left = {path.name for path in (tmp_path / "run").iterdir()} - {"saved.json"}
    assert left == {"checkpoints", MODEL_FILE}


def test_one_tensor_is_in_memory_at_a_time(monkeypatch, tmp_path):
    """While the weights are written, which is before the models are compared block by block."""
    read, write, alive, most = FolderState.read, from_hf.write_shard, [], []

    def watched_read(self, name):
        most.append(sum(one() is not None for one in alive))
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        return tensor

    def watched_write(path, slices):
        monkeypatch.setattr(FolderState, "read", watched_read)
        found = write(path, slices)
        monkeypatch.setattr(FolderState, "read", read)
        return found

    monkeypatch.setattr(from_hf, "write_shard", watched_write)
    convert(saved(tiny_config(), tmp_path / "hf"), tmp_path / "run")
    assert len(most) == len(RandomState(tiny_config()).tensors)
    assert max(most) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_exactly(dtype, tmp_path):
    config = tiny_config("M-*-*M-", tie_embeddings=False)
    convert(saved(config, tmp_path / "hf", dtype=dtype), tmp_path / "run")
    checkpoint, state = newest_checkpoint(tmp_path / "run", warn=pytest.fail), RandomState(config)
    for name, tensor in state.tensors.items():
        assert torch.equal(checkpoint.read(name), tensor.to(dtype).float()), name


def test_a_folder_of_flash_linear_attention(tmp_path):
    """Its config.json has neither a pattern nor an MLP width."""
    config = tiny_config("M-*-M-*-", mlp_size=256, tie_embeddings=False)
    folder = saved(config, tmp_path / "hf")
    ours = dict.fromkeys(("pattern", "mlp_size", "layer_types", "sliding_window", "num_layers", "extensions"))
    ours |= {"training_sequence_tokens": None, "hidden_ratio": 4, "fuse_norm": True, "rescale_prenorm_residual": False}
    attn = {"layers": [1, 3], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": False, "window_size": 8, "rope_theta": 1e4}
    edit_config(folder, attn=attn, max_position_embeddings=2048, **ours)
    assert convert(folder, tmp_path / "run") == config
    checkpoint, state = newest_checkpoint(tmp_path / "run", warn=pytest.fail), RandomState(config)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in state.tensors.items())


@pytest.mark.parametrize(("kv_heads", "tied"), [(4, True), (2, False), (1, True)])
def test_a_file_of_the_reference_gives_its_logits(kv_heads, tied, tmp_path):
    weights = LIT_GPT(query_heads=4, kv_heads=kv_heads, tied=tied)
    torch.save({"model": weights, "optimizer": {"state": {}}, "hparams": {"nodes": 1}}, tmp_path / "iter.pth")
    config = convert(tmp_path / "iter.pth", tmp_path / "run", query_heads=4, window=8)
    assert (config.pattern, config.num_kv_heads, config.tie_embeddings) == ("M-*-M-*-", kv_heads, tied)
    tokens = random_tokens(2, 40)
    model = training_model(config, newest_checkpoint(tmp_path / "run", warn=pytest.fail)).double()
    doubles = {name: tensor.double() for name, tensor in weights.items()}
    expected = lit_gpt_logits(doubles, tokens, query_heads=4, kv_heads=kv_heads, window=8)
    with torch.no_grad():
        given = model(tokens)
    assert (given.view_as(expected) - expected).abs().max() < 2e-4
    other = lit_gpt_logits(doubles, tokens, query_heads=4, kv_heads=kv_heads, window=9)
    assert (given.view_as(expected) - other).abs().max() > 1e-2


def test_a_model_that_the_reference_names_needs_no_sizes(tmp_path):
    weights = lit_gpt_weights("M*", width=48, query_heads=6, kv_heads=1, mlp_size=32, vocabulary=97)
    wrapped = {f"_forward_module._orig_mod.{name}": tensor for name, tensor in weights.items()}
    torch.save({"model": wrapped, "hparams": {"model_name": "Samba_421M_mqa6"}}, tmp_path / "iter.pth")
    config = convert(tmp_path / "iter.pth", tmp_path / "run")
    assert (config.num_query_heads, config.num_kv_heads, config.window, config.dt_rank) == (6, 1, 2048, None)
    given = LitGPTState(tmp_path / "iter.pth", window=7).config
    assert (given.num_query_heads, given.window) == (6, 7)


def test_a_file_without_attention_needs_no_sizes_and_tells_those_of_mamba(tmp_path):
    weights = lit_gpt_weights("M", width=48, query_heads=6, kv_heads=1, mlp_size=32, vocabulary=97)
    conv = "transformer.h.0.attn.conv1d.weight"
    torch.save(weights | {conv: weights[conv][..., :3]}, tmp_path / "iter.pth")
    config = LitGPTState(tmp_path / "iter.pth").config
    assert (config.num_query_heads, config.window, config.d_conv) == (1, 1, 3)
    config = LitGPTState(tmp_path / "iter.pth", query_heads=3, window=7).config
    assert (config.num_query_heads, config.window) == (3, 7)


class Evil:
    """An object whose unpickling would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_of_a_pickle_is_executed(tmp_path):
    weights = LIT_GPT(**SIZES)
    torch.save({"model": weights, "hparams": Evil(tmp_path / "made")}, tmp_path / "evil.pth")
    with pytest.raises(HFError, match=r"evil\.pth holds more than tensors and plain values"):
        convert(tmp_path / "evil.pth", tmp_path / "run", query_heads=4, window=8)
    assert [path.name for path in tmp_path.iterdir()] == ["evil.pth"]


def renamed(old: str, new: str):
    return lambda weights: weights.update({new: weights.pop(old)})


def replaced(name: str, make):
    return lambda weights: weights.update({name: make(weights[name])})


PLACE = "transformer.h.0."
PTH_REFUSALS = {
    "missing": (lambda w: w.pop("transformer.ln_f.weight"), {}, "lacks tensor transformer.ln_f.weight"),
    "unknown": (renamed(f"{PLACE}norm_1.weight", f"{PLACE}norm_3.weight"), {}, "lacks tensor transformer.h.0.norm_1"),
    "extra": (lambda w: w.update({"transformer.x": torch.ones(1)}), {}, "has an unknown tensor transformer.x"),
    "shape": (replaced(f"{PLACE}attn.D", lambda t: t[:-1]), {}, "attn.D in .* has shape .63,. where its model has .64"),
    "odd heads": (lambda w: None, {"query_heads": 5}, "make no model .* check the number of query heads"),
    "other mixers": (renamed(f"{PLACE}attn.A_log", f"{PLACE}attn.g_proj"), {}, "transformer.h.0 in .* is not a Samba"),
    "other names": (lambda w: [w.pop(n) for n in list(w) if ".h." in n], {}, "holds no Samba model by lit-gpt's names"),
    "integers": (replaced(f"{PLACE}attn.D", lambda t: t.int()), {}, "is torch.int32: only fp32, bf16 and fp16"),
    "no sizes": (lambda w: None, {"query_heads": None, "window": None}, "give --query-heads and --window"),
    "not a number": (replaced("transformer.ln_f.weight", lambda t: t * torch.nan), {}, "logits differ by nan"),
}


@pytest.mark.parametrize(("change", "sizes", "sentence"), PTH_REFUSALS.values(), ids=PTH_REFUSALS)
def test_a_file_that_is_no_samba_is_refused(change, sizes, sentence, tmp_path):
    weights = LIT_GPT(**SIZES)
    change(weights)
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(HFError, match=sentence) as refusal:
        convert(tmp_path / "w.pth", tmp_path / "run", **{"query_heads": 4, "window": 8} | sizes)
    assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]


@pytest.mark.parametrize("kept", [0, 10, 0.5])
def test_a_damaged_file_is_refused(kept, tmp_path):
    torch.save(LIT_GPT(**SIZES), tmp_path / "w.pth")
    content = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "w.pth").write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(HFError, match=r"w\.pth (cannot be read|holds more)"):
        convert(tmp_path / "w.pth", tmp_path / "run", query_heads=4, window=8)


HEAD, NORM = "backbone.layers.0.mixer.in_proj.weight", "backbone.norm_f.weight"
FOLDER_REFUSALS = {
    "missing": (lambda f: edit_weights(f, lambda w: w.pop(NORM)), f"lacks tensor {NORM}"),
    "unknown": (lambda f: edit_weights(f, lambda w: w.update({"x": torch.ones(1)})), "has an unknown tensor x"),
    "shape": (
        lambda f: edit_weights(f, replaced(NORM, lambda t: t[:-1].contiguous())),
        f"tensor {NORM} in .* has shape .31,. where config.json makes it .32,.",
    ),
    "an odd row": (
        lambda f: edit_weights(f, replaced(HEAD, lambda t: torch.cat((t, t[:1])))),
        f"tensor {HEAD} in .* has shape .129, 32. where config.json makes it .128, 32.",
    ),
    "dtype": (lambda f: edit_weights(f, replaced(NORM, lambda t: t.double())), "is F64: only fp32, bf16 and fp16"),
    "damaged": (
        lambda f: (f / SINGLE_FILE).write_bytes((f / SINGLE_FILE).read_bytes()[:-100]),
        "cannot be read .*export or download",
    ),
    "architecture": (lambda f: edit_config(f, model_type="jamba"), "model_type 'jamba', but .* only 'samba'"),
    "bias": (lambda f: edit_config(f, use_bias=True), "use_bias"),
    "not a number": (lambda f: edit_weights(f, replaced(NORM, lambda t: t * torch.nan)), "logits differ by nan"),
    "other sizes": (lambda f: edit_config(f, state_size=8), "has shape .* where config.json makes it"),
}


@pytest.mark.parametrize(("change", "sentence"), FOLDER_REFUSALS.values(), ids=FOLDER_REFUSALS)
def test_a_folder_that_does_not_fit_is_refused(change, sentence, tmp_path):
    folder = saved(tiny_config(), tmp_path / "hf")
    change(folder)
    with pytest.raises(HFError, match=sentence) as refusal:
        convert(folder, tmp_path / "run")
    assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_full_attention_is_refused(tmp_path):
    folder = saved(tiny_config(), tmp_path / "hf")
    attn = json.loads((folder / "config.json").read_text())["attn"] | {"window_size": None}
    edit_config(folder, attn=attn, sliding_window=None)
    with pytest.raises(HFError, match=r"cannot be trained here: model\.window is None"):
        convert(folder, tmp_path / "run")


def test_what_is_no_source_and_what_is_no_output(tmp_path):
    with pytest.raises(HFError, match=r"missing does not exist: give a Hugging Face folder or a \.pth file"):
        convert(tmp_path / "missing", tmp_path / "run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(HFError, match=r"empty has no config\.json"):
        convert(tmp_path / "empty", tmp_path / "run")
    folder = saved(tiny_config(), tmp_path / "hf")
    with pytest.raises(HFError, match=r"--query-heads and --window are for \.pth files"):
        convert(folder, tmp_path / "run", window=8)
    with pytest.raises(HFError, match=r"empty exists: choose another run folder"):
        convert(folder, tmp_path / "empty")
    with pytest.raises(HFError, match=r"cannot write .*run"):
        convert(folder, folder / SINGLE_FILE / "run")


@pytest.mark.parametrize("key", ["model.layers.2.mixer.qkv_proj.k.weight", "exp_avg.final_norm.weight"])
def test_what_was_not_stored_as_it_is_never_appears(key, monkeypatch, tmp_path):
    write = from_hf.write_shard

    def spoil(path, slices):
        found = write(path, slices)
        stored = {name: tensor.clone() for name, tensor in load_file(path).items()}  # which maps the file
        stored[key][0] += 1
        write(path, [from_hf.UnreadTensor(s.name, s.shape, lambda s=s: stored[s.name]) for s in slices])
        return found

    monkeypatch.setattr(from_hf, "write_shard", spoil)
    folder = saved(tiny_config(), tmp_path / "hf")
    with pytest.raises(CheckpointError, match="has changed since it was saved"):
        convert(folder, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_weights_that_were_read_differently_never_appear(monkeypatch, tmp_path):
    """The mapping is held against the source a second time, after the checksums."""
    shard = from_hf.write_shard

    def exchange(path, slices):
        names = [piece.name for piece in slices]
        k, v = (names.index(f"model.layers.2.mixer.qkv_proj.{one}.weight") for one in "kv")
        slices[k], slices[v] = (
            from_hf.UnreadTensor(a.name, a.shape, b.read) for a, b in ((slices[k], slices[v]), (slices[v], slices[k]))
        )
        return shard(path, slices)

    monkeypatch.setattr(from_hf, "write_shard", exchange)
    with pytest.raises(HFError, match=r"qkv_proj\.[kv]\.weight was not stored as it is"):
        convert(saved(tiny_config(), tmp_path / "hf"), tmp_path / "run")


def test_logits_of_another_model_are_refused(monkeypatch, tmp_path):
    """The weights are right, and the model that the checkpoint says is not the folder's."""
    original = other_models.model_config
    monkeypatch.setattr(
        other_models, "model_config", lambda hf: original(hf).model_copy(update={"window": 5, "rope_base": 9e3})
    )
    with pytest.raises(HFError, match="the training model's logits differ by"):
        convert(saved(tiny_config(), tmp_path / "hf"), tmp_path / "run")


@pytest.mark.slow
def test_training_goes_on_from_a_converted_model_on_any_layout(run_values, tmp_path):
    """With the initial weights of a run as the model, the converted one trains as that run does, bit by bit."""
    config = ModelConfig(**run_values["model"])
    hf_model(config, DrawnState(config, seed=run_values["run"]["seed"])).save_pretrained(tmp_path / "hf")
    fresh = train(run_values)
    for name in ("alone", "two"):
        convert(tmp_path / "hf", tmp_path / name)
    section = yaml.safe_load((tmp_path / "alone" / MODEL_FILE).read_text())
    values = run_values | section
    alone = train(changed(values, run={"dir": str(tmp_path / "alone")}))
    assert alone == fresh
    two = train(changed(values, run={"dir": str(tmp_path / "two")}, parallel={"tensor": 2}), ranks=2)
    assert [record["step"] for record in two] == [record["step"] for record in fresh]
    for ours, theirs in zip(two, alone, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_the_model_section_says_what_it_is_for(tmp_path):
    config = convert(saved(tiny_config("M-*-M-", rope_base=5e4), tmp_path / "hf"), tmp_path / "run")
    text = (tmp_path / "run" / MODEL_FILE).read_text()
    assert re.match(r"# The section `model` .* those of hf:\n# sambalm train CONFIG run\.dir=", text)
    assert ModelConfig(**yaml.safe_load(text)["model"]) == config
