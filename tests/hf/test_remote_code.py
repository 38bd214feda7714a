"""An exported folder loads, runs and is saved again offline in an interpreter that has no sambalm."""

import json

import pytest
import torch

from sambalm.model.hf import HFError
from sambalm.model.hf.folder_code import folder_code
from sambalm.model.hf.generate import load_model
from sambalm.model.registry import mixers_of
from tests.support.remote_code import outputs_by_remote_code

SHARED = {"configuration_samba.py", "modeling_samba.py", "layers.py", "mixers.py", "kernels.py", "operations.py"}
SHARED |= {f"{name}.py" for name in ("causal_conv", "elementwise", "rms_norm", "selective_scan", "window_attention")}
OWN = {
    "M": {"mixer_mamba.py"},
    "*": {"mixer_attention.py"},
    "-": {"mixer_mlp.py"},
}


@pytest.mark.slow
def test_the_folder_needs_no_package(exported, tmp_path):
    folder = exported[0]
    tokens = torch.randint(3, 1200, (2, 30), generator=torch.Generator().manual_seed(0))
    given = outputs_by_remote_code(folder, tokens, tmp_path)
    model = load_model(folder)
    with torch.no_grad():
        assert torch.equal(given["logits"], model(tokens).logits)
        assert torch.equal(given["hidden"], model.backbone(tokens).last_hidden_state)
        positions = torch.arange(30)[None] % 11
        assert torch.equal(given["packed"], model(tokens, position_ids=positions).logits)
        generated = model.generate(tokens[:, :9], max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(given["generated"], generated)
    assert 2 not in given["ids"].tolist()
    fp32 = {f"fp32 backbone.layers.0.mixer.{name}" for name in ("A_log", "D", "dt_proj.bias")}
    assert {name for name in given if name.startswith("fp32")} == fp32
    assert "auto_map" in json.loads((tmp_path / "copy" / "config.json").read_text())
    assert {path.name for path in (tmp_path / "copy").glob("*.py")} == {path.name for path in folder.glob("*.py")}


def imports_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(("import ", "from "))]


@pytest.mark.parametrize("pattern", ["M-*-", "M", "*-", "-"])
def test_a_folder_has_the_code_of_its_own_mixers_and_no_import_of_the_package(pattern, exported):
    files = folder_code(pattern)
    assert set(files) == SHARED.union(*(OWN[letter] for letter in pattern))
    imports = [line for text in files.values() for line in imports_of(text)]
    assert any(line.startswith("from .rms_norm import") for line in imports)
    assert not [line for line in imports if "sambalm" in line or ".." in line]
    if pattern == "M-*-":
        assert files == {path.name: path.read_text() for path in exported[0].glob("*.py")}


@pytest.mark.parametrize("file", ["modeling_samba.py", "configuration_samba.py", "layers.py"])
def test_what_all_folders_share_names_no_mixers_layer(file):
    for one in mixers_of("M*-"):
        assert one.hf.layer in "".join(folder_code("M*-")[name] for name in OWN[one.letter])
        assert one.hf.layer not in folder_code("M*-")[file]
        assert one.hf.module not in folder_code("M*-")[file]


@pytest.mark.parametrize(
    "line",
    [
        "import sambalm.model.hf.layers",
        "from sambalm.model.hf import layers",
        "from sambalm.model.config import ModelConfig",
        "def f():\n    from sambalm.model.ops import registry",
        "from .layer import SwiGLU",  # which a folder could have, but not what it imports
    ],
)
def test_an_import_that_a_folder_cannot_have_is_refused(line, monkeypatch):
    from sambalm.model.hf import folder_code as module

    source = module._source
    changed = "sambalm.model.mixers.mlp.hf"
    monkeypatch.setattr(module, "_source", lambda name: source(name) + ("\n" + line) * (name == changed))
    assert folder_code("M")
    with pytest.raises(HFError, match=r"of which an exported folder takes no copy"):
        folder_code("M-")


def test_two_files_of_one_name_are_refused(monkeypatch):
    from sambalm.model.mixers.mlp.mixer import MIXER

    monkeypatch.setattr(type(MIXER), "name", "mamba")
    with pytest.raises(HFError, match=r"would both be mixer_mamba\.py"):
        folder_code("M-")
