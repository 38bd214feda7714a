"""Logits of converted models beside those of the code that they come from, on a CPU in fp32, with random weights.

    python benchmarks/inference/peer_logits.py samba --code REPOSITORIES
    TRITON_INTERPRET=1 python benchmarks/inference/peer_logits.py fla --code UNPACKED_WHEELS

REPOSITORIES holds checkouts of microsoft/Samba, state-spaces/mamba, Dao-AILab/causal-conv1d and
facebookresearch/xformers as `Samba`, `mamba`, `causal-conv1d` and `xformers`. CUDA functions give way to the formulas
that these packages have, and those of flash-attn to plain ones. UNPACKED_WHEELS holds flash_linear_attention and
fla_core, whose kernels run in Triton's interpreter; triton must be installed. The models are narrow, with four blocks
and a window of 24 tokens.
"""

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from sambalm.model.hf.generate import model_of_state
from sambalm.pretrain.checkpointing.format import newest_checkpoint
from sambalm.pretrain.checkpointing.from_hf import checkpoint_from_hf
from sambalm.pretrain.checkpointing.saved_config import saved_model

VOCABULARY, WINDOW, TOKENS = 256, 24, 70
REFERENCE_MODELS = ("Samba_421M", "Samba_421M_512_window", "Samba_421M_gqa4", "Samba_421M_mqa6", "Samba_1.3B")
UNUSED = {"gla": "GatedLinearAttention", "multiscale_retention": "MultiScaleRetention", "mega": "S6GatedAttention"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=["samba", "fla"])
    parser.add_argument("--code", type=Path, required=True)
    parser.add_argument("--bf16-tables", action="store_true", help="rotary tables as microsoft/Samba rounds them")
    arguments = parser.parse_args()
    models = fla_models(arguments.code) if arguments.peer == "fla" else reference_models(arguments)
    ids = torch.randint(VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    print("| model | largest logit | largest difference |\n| --- | ---: | ---: |")
    for name, model, save, logits in models:
        draw(model)
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            given, expected = converted(save(Path(folder) / "model"), Path(folder) / "run", ids), logits(ids)
        print(f"| {name} | {expected.abs().max():.3f} | {(given - expected).abs().max():.2g} |", flush=True)


@torch.no_grad()
def draw(model: nn.Module) -> None:
    """Makes weights so large, and vectors so uneven, that a layer or tensor in a wrong place shows."""
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if weight.dim() == 1 or name.endswith("A_log"):
            weight.add_(0.2 * torch.randn_like(weight))
        elif weight.dim() == 2:
            weight.mul_(3)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.weight.normal_(std=0.3)


def converted(source: Path, run: Path, ids: Tensor) -> Tensor:
    window = None if source.is_dir() else WINDOW
    checkpoint_from_hf(source, run, query_heads=None, window=window, progress=lambda done, total: None)
    checkpoint = newest_checkpoint(run, warn=print)
    return model_of_state(checkpoint, saved_model(checkpoint), dtype=torch.float32)(input_ids=ids).logits


Peer = tuple[str, nn.Module, Callable[[Path], Path], Callable[[Tensor], Tensor]]


def fla_models(code: Path) -> Iterator[Peer]:
    sys.path.insert(0, str(code))
    run_fla_on_a_cpu()
    from fla.models.samba import SambaConfig, SambaForCausalLM

    for kv_heads, base, is_tied in ((2, 10000.0, False), (4, 500.0, True)):
        attn = {"layers": [1, 3], "num_heads": 4, "num_kv_heads": kv_heads, "qkv_bias": False}
        attn |= {"window_size": WINDOW, "rope_theta": base}
        options = {"tie_word_embeddings": is_tied, "fuse_norm": not is_tied, "fuse_cross_entropy": False}
        model = SambaForCausalLM(
            SambaConfig(hidden_size=64, num_hidden_layers=4, vocab_size=VOCABULARY, attn=attn, **options)
        ).eval()

        def save(path: Path, model: Any = model) -> Path:
            model.save_pretrained(path)
            return path

        def logits(ids: Tensor, model: Any = model) -> Tensor:
            return model(ids, use_cache=False).logits

        yield f"fla, {kv_heads} heads of keys, rope {base:g}", model, save, logits


def run_fla_on_a_cpu() -> None:
    """Gives fla, before it is imported, an attention in PyTorch, and keeps Triton from timing its kernels."""
    made("flash_attn", flash_attn_func=attention, flash_attn_varlen_func=None)
    import triton.runtime.autotuner as autotuner

    autotuner.Autotuner._bench = lambda self, *_, config, **__: [0.0] * 3  # which would ask a GPU


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window_size: tuple[int, int]) -> Tensor:
    """Computes what flash-attn's function of that name does, of [B, S, H, d], in PyTorch."""
    assert causal
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])
    mask = (distance >= 0) & (distance <= window_size[0])
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def reference_models(arguments: argparse.Namespace) -> Iterator[Peer]:
    code = reference_code(arguments.code, bf16_tables=arguments.bf16_tables)
    for name in REFERENCE_MODELS:
        sizes = {"n_layer": 4, "n_embd": 16 * code.Config.from_name(name).n_head, "intermediate_size": 136}
        sizes |= {"vocab_size": VOCABULARY, "padded_vocab_size": None, "local_window": WINDOW}
        model = code.GPT(code.Config.from_name(name, **sizes)).eval()

        def save(path: Path, model: Any = model, name: str = name) -> Path:
            torch.save({"model": model.state_dict(), "hparams": {"model_name": name}}, path)
            return path

        def logits(ids: Tensor, model: Any = model) -> Tensor:
            return model(ids).logits

        yield name, model, save, logits


def reference_code(code: Path, *, bf16_tables: bool) -> ModuleType:
    """Loads lit_gpt/model.py and config.py, with stand-ins for what needs a GPU."""
    conv = code / "causal-conv1d" / "causal_conv1d"
    functions = ("fwd", "bwd", "update")
    package("causal_conv1d", conv)
    made("causal_conv1d.cpp_functions", **{f"causal_conv1d_{name}_function": None for name in functions})
    formulas = loaded("causal_conv1d.causal_conv1d_interface", conv / "causal_conv1d_interface.py")
    made("causal_conv1d", causal_conv1d_fn=formulas.causal_conv1d_ref, causal_conv1d_update=None)
    for name in ("", ".ops", ".utils", ".ops.triton"):
        package(f"mamba_ssm{name}", code / "mamba" / "mamba_ssm" / name.replace(".", "/").strip("/"))
    made("mamba_ssm.ops.triton.layer_norm", _layer_norm_fwd=None)
    scan = loaded("mamba_ssm.ops.selective_scan_interface", code / "mamba/mamba_ssm/ops/selective_scan_interface.py")
    scan.causal_conv1d_fn, scan.selective_scan_fn = formulas.causal_conv1d_ref, scan.selective_scan_ref
    scan.mamba_inner_fn = scan.mamba_inner_ref
    package("xformers", code / "xformers" / "xformers")
    package("xformers.ops", code / "xformers" / "xformers" / "ops")
    made("xformers.ops", SwiGLU=loaded("xformers.ops.swiglu_op", code / "xformers/xformers/ops/swiglu_op.py").SwiGLU)
    made("lightning_utilities.core.imports", RequirementCache=lambda *_: False)
    made("dropout_layer_norm")
    made("rotary_emb", apply_rotary=rotate)
    lit_gpt = package("lit_gpt", code / "Samba" / "lit_gpt")
    for name, unused in UNUSED.items():
        made(f"lit_gpt.{name}", **{unused: None})
    made("lit_gpt.utils", find_multiple=lambda number, of: -(-number // of) * of)
    model = loaded("lit_gpt.model", code / "Samba/lit_gpt/model.py", change=('"device": "cuda"', '"device": "cpu"'))
    norms = loaded("lit_gpt.rmsnorm", code / "Samba/lit_gpt/rmsnorm.py")
    norms.FusedRMSNorm = norms.RMSNorm
    whole = model.CausalSelfAttention.scaled_dot_product_attention
    distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)

    def windowed(self: Any, q: Tensor, k: Tensor, v: Tensor, mask: None = None) -> Tensor:
        """Their own function with the window that they hand to flash-attn on a GPU."""
        return whole(self, q, k, v, mask=(distance >= 0) & (distance < self.config.local_window))

    model.CausalSelfAttention.scaled_dot_product_attention = windowed
    if not bf16_tables:
        tables = model.build_rope_cache
        model.build_rope_cache = lambda **options: tables(**options | {"dtype": torch.float32})
    lit_gpt.GPT, lit_gpt.Config = model.GPT, sys.modules["lit_gpt.config"].Config
    return lit_gpt


def rotate(x1: Tensor, x2: Tensor, cos: Tensor, sin: Tensor, out1: Tensor, out2: Tensor, inverse: bool) -> None:
    """Computes what flash-attn's CUDA function does, in place."""
    assert not inverse
    first, second = x1 * cos - x2 * sin, x1 * sin + x2 * cos
    out1.copy_(first)
    out2.copy_(second)


def made(name: str, **members: Any) -> ModuleType:
    """Returns a module of that name, with these members, and the packages that it is in."""
    module = sys.modules.setdefault(name, ModuleType(name))
    module.__dict__.update(members)
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(sys.modules.get(parent) or made(parent), last, module)
    return module


def package(name: str, folder: Path) -> ModuleType:
    """Returns a package whose modules are found in a folder, without executing its __init__."""
    return made(name, __path__=[str(folder)])


def loaded(name: str, path: Path, *, change: tuple[str, str] = ("", "")) -> ModuleType:
    """Executes a file as a module, with one text in the place of another."""
    module = made(name, __file__=str(path), __package__=name.rpartition(".")[0])
    module.__spec__ = importlib.util.spec_from_file_location(name, path)
    source = path.read_text("utf-8")
    exec(compile(source.replace(*change) if change[0] else source, str(path), "exec"), module.__dict__)
    return module


if __name__ == "__main__":
    main()
