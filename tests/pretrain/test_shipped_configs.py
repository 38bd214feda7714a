"""Configs that the package brings: found by name from anywhere, in the wheel too."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sambalm.pretrain.config_file import load_config
from sambalm.pretrain.errors import ConfigError
from sambalm.pretrain.shipped_configs import shipped_names

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["samba_421m", "samba_421m.yaml", "paper/mamba_1.3b", "finetune/passkey_1.7b"])
def test_a_config_is_found_by_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = ROOT / "configs" / f"{name.removesuffix('.yaml')}.yaml"
    overrides = ["run.dir=x", "data.train=y", "train.init_from=null"]
    assert load_config(Path(name), overrides) == load_config(file, overrides)


def test_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "configs" / "samba_421m.yaml").read_text("utf-8").replace("hidden_size: 1536", "hidden_size: 768")
    Path("samba_421m").write_text(text, encoding="utf-8")
    assert load_config(Path("samba_421m")).model.hidden_size == 768
    assert load_config(Path("samba_421m.yaml")).model.hidden_size == 1536


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("samba_42m", "did you mean samba_421m?"), ("mine.yaml", "such names are"), ("../samba_421m", "No such file")],
)
def test_another_name_is_refused_in_a_sentence(name, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"cannot read the config .*: No such file in {tmp_path},") as error:
        load_config(Path(name))
    assert sentence in str(error.value)


def built_wheel(folder):
    """Builds the wheel of the source tree, in which it leaves nothing."""
    places = folder / "places.cfg"  # of what setuptools would leave in the source tree
    places.write_text(f"[build]\nbuild_base = {folder}/build\n[egg_info]\negg_base = {folder}\n", encoding="utf-8")
    built = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT]
    environment = os.environ | {"DIST_EXTRA_CONFIG": str(places)}
    subprocess.run([sys.executable, *built], env=environment, check=True, capture_output=True)
    (wheel,) = folder.glob("sambalm-*.whl")
    return wheel


@pytest.mark.slow
def test_a_wheel_stands_alone(tmp_path):
    """Its files, without the source tree, read every config and know where they lie."""
    wheel = built_wheel(tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    metadata = next((tmp_path / "site").glob("*.dist-info/METADATA")).read_text("utf-8")
    assert "# sambalm" in metadata  # the README
    script = """
from pathlib import Path
from sambalm.pretrain import config_file, shipped_configs
names = sorted(shipped_configs.shipped_names())
for name in names:
    config_file.load_config(Path(name), ["run.dir=x", "data.train=y"])
print(config_file.__file__, *names)
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    file, *names = done.stdout.split()
    assert Path(file).is_relative_to(tmp_path)
    assert names == sorted(shipped_names())
    assert "samba_3.8b" in names


@pytest.mark.long
def test_a_wheel_in_an_empty_environment_trains_and_converts(tmp_path):
    """What pip brings along is all that the demo's commands need, in a folder without the source tree."""
    wheel = built_wheel(tmp_path)
    environment, work = tmp_path / "venv", tmp_path / "work"
    work.mkdir()
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(program, *words):
        command = [str(environment / "bin" / program), *map(str, words)]
        done = subprocess.run(command, cwd=work, env=settings, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout + done.stderr

    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    run("pip", "install", "--quiet", "--constraint", ROOT / "requirements.lock", wheel)
    run("sambalm", "data", "python-corpus", "corpus.jsonl")
    run("sambalm", "data", "tokenizer", "--input", "corpus.jsonl", "--vocab-size", 2048, "--output", "tokenizer.model")
    prefix = work / "runs" / "demo" / "data" / "python"
    data = ("--input", "corpus.jsonl", "--tokenizer", "tokenizer.model", "--output", prefix, "--workers", 2)
    run("sambalm", "data", "preprocess", *data)
    training = ("train", "demo", "train.steps=4", "validation.every_steps=2", "checkpoint.every_steps=2")
    said = run("torchrun", "--nproc-per-node", 2, "-m", "sambalm.pretrain.cli", *training)
    assert "finished at step 4" in said
    assert "verified" in run("sambalm", "convert", "to-hf", "runs/demo", "runs/demo/hf")
    generated = run("sambalm", "generate", "runs/demo/hf", "--prompt", "def main(", "--max-new-tokens", 8)
    assert generated.startswith("def main(")
    run("sambalm", "report", "runs/demo")
    assert (work / "runs" / "demo" / "report.html").is_file()
    perplexity = ("--task", "perplexity", "perplexity.lengths=[256]", "perplexity.tokens=2K")
    assert "perplexity" in run("sambalm", "evaluate", "runs/demo", *perplexity)
