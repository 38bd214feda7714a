"""What `auto` takes, what is refused by name and what then runs, on GPUs that are described and not there."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from sambalm.model.config import ModelConfig
from sambalm.model.kernel_requirements import kernel_requirements
from sambalm.model.ops import registry
from sambalm.model.ops.attention.cudnn import cudnn_window
from sambalm.model.ops.config import KernelConfig
from sambalm.model.ops.cuda.adamw import CudaAdamW
from sambalm.model.ops.cuda.conv_sizes import MAX_TAPS
from sambalm.model.ops.cuda.scan_sizes import backward_shared_bytes
from sambalm.model.ops.documents import Documents
from sambalm.model.ops.errors import DeclinedError, KernelError
from sambalm.model.ops.external import mamba_ssm_scan
from sambalm.model.ops.implementations import IMPLEMENTATIONS, AttentionCall, KernelRequirements, reads_documents
from sambalm.model.ops.reference.delta_rule import gated_delta_rule
from sambalm.model.ops.reference.window_attention import window_attention
from sambalm.model.ops.registry import build_kernels
from sambalm.model.samba import Samba
from sambalm.parallel.sharding import initialize_parameters
from sambalm.pretrain.config_file import load_config
from sambalm.pretrain.planner.kernels import are_captured, planned_kernels

KIB = 1024
H100, A100, RTX_4090 = (kib * KIB for kib in (227, 163, 99))  # shared memory that a block may have
CONFIGS = Path(__file__).parents[2] / "configs"
MODULES = {i.module for operation in IMPLEMENTATIONS.values() for i in operation.values() if i.module}
NVRTC = "cuda.bindings.nvrtc"


@pytest.fixture
def gpu(monkeypatch):
    """Describes a GPU and the packages that are installed beside torch; cuDNN computes every shape."""

    def describe(*installed, block_memory_bytes=H100):
        for module in MODULES:
            monkeypatch.setitem(sys.modules, module, SimpleNamespace() if module in installed else None)
        device = SimpleNamespace(shared_memory_per_block_optin=block_memory_bytes)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
        monkeypatch.setattr(registry, "why_not_compiled", lambda: None)
        monkeypatch.setattr(registry.cudnn, "declines", lambda call, precision: None)

    return describe


def chosen(operation, name="auto", precision="bf16", **more):
    """The implementation of one operation, where that name is asked for."""
    config = KernelConfig(**dict.fromkeys(KernelConfig.model_fields, "torch") | {operation: name})
    names = build_kernels(config, KernelRequirements("cuda", precision, **more)).names
    return dict(pair.split("=") for pair in names)[operation]


def attention_call(**more):
    sizes = {"batch": 1, "query_heads": 4, "kv_heads": 2, "queries": 32, "keys": 32, "head_dim": 64, "window": 8}
    return AttentionCall(**sizes | more)


@pytest.mark.parametrize(
    ("block_memory_bytes", "precision", "d_state", "expected"),
    [
        (H100, "bf16", 16, "cuda"),
        (H100, "fp32", 64, "cuda"),
        (H100, "bf16", 65, "torch"),
        (A100, "fp32", 64, "cuda"),
        (A100, "fp32", 32, "cuda"),
        (RTX_4090, "bf16", 16, "cuda"),
        (RTX_4090, "fp32", 16, "cuda"),
        (RTX_4090, "bf16", 32, "torch"),
        (RTX_4090, "fp16", 50, "cuda"),
    ],
)
def test_auto_takes_the_cuda_scan_where_its_states_fit(gpu, block_memory_bytes, precision, d_state, expected):
    gpu(NVRTC, block_memory_bytes=block_memory_bytes)
    assert chosen("scan", precision=precision, d_state=d_state) == expected


def test_a_cuda_scan_that_does_not_fit_is_refused_by_name_before_anything_runs(gpu):
    gpu(NVRTC)
    with pytest.raises(KernelError, match=r"kernels\.scan is 'cuda'.*model\.d_state is 65 and it holds at most 64"):
        chosen("scan", "cuda", d_state=65)
    gpu(NVRTC, block_memory_bytes=RTX_4090)
    with pytest.raises(KernelError, match=r"with 17 states it needs 102,016 bytes .* this GPU has 101,376"):
        chosen("scan", "cuda", d_state=17)


def test_too_many_states_for_the_scan_leave_our_convolution(gpu):
    gpu(NVRTC)
    assert chosen("conv", "cuda", precision="fp16", d_state=65) == "cuda"


@pytest.mark.parametrize(
    ("d_conv", "expected"), [(2, "causal-conv1d"), (4, "causal-conv1d"), (5, "cuda"), (12, "torch")]
)
def test_auto_takes_the_convolution_that_holds_its_taps(gpu, d_conv, expected):
    gpu(NVRTC, "causal_conv1d")
    assert chosen("conv", d_conv=d_conv) == expected


def test_the_cuda_convolution_holds_11_taps(gpu):
    gpu(NVRTC)
    assert MAX_TAPS == 11  # docs/gpu.md
    assert chosen("conv", d_conv=11) == "cuda"
    assert chosen("conv", d_conv=12) == "torch"


@pytest.mark.parametrize(("name", "taps"), [("causal-conv1d", 4), ("cuda", 11)])
def test_a_convolution_of_too_many_taps_is_refused_by_name_before_anything_runs(gpu, name, taps):
    gpu(NVRTC, "causal_conv1d")
    assert chosen("conv", name, d_conv=taps) == name
    message = rf"kernels\.conv is '{name}'.*model\.d_conv is {taps + 1} and it holds at most {taps} taps"
    with pytest.raises(KernelError, match=message):
        chosen("conv", name, d_conv=taps + 1)


def test_three_blocks_of_the_backward_fit_a_multiprocessor_of_an_h100():
    assert 3 * (backward_shared_bytes(16) + KIB) <= 228 * KIB  # 1 KiB a block is the system's


@pytest.mark.parametrize(
    ("installed", "more", "expected"),
    [
        (["cudnn", "flash_attn"], {}, "cudnn"),
        (["flash_attn"], {}, "flex"),
        (["cudnn", "flash_attn"], {"resets": True}, "flex"),
        (["cudnn"], {"precision": "fp32"}, "torch"),
        (["cudnn"], {"precision": "fp32", "resets": True}, "torch"),
        ([], {"attention_calls": (attention_call(head_dim=8),)}, "torch-flash"),
        ([], {"attention_calls": (attention_call(head_dim=4),)}, "torch"),
        (["flash_attn"], {"resets": True, "attention_calls": (attention_call(head_dim=12),)}, "flash-attn"),
        ([], {"resets": True, "attention_calls": (attention_call(head_dim=12),)}, "torch"),
    ],
)
def test_auto_takes_the_attention_that_can_do_what_the_run_asks(gpu, installed, more, expected):
    gpu(*installed)
    assert chosen("attention", **more) == expected


@pytest.mark.parametrize(("operation", "name"), [("attention", "cudnn"), ("scan", "mamba-ssm")])
def test_a_kernel_that_cannot_keep_documents_apart_is_refused_by_name_in_a_sentence(gpu, operation, name):
    gpu("cudnn", "mamba_ssm.ops.selective_scan_interface")
    assert chosen(operation, name) == name
    with pytest.raises(KernelError) as refused:
        chosen(operation, name, resets=True)
    assert str(refused.value) == (
        f"kernels.{operation} is '{name}', which cannot run here (it does not keep packed documents apart, which "
        "data.reset_at_document needs): use 'auto' or 'torch'"
    )


@pytest.mark.parametrize(
    ("attention", "captured"), [("torch", True), ("flex", True), ("torch-flash", False), ("flash-attn", False)]
)
def test_kernels_say_whether_a_graph_may_hold_packed_documents(gpu, attention, captured):
    gpu("flash_attn")
    config = KernelConfig(**dict.fromkeys(KernelConfig.model_fields, "torch") | {"attention": attention})
    assert build_kernels(config, KernelRequirements("cuda", "bf16")).captures_documents is captured


def test_an_attention_kernel_passes_documents_on_to_no_other():
    q = torch.zeros(1, 1, 8, 16)
    documents = Documents(torch.zeros(1, 8, dtype=torch.int64), first=0, device=q.device)
    with pytest.raises(KernelError, match="does not keep packed documents apart"):
        cudnn_window(q, q, q, window=4, documents=documents.attention(range(8), keys_before=0))


@pytest.mark.parametrize(
    "more", [{"initial_state": torch.zeros(1, 8, 4)}, {"resets": torch.zeros(1, 2).bool()}], ids=list
)
def test_the_scan_of_mamba_ssm_drops_nothing_silently(more):
    u, A = torch.zeros(1, 2, 8), torch.zeros(8, 4)
    with pytest.raises(KernelError, match="neither an initial state nor resets"):
        mamba_ssm_scan(u, u, A, u, u, D=A[:, 0], z=u, dt_bias=A[:, 0], **more)


@pytest.mark.parametrize(
    ("installed", "name", "kind"), [([NVRTC], "cuda", CudaAdamW), ([], "torch-fused", torch.optim.AdamW)]
)
def test_adamw_is_chosen_and_named_with_the_others(gpu, installed, name, kind):
    gpu(*installed)
    kernels = build_kernels(KernelConfig(), KernelRequirements("cuda", "fp32"))
    assert kernels.names[-1] == f"optimizer={name}"
    assert kernels.optimizer is kind


@pytest.mark.parametrize(
    ("precision", "key_dims", "expected"),
    [("bf16", (128, 256), "fla"), ("bf16", (128, 257), "torch"), ("fp32", (128,), "torch")],
)
def test_auto_takes_flas_delta_rule_where_it_fits(gpu, precision, key_dims, expected):
    gpu("fla.ops")
    needs = {"operations": ("delta_rule",), "delta_key_dims": key_dims}
    assert chosen("delta_rule", precision=precision, **needs) == expected
    if expected == "torch":
        with pytest.raises(KernelError, match=r"kernels\.delta_rule is 'fla'"):
            chosen("delta_rule", "fla", precision=precision, **needs)


@pytest.mark.parametrize(
    ("capability", "triton", "kernel"),
    [
        ((9, 0), "3.6.0", "chunk_kda"),
        ((9, 0), "3.7.0", "chunk_kda"),
        ((9, 0), "3.7.1", "chunk_gated_delta_rule"),
        ((9, 0), "3.3.1", "chunk_gated_delta_rule"),
        ((8, 0), "3.6.0", "chunk_gated_delta_rule"),
    ],
)
def test_one_decay_a_head_is_one_for_all_its_channels_where_triton_compiles_flas_kernel_wrongly(
    monkeypatch, capability, triton, kernel
):
    def computes(q, k, v, *, g, beta, A_log, dt_bias, initial_state=None, **_):
        dt_bias = dt_bias.view(g.shape[2:])
        return gated_delta_rule(q, k, v, g, beta, A_log=A_log, dt_bias=dt_bias, initial_state=initial_state)

    def imported(operation, implementation, name):
        assert (operation, implementation, name) == ("delta_rule", "fla", kernel)
        return computes

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(registry.external, "version", lambda package: triton)
    monkeypatch.setattr(registry.external, "_imported", imported)
    q, k, v = (torch.randn(2, 9, 3, width, dtype=torch.float64) for width in (4, 4, 5))
    gate, beta = torch.randn(2, 2, 9, 3, dtype=torch.float64)
    gates = {"A_log": torch.rand(3, dtype=torch.float64), "dt_bias": torch.randn(3, dtype=torch.float64)}
    for given in (gate, *gates.values()):
        given.requires_grad_()
    results = [rule(q, k, v, gate, beta, **gates) for rule in (registry.external.fla_delta_rule, gated_delta_rule)]
    gradients = [torch.autograd.grad(y.square().sum(), (gate, *gates.values())) for y, _ in results]
    torch.testing.assert_close(results[0][0], results[1][0])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("precision", "expected"), [("bf16", "fla"), ("fp32", "torch")])
def test_auto_takes_flas_linear_attention_where_it_fits(gpu, precision, expected):
    gpu("fla.ops")
    assert chosen("linear_attention", precision=precision, operations=("linear_attention",)) == expected
    with pytest.raises(KernelError, match=r"no layer of model\.pattern computes it"):
        chosen("linear_attention", "fla", precision=precision)


def test_a_model_without_the_delta_rule_takes_and_names_none(gpu):
    gpu("fla.ops")
    kernels = build_kernels(KernelConfig(), KernelRequirements("cuda", "bf16"))
    assert not any(name.startswith("delta_rule") for name in kernels.names)
    assert kernels.delta_rule is gated_delta_rule
    with pytest.raises(KernelError, match=r"no layer of model\.pattern computes it"):
        chosen("delta_rule", "fla")


def test_sizes_of_several_mixers_are_the_largest():
    sizes = {"gated_deltanet": {"d_conv": 2, "head_dim": 64}, "kimi_delta": {"head_dim": 32, "d_conv": 3}}
    model = ModelConfig(pattern="GMK", hidden_size=64, vocab_size=64, d_conv=7, mixers=sizes)
    needs = kernel_requirements(
        model, device="cuda", precision="bf16", micro_batch_size=1, sequence_length=64, resets=False
    )
    assert (needs.d_conv, sorted(needs.delta_key_dims)) == (7, [32, 64])


def test_a_cpu_runs_plain_pytorch_and_says_so():
    operations = ("delta_rule", "linear_attention", "ssd")
    requirements = KernelRequirements("cpu", "bf16", resets=True, initial_states=True, operations=operations)
    names = build_kernels(KernelConfig(), requirements).names
    operations = dict.fromkeys(IMPLEMENTATIONS, "torch") | {"optimizer": "torch-fused"}
    assert names == tuple(f"{operation}={name}" for operation, name in operations.items())


MODEL = ModelConfig(
    pattern="M-*-*", hidden_size=64, num_query_heads=4, num_kv_heads=2, mlp_size=24, window=6, vocab_size=32
)
LENGTH, ATTENTION_LAYERS = 24, 2


class Recorded:
    """Attention kernels that note their calls; cuDNN's declines what `declines` says of a length."""

    def __init__(self, monkeypatch, *, declines=lambda length: False):
        self.calls, reason = Counter(), "cuDNN 9 declines it"

        def kernel(name):
            def run(q, k, v, **options):
                if name == "cudnn" and declines(q.shape[2]):
                    raise DeclinedError(reason)
                self.calls[name] += 1
                return window_attention(q, k, v, **options)

            return run

        monkeypatch.setattr(
            registry.cudnn, "declines", lambda call, precision: reason if declines(call.queries) else None
        )
        for name in registry._FUNCTIONS["attention"]:
            monkeypatch.setitem(registry._FUNCTIONS["attention"], name, kernel(name))


def step(config, *, resets=False):
    """The attention's name and a way to take a forward and backward with a run's kernels."""
    requirements = kernel_requirements(
        MODEL, device="cuda", precision="bf16", micro_batch_size=2, sequence_length=LENGTH, resets=resets
    )
    kernels = build_kernels(config, requirements)
    model = Samba(MODEL, kernels=kernels)
    initialize_parameters(model, seed=0)

    def run(length=LENGTH):
        tokens = torch.zeros(2, length, dtype=torch.int64)
        starts = (torch.arange(length) // 7 * 7).expand(2, -1) if resets else None
        model(tokens, tokens, document_starts=starts).sum().backward()

    return dict(pair.split("=") for pair in kernels.names)["attention"], run


AUTO_ATTENTION = KernelConfig(scan="torch", conv="torch", norm="torch", elementwise="torch")


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("cudnn_declines", [False, True])
def test_the_named_attention_is_what_runs(gpu, monkeypatch, resets, cudnn_declines):
    gpu("cudnn")
    recorded = Recorded(monkeypatch, declines=lambda length: cudnn_declines)
    name, run = step(AUTO_ATTENTION, resets=resets)
    assert name == ("flex" if resets or cudnn_declines else "cudnn")
    run()
    assert recorded.calls == {name: ATTENTION_LAYERS}


def test_a_shape_of_training_that_cudnn_declines_is_refused_by_name_in_a_sentence(gpu, monkeypatch):
    gpu("cudnn")
    Recorded(monkeypatch, declines=lambda length: True)
    with pytest.raises(
        KernelError, match=r"^kernels\.attention is 'cudnn', which cannot run here \(cuDNN 9 declines it"
    ):
        step(AUTO_ATTENTION.model_copy(update={"attention": "cudnn"}))


@pytest.mark.parametrize("asked", ["auto", "cudnn"])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_another_shape_goes_to_the_next_kernel_which_the_main_rank_says_once(gpu, monkeypatch, capsys, rank, asked):
    gpu("cudnn")
    monkeypatch.setenv("RANK", rank)
    recorded = Recorded(monkeypatch, declines=lambda length: length > LENGTH)
    name, run = step(AUTO_ATTENTION.model_copy(update={"attention": asked}))
    run()
    assert name == "cudnn"
    assert recorded.calls == {"cudnn": ATTENTION_LAYERS}
    assert capsys.readouterr().err == ""
    for _ in range(3):
        run(2 * LENGTH)
    assert recorded.calls == {"cudnn": ATTENTION_LAYERS, "flex": 3 * ATTENTION_LAYERS}
    said = "attention=flex in place of cudnn: cuDNN 9 declines it\n"
    assert capsys.readouterr().err == (said if rank == "0" else "")


def test_calls_that_a_kernel_declines_find_no_kernel_that_the_run_cannot_use(gpu, monkeypatch):
    gpu("cudnn")
    monkeypatch.setattr(registry, "why_not_compiled", lambda: "it needs Triton")
    recorded = Recorded(monkeypatch, declines=lambda length: length > LENGTH)
    _, run = step(AUTO_ATTENTION)
    run(2 * LENGTH)
    assert recorded.calls == {"torch-flash": ATTENTION_LAYERS}


def test_options_functions_and_limits_have_the_same_names():
    for operation, functions in registry._FUNCTIONS.items():
        assert set(functions) == set(IMPLEMENTATIONS[operation])
        last = list(IMPLEMENTATIONS[operation].values())[-1]
        assert last.runs_on_cpu
        assert last.declines(KernelRequirements("cpu", "fp32", 999, 999, initial_states=True, resets=True)) is None
    for operation, field in KernelConfig.model_fields.items():
        assert set(get_args(field.annotation)) == {"auto", *IMPLEMENTATIONS[operation]}
    assert set(IMPLEMENTATIONS) == {*KernelConfig.model_fields, "optimizer"}


@pytest.mark.parametrize("module", ["config", "implementations", "errors", "cuda.scan_sizes", "cuda.conv_sizes"])
def test_names_and_options_need_no_torch(module):
    program = f"import sys, sambalm.model.ops.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.parametrize("settings", [[], ["data.reset_at_document=true"], ["model.d_state=65", "model.d_conv=12"]])
@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_plan_counts_with_what_a_run_takes_where_no_package_is_added(gpu, config, settings):
    config = load_config(config, settings)
    gpu(NVRTC)
    requirements = kernel_requirements(
        config.model,
        device="cuda",
        precision=config.train.precision,
        micro_batch_size=1,
        sequence_length=config.data.sequence_length,
        resets=config.data.reset_at_document,
    )
    planned = vars(planned_kernels(config))
    names = [f"{operation}={planned[operation]}" for operation in KernelConfig.model_fields if planned[operation]]
    assert build_kernels(config.kernels, requirements).names == (*names, "optimizer=cuda")


def test_a_plan_refuses_a_kernel_that_the_run_would_refuse():
    settings = ["data.reset_at_document=true", "kernels.attention=cudnn"]
    with pytest.raises(KernelError, match=r"kernels.attention is 'cudnn', .* data.reset_at_document"):
        planned_kernels(load_config(CONFIGS / "samba_421m.yaml", settings))
    assert planned_kernels(load_config(CONFIGS / "samba_421m.yaml", settings[1:])).attention == "cudnn"


def test_micro_batches_whose_documents_the_host_reads_are_not_captured():
    names = {name for name in IMPLEMENTATIONS["attention"] if reads_documents({"attention": name})}
    assert names == {"torch-flash", "flash-attn"}  # which take lengths (`AttentionDocuments.variable_lengths`)
    for packed in (False, True):
        config = load_config(CONFIGS / "samba_421m.yaml", [f"data.reset_at_document={str(packed).lower()}"])
        for name in ("flex", *names):
            kernels = replace(planned_kernels(config), attention=name)
            assert are_captured(config, kernels) is not (packed and name in names)
