"""Runs that start from given weights: the same bits on every layout, and everything else as in any new run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sambalm.data_pipeline.shards import manifest_path
from sambalm.model.config import ModelConfig
from sambalm.pretrain.checkpointing.format import Checkpoint, newest_checkpoint
from sambalm.pretrain.checkpointing.from_hf import checkpoint_from_hf
from sambalm.pretrain.checkpointing.initial_weights import (
    check_started_from,
    described,
    find_initial_weights,
    tokenizers_of,
)
from sambalm.pretrain.config_file import parse_config
from sambalm.pretrain.errors import ConfigError
from sambalm.pretrain.reporting.run_data import read_runs
from tests.support.hf import DrawnState, RandomState, hf_model
from tests.support.lit_gpt import lit_gpt_weights
from tests.support.marks import slow_except
from tests.support.whole_runs import changed, run_dir, stopped_after, train
from tests.support.worlds import run_world

GROWN = 391  # tokens: no number of ranks shares them equally, and the new ones are not the last rank's alone
KINDS = ("checkpoint", "hf", "pth")


def save_hf(values: dict, folder: Path, state=None) -> Path:
    config = ModelConfig(**values["model"])
    hf_model(config, state or RandomState(config)).save_pretrained(folder)
    return folder


def save_checkpoint(hf: Path, run: Path) -> Path:
    checkpoint_from_hf(hf, run, query_heads=None, window=None, progress=lambda *_: None)
    return run


def save_pth(values: dict, path: Path) -> Path:
    model = values["model"]
    weights = lit_gpt_weights(
        "M*",
        width=model["hidden_size"],
        query_heads=model["num_query_heads"],
        kv_heads=model["num_kv_heads"],
        mlp_size=model["mlp_size"],
        vocabulary=model["vocab_size"],
    )
    torch.save({"model": weights}, path)
    return path


@pytest.fixture
def sources(run_values, tmp_path) -> dict[str, Path]:
    hf = save_hf(run_values, tmp_path / "given_hf")
    return {
        "checkpoint": save_checkpoint(hf, tmp_path / "given_run"),
        "hf": hf,
        "pth": save_pth(run_values, tmp_path / "given.pth"),
    }


def start_and_save(runs: list[dict]) -> None:
    """Starts each run and saves it before its first step."""
    from sambalm.model.registry import weight_copies
    from sambalm.parallel.groups import start_world
    from sambalm.pretrain.checkpointing.write import save_checkpoint
    from sambalm.pretrain.training import build_training

    configs = [parse_config(values, source="test") for values in runs]
    copies = weight_copies(configs[0].model, tensor_ranks=configs[0].parallel.tensor)
    with start_world(configs[0].parallel, copies=copies) as world:
        for config in configs:
            initial = world.of_main(lambda config=config: find_initial_weights(config))
            training = build_training(config, world=world, checkpoint=None, initial=initial)
            save_checkpoint(training.chunks, config=config, world=world, step=0, samples=0, data={})


def expected(source: Path, kind: str, values: dict, tmp_path: Path) -> Checkpoint:
    """The source by the way of `convert from-hf`, which its own tests hold against the source."""
    if kind == "checkpoint":
        return newest_checkpoint(source, warn=pytest.fail)
    model = values["model"]
    sizes = {"query_heads": model["num_query_heads"], "window": model["window"]} if kind == "pth" else {}
    run = tmp_path / f"converted_{kind}"
    if not run.exists():
        checkpoint_from_hf(source, run, **({"query_heads": None, "window": None} | sizes), progress=lambda *_: None)
    return newest_checkpoint(run, warn=pytest.fail)


LAYOUTS = {
    "alone": (1, {}),
    "TP2+SP": (2, {"tensor": 2, "sequence": True}),
    "PP2": (2, {"pipeline": 2}),
    "CP2": (2, {"context": 2}),
    "DP2, ZeRO-1": (2, {"zero_stage": 1}),
    "DP2, ZeRO-3": (2, {"zero_stage": 3}),
    "DP2xTP2, ZeRO-1": (4, {"tensor": 2, "zero_stage": 1}),
    "TP2xPP2": (4, {"tensor": 2, "pipeline": 2}),
}


@pytest.mark.parametrize(
    "layout", slow_except(["TP2+SP", "DP2, ZeRO-1"], LAYOUTS, long=["DP2, ZeRO-3", "DP2xTP2, ZeRO-1", "TP2xPP2"])
)
def test_a_run_begins_with_the_given_bits_on_every_layout(layout, run_values, sources, tmp_path):
    """And with a vocabulary that has grown: old rows are the given ones, new ones are what a new model would have."""
    ranks, parallel = LAYOUTS[layout]
    runs = {}
    for kind in KINDS:
        for grows in (False, True):
            values = changed(
                run_values,
                run={"dir": str(tmp_path / f"{kind}_{grows}")},
                model={"vocab_size": GROWN} if grows else {},
                train={"init_from": str(sources[kind]), "grow_vocabulary": grows},
                parallel=parallel,
            )
            runs[kind, grows] = values
    run_world(start_and_save, list(runs.values()), ranks=ranks)

    rows = run_values["model"]["vocab_size"]
    for (kind, grows), values in runs.items():
        given = expected(sources[kind], kind, run_values, tmp_path)
        begun = newest_checkpoint(run_dir(values), warn=pytest.fail)
        drawn = DrawnState(ModelConfig(**values["model"]), seed=values["run"]["seed"])
        assert begun.shapes() == drawn.shapes()
        for name in begun.shapes():
            old = begun.read(name)
            if grows and name == "embedding.weight":
                old, new = old[:rows], old[rows:]
                assert new.shape[0] == GROWN - rows
                assert torch.equal(new, drawn.read(name)[rows:])
            assert torch.equal(old.view(torch.int32), given.read(name).view(torch.int32)), (kind, grows, name)
        assert not torch.equal(given.read("embedding.weight"), drawn.read("embedding.weight")[:rows])
        moments = [
            tensor
            for shard in begun.path.glob("*.safetensors")
            for name, tensor in load_file(shard).items()
            if name.startswith("exp_avg")
        ]
        assert moments
        assert not any(tensor.any() for tensor in moments)


@pytest.mark.slow
def test_an_untied_head_grows_too(run_values, tmp_path):
    values = changed(run_values, model={"tie_embeddings": False})
    hf = save_hf(values, tmp_path / "hf")
    grown = changed(
        values,
        model={"vocab_size": GROWN},
        train={"init_from": str(hf), "grow_vocabulary": True},
        parallel={"tensor": 2},
    )
    run_world(start_and_save, [grown], ranks=2)
    rows = values["model"]["vocab_size"]
    given = RandomState(ModelConfig(**values["model"]))
    drawn = DrawnState(ModelConfig(**grown["model"]), seed=grown["run"]["seed"])
    begun = newest_checkpoint(run_dir(grown), warn=pytest.fail)
    for name in ("embedding.weight", "head.weight"):
        assert torch.equal(begun.read(name)[:rows], given.read(name))
        assert torch.equal(begun.read(name)[rows:], drawn.read(name)[rows:])
    assert not torch.equal(begun.read("embedding.weight")[rows:], begun.read("head.weight")[rows:])


@pytest.mark.parametrize(("ranks", "parallel"), slow_except([(1, {})], [(1, {}), (2, {"tensor": 2})]))
def test_optimizer_schedule_and_data_are_those_of_a_new_run(ranks, parallel, run_values, tmp_path):
    """Started from the weights that it would have drawn, a run is the same in every bit; also when it is stopped, and
    the weights that it started from are gone."""
    state = DrawnState(ModelConfig(**run_values["model"]), seed=run_values["run"]["seed"])
    hf = save_hf(run_values, tmp_path / "hf", state)
    drawn = changed(run_values, parallel=parallel)
    given = changed(drawn, run={"dir": str(tmp_path / "given")}, train={"init_from": str(hf)})
    records = train(drawn, ranks=ranks)
    assert train(given, ranks=ranks) == records

    started_from = newest_checkpoint(run_dir(given), warn=pytest.fail).state["started_from"]
    assert (started_from["path"], started_from["step"]) == (str(hf), None)
    assert described(started_from) == read_runs([run_dir(given)])[0].started_from
    assert read_runs([run_dir(drawn)])[0].started_from is None

    shutil.rmtree(hf)
    stopped = stopped_after(given, 3, tmp_path / "stopped")
    assert train(stopped, ranks=ranks) == records
    assert newest_checkpoint(run_dir(stopped), warn=pytest.fail).state["started_from"] == started_from


def test_a_run_starts_from_another_runs_newest_checkpoint_or_from_the_one_that_is_named(run_values, tmp_path):
    first = changed(run_values, train={"steps": 2}, checkpoint={"every_steps": 1})
    train(first)
    named = run_dir(first) / "checkpoints" / "step_00000001"
    for path, step in ((run_dir(first), 2), (named, 1)):
        config = parse_config(start(run_values, path, tmp_path / "next"), source="test")
        found = find_initial_weights(config)
        assert (found.step, found.is_checkpoint, found.path.name) == (step, True, f"step_{step:08d}")
    records = train(start(changed(run_values, train={"steps": 1}), named, tmp_path / "next"))
    again = train(start(changed(run_values, train={"steps": 1}), run_dir(first), tmp_path / "after"))
    assert [record["step"] for record in records] == [record["step"] for record in again] == [1]
    assert records[0]["tokens"] == run_values["train"]["global_batch_tokens"]
    assert records[0]["loss"] != again[0]["loss"]  # the same samples, other weights


def start(values: dict, source: Path, run: Path, **sections) -> dict:
    """The values of a run that starts from a source."""
    return changed(values, run={"dir": str(run)}, train={"init_from": str(source)}, **sections)


def find(values: dict):
    return find_initial_weights(parse_config(values, source="test"))


@pytest.mark.parametrize(
    ("model", "grows", "sentence"),
    [
        ({"pattern": "M-M-"}, False, "model.pattern is 'M-M-' and the weights of .* have 'M-\\*-'"),
        ({"hidden_size": 64}, False, "model.hidden_size is 64 and .* have 32"),
        ({"num_kv_heads": 4}, False, "model.num_kv_heads is 4 and .* have 2"),
        ({"num_query_heads": 2}, False, "model.num_query_heads is 2 and .* have 4"),
        ({"mlp_size": 50}, False, "model.mlp_size is 50 and .* have 48"),
        ({"d_state": 8}, False, "model.d_state is 8 and .* have 16"),
        ({"dt_rank": 3}, False, "model.dt_rank is 3 and .* have 2"),
        ({"tie_embeddings": False}, False, "model.tie_embeddings is False and .* have True"),
        ({"vocab_size": 400}, False, "model.vocab_size is 400 and .* have 384: set it to that, or train.grow_vocab"),
        ({"vocab_size": 200}, False, "model.vocab_size is 200, fewer than the 384"),
        ({"vocab_size": 200}, True, "model.vocab_size is 200, fewer than the 384"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_in_a_sentence(model, grows, sentence, run_values, tmp_path):
    hf = save_hf(run_values, tmp_path / "hf")
    values = start(run_values, hf, tmp_path / "run", model=model)
    with pytest.raises(ConfigError, match=sentence):
        find(changed(values, train={"grow_vocabulary": grows}))


def test_keys_that_no_weight_depends_on_may_differ_and_are_named(run_values, tmp_path, capsys):
    hf = save_hf(run_values, tmp_path / "hf")
    capsys.readouterr()
    assert find(start(run_values, hf, tmp_path / "run", model={"dt_rank": 2, "embedding_std": 0.5})) is not None
    assert capsys.readouterr().err == ""
    assert find(start(run_values, hf, tmp_path / "run", model={"window": 16, "rope_base": 5e4})) is not None
    told = capsys.readouterr().err
    assert "model.window is 16 and the weights" in told
    assert "model.rope_base is 50000.0 and the weights" in told


def test_sources_that_cannot_be_read_are_refused_in_a_sentence(run_values, sources, tmp_path):
    (tmp_path / "empty").mkdir()
    cases = {
        tmp_path / "nowhere": "nowhere, which does not exist: give a run folder",
        tmp_path / "empty": "empty, which is no Hugging Face folder .* neither a checkpoint nor a run",
    }
    (shard,) = (sources["checkpoint"] / "checkpoints").glob("*/*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    cases[sources["checkpoint"]] = "is no Hugging Face folder .* is damaged"
    for source, sentence in cases.items():
        with pytest.raises(ConfigError, match=sentence) as raised:
            find(start(run_values, source, tmp_path / "run"))
        assert raised.value.exit_code == 2
    assert not (tmp_path / "run").exists()


def test_growth_without_weights_is_refused(run_values):
    with pytest.raises(ConfigError, match=r"train.grow_vocabulary is true without train.init_from"):
        parse_config(changed(run_values, train={"grow_vocabulary": True}), source="test")


def with_manifest(values: dict, folder: Path, **tokenizer) -> dict:
    """The run on a copy of its data whose manifest says something else of the tokenizer."""
    prefix = Path(values["data"]["train"])
    folder.mkdir()
    for path in prefix.parent.glob(f"{prefix.name}*"):
        shutil.copy(path, folder)
    record = json.loads(manifest_path(prefix).read_text())
    record["tokenizer"] |= tokenizer
    manifest_path(folder / prefix.name).write_text(json.dumps(record))
    return changed(values, data={"train": str(folder / prefix.name)})


def test_data_of_another_tokenizer_are_refused_unless_the_vocabulary_grows(run_values, tmp_path):
    first = changed(run_values, train={"steps": 1})
    train(first)
    same = start(run_values, run_dir(first), tmp_path / "next")
    other = with_manifest(same, tmp_path / "data", sha256="0" * 64)
    assert find(same) is not None
    with pytest.raises(ConfigError, match=r"has SHA-256 000000000000... and the weights of .* ids mean other text"):
        find(other)
    assert find(changed(other, train={"grow_vocabulary": True})) is not None
    # A checkpoint of an older version says nothing of it, and the manifest of the data that its config names does.
    saved = newest_checkpoint(run_dir(first), warn=pytest.fail)
    sources = [{"prefix": source["prefix"]} for source in saved.state["data"]["sources"]]
    older = Checkpoint(saved.path, {**saved.state, "data": {"sources": sources}})
    assert len(tokenizers_of(saved)) == 1
    assert tokenizers_of(older) == tokenizers_of(saved)


def test_a_hugging_face_tokenizer_with_other_pieces_is_refused(run_values, tmp_path):
    from sambalm.model.hf.tokenizer import save_tokenizer

    hf = save_hf(run_values, tmp_path / "hf")
    save_tokenizer(Path(run_values["data"]["train"]).with_name("tokenizer.model"), hf)
    values = start(run_values, hf, tmp_path / "run")
    assert find(values) is not None
    content = json.loads((hf / "tokenizer.json").read_text())
    one, other = list(content["model"]["vocab"])[300:302]
    content["model"]["vocab"] |= {one: content["model"]["vocab"][other], other: content["model"]["vocab"][one]}
    (hf / "tokenizer.json").write_text(json.dumps(content))
    (hf / "tokenizer.model").unlink()
    with pytest.raises(ConfigError, match=r"token 300 is .* the tokenizer of the data, so that ids mean other text"):
        find(values)


def test_a_run_that_did_not_start_from_there_is_refused(run_values, tmp_path):
    """Neither one that drew its weights nor one that began with others goes on as if it had begun with these."""
    config = parse_config(start(run_values, tmp_path / "a", tmp_path / "run"), source="test")
    plain, other, same = (
        Checkpoint(tmp_path, {} if name is None else {"started_from": {"init_from": str(tmp_path / name)}})
        for name in (None, "b", "a")
    )
    with pytest.raises(ConfigError, match="did not start from it: leave the key out"):
        check_started_from(plain, config)
    with pytest.raises(ConfigError, match=r"started from .*/b: leave the key out"):
        check_started_from(other, config)
    check_started_from(same, config)
    check_started_from(other, parse_config(run_values, source="test"))
