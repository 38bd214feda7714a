"""A folder in transformers by its own code, in an interpreter that can import none of ours."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sambalm.model.hf import load_for_generation

SCRIPT = """
import sys

BLOCKED = ("sambalm", "toy_mixer")

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked here")

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
positions = torch.arange(inputs.shape[1])[None] % 11
packed = model(inputs, position_ids=positions).logits.detach()
compiled = torch.compile(model, fullgraph=True, backend="eager")
torch.testing.assert_close(compiled(inputs, use_cache=False).logits, logits, atol=1e-5, rtol=0)
cache = model(inputs[:, :-1]).past_key_values
last = compiled(inputs[:, -1:], past_key_values=cache).logits
torch.testing.assert_close(last, logits[:, -1:], atol=1e-5, rtol=0)
model.save_pretrained(copy)
again = AutoModelForCausalLM.from_pretrained(copy, trust_remote_code=True)
assert torch.equal(again(inputs).logits, logits)
hidden = AutoModel.from_pretrained(folder, trust_remote_code=True)(inputs).last_hidden_state.detach()
ids = torch.tensor(tokenizer.encode("def f(x):\\n    return x</s>"))
narrow = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
fp32 = {f"fp32 {name}": p.detach() for name, p in narrow.named_parameters() if p.dtype == torch.float32}
save_file({"logits": logits, "generated": generated, "hidden": hidden, "ids": ids, "packed": packed, **fp32}, out)
assert type(model).__module__.startswith("transformers_modules.")
assert not set(BLOCKED) & set(sys.modules)
"""


def outputs_by_remote_code(folder: Path, tokens: torch.Tensor, tmp_path: Path) -> dict[str, torch.Tensor]:
    """Returns what the folder's code gives offline.

    That is logits and hidden states of the tokens, under "packed" their logits as documents of 11 tokens, the prompt's
    first nine tokens with six generated ones, a text's ids, and under "fp32 NAME" what stays fp32 in a model in bf16.
    The model saves a copy of itself as `tmp_path / "copy"`, which gives the same logits. A forward and a step of
    decoding compile as one graph.
    """
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
        timeout=240,
        stdin=subprocess.DEVNULL,
    )
    assert run.returncode == 0, run.stderr
    return load_file(tmp_path / "out")


def same_by_remote_code(folder: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """Compares logits and generated tokens by the folder's code with the package's; returns what the former gave."""
    tokens = torch.randint(3, 1200, (2, 30), generator=torch.Generator().manual_seed(0))
    given = outputs_by_remote_code(folder, tokens, tmp_path)
    model, _ = load_for_generation(folder)
    with torch.no_grad():
        assert torch.equal(given["logits"], model(tokens).logits)
        generated = model.generate(tokens[:, :9], max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(given["generated"], generated)
    return given
