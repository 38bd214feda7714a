"""An exported folder loads, runs and is saved again offline in an interpreter that has no sambalm."""

import json
import os
import subprocess
import sys

import torch
from safetensors.torch import load_file, save_file

from sambalm.model.hf.generate import load_model

SCRIPT = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "sambalm":
            raise ImportError("sambalm is blocked here")

sys.meta_path.insert(0, Blocker())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

folder, tokens, out, copy = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = load_file(tokens)["tokens"]
generated = model.generate(inputs[:, :9], max_new_tokens=6, do_sample=False, eos_token_id=None)
logits = model(inputs).logits.detach()
model.save_pretrained(copy)
again = AutoModelForCausalLM.from_pretrained(copy, trust_remote_code=True)
assert torch.equal(again(inputs).logits, logits)
hidden = AutoModel.from_pretrained(folder, trust_remote_code=True)(inputs).last_hidden_state.detach()
ids = torch.tensor(tokenizer.encode("def f(x):\\n    return x</s>"))
save_file({"logits": logits, "generated": generated, "hidden": hidden, "ids": ids}, out)
assert type(model).__module__.startswith("transformers_modules.")
assert "sambalm" not in sys.modules
"""


def test_the_folder_needs_no_package(exported, tmp_path):
    folder = exported[0]
    tokens = torch.randint(3, 1200, (2, 30), generator=torch.Generator().manual_seed(0))
    save_file({"tokens": tokens}, tmp_path / "tokens")
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {
        "PATH": os.environ["PATH"],
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    arguments = [str(folder), str(tmp_path / "tokens"), str(tmp_path / "out"), str(tmp_path / "copy")]
    run = subprocess.run(
        [sys.executable, "-I", str(tmp_path / "script.py"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    assert run.returncode == 0, run.stderr
    given = load_file(tmp_path / "out")
    model = load_model(folder)
    with torch.no_grad():
        assert torch.equal(given["logits"], model(tokens).logits)
        assert torch.equal(given["hidden"], model.backbone(tokens).last_hidden_state)
        generated = model.generate(tokens[:, :9], max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(given["generated"], generated)
    assert 2 not in given["ids"].tolist()
    assert "auto_map" in json.loads((tmp_path / "copy" / "config.json").read_text())


def test_no_file_of_the_folder_mentions_the_package_in_an_import(exported):
    imports = [
        line
        for path in exported[0].glob("*.py")
        for line in path.read_text().splitlines()
        if line.startswith(("import ", "from "))
    ]
    assert imports
    assert not [line for line in imports if "sambalm" in line or ".." in line]
