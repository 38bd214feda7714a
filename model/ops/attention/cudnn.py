"""Sliding-window attention through cuDNN's fused kernels and its Python package nvidia-cudnn-frontend.

PyTorch's scaled_dot_product_attention reaches the same kernels but passes no window on. A graph is built once for
each shape, memory layout and window, which takes up to seconds, and then only launched. Which shapes cuDNN computes
depends on its version and on the device, so it is asked: by `declines` when a run is built, and again by each call.
"""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from sambalm.model.ops.errors import DeclinedError, KernelError
from sambalm.model.ops.implementations import AttentionCall

HALF_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
ALIGNED_BYTES = 16
MAX_PLANS = 64


def declines(call: AttentionCall, *, precision: str) -> str | None:
    """Why cuDNN does not compute a call and its gradients on the current device; None where it does.

    The call's tensors are taken to lie in memory as the layers' do. Nothing is compiled or launched.

    Args:
        precision: bf16 or fp16.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    probe = Call.sequence_first(call, dtype=HALF_DTYPES[precision], device=device)
    attempts = (_attempted(probe, kind, Plan.checked) for kind in ("training", "backward"))
    return next((attempt for attempt in attempts if isinstance(attempt, str)), None)


def cudnn_window(q: Tensor, k: Tensor, v: Tensor, *, window: int, documents: None = None) -> Tensor:
    """`window_attention.window_attention` on a GPU in bf16 or fp16, of one document.

    Output and gradients lie in memory as q, k and v do.

    Raises:
        DeclinedError: cuDNN does not compute such a call, or not its gradients.
        KernelError: there are several documents.
    """
    if documents is not None:
        raise KernelError("the attention 'cudnn' does not keep packed documents apart: set kernels.attention to 'auto'")
    unseen = max(0, k.shape[2] - q.shape[2] - window + 1)  # by the first query, and so by all
    q, k, v = (_readable(t) for t in (q, k[:, :, unseen:], v[:, :, unseen:]))
    training = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    call = Call.of(q, k, v, window=window)
    if reason := call.refusal(training=training):
        raise DeclinedError(reason)
    if training:
        return _Attention.apply(q, k, v, call)
    out = call.q.dense.empty(like=q)
    call.plan("inference").launch((q, k, v, out))
    return out


@dataclass(frozen=True)
class Tile:
    """A tensor's sizes and strides, in elements: what a graph is built for."""

    size: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "Tile":
        return cls(tuple(tensor.shape), tuple(tensor.stride()))

    @classmethod
    def sequence_first(cls, batch: int, heads: int, length: int, head_dim: int) -> "Tile":
        """A tile [batch, heads, length, head dim] that is a view of [length, batch, heads, head dim]."""
        return cls((batch, heads, length, head_dim), (heads * head_dim, head_dim, batch * heads * head_dim, 1))

    @property
    def dense(self) -> "Tile":
        """The dimensions in the same order in memory, without gaps."""
        strides, elements = [0] * len(self.size), 1
        for dimension in sorted(range(len(self.size)), key=lambda i: self.stride[i]):
            strides[dimension] = elements
            elements *= self.size[dimension]
        return Tile(self.size, tuple(strides))

    def empty(self, *, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=dtype or like.dtype, device=like.device)


@dataclass(frozen=True)
class Call:
    """Everything that a graph depends on, which makes it the key of the built ones."""

    device: torch.device
    dtype: torch.dtype
    q: Tile
    k: Tile
    v: Tile
    window: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, *, window: int) -> "Call":
        return cls(q.device, q.dtype, Tile.of(q), Tile.of(k), Tile.of(v), window)

    @classmethod
    def sequence_first(cls, call: AttentionCall, *, dtype: torch.dtype, device: torch.device) -> "Call":
        """A call on tensors that lie in memory as the layers' do, without the keys that no query sees."""
        q = Tile.sequence_first(call.batch, call.query_heads, call.queries, call.head_dim)
        seen_keys = min(call.keys, call.queries + call.window - 1)
        kv = Tile.sequence_first(call.batch, call.kv_heads, seen_keys, call.head_dim)
        return cls(device, dtype, q, kv, kv, call.window)

    def refusal(self, *, training: bool) -> str | None:
        """Why cuDNN does not compute the output or, in training, the gradients; None when it does."""
        built = (_built(self, kind) for kind in (("training", "backward") if training else ("inference",)))
        return next((plan for plan in built if isinstance(plan, str)), None)

    def plan(self, kind: str) -> "Plan":
        """The graph of a kind: inference, training (the forward that keeps statistics) or backward."""
        plan = _built(self, kind)
        if isinstance(plan, str):
            raise DeclinedError(plan)
        return plan

    @property
    def statistics(self) -> Tile:
        """The logarithm of each query's sum of exponentials, fp32."""
        batch, heads, queries, _ = self.q.size
        return Tile((batch, heads, queries, 1), (heads * queries, queries, 1, 1))

    @property
    def band(self) -> dict[str, Any]:
        """Which keys a query sees. A left bound of n is of keys at distances below n, so it counts the query's own."""
        alignment = _cudnn().diagonal_alignment
        queries, keys = self.q.size[2], self.k.size[2]
        return {
            "attn_scale": self.q.size[3] ** -0.5,
            "diagonal_alignment": alignment.TOP_LEFT if queries == keys else alignment.BOTTOM_RIGHT,
            "diagonal_band_left_bound": self.window if self.window < keys else None,
            "diagonal_band_right_bound": 0,
        }


class Plan:
    """A graph with the tensors that it reads and writes, in the order in which they are given to `launch`."""

    def __init__(self, call: Call, **options: Any) -> None:
        cudnn = _cudnn()
        self.device = call.device
        self.float32 = cudnn.data_type.FLOAT
        self.io = {torch.bfloat16: cudnn.data_type.BFLOAT16, torch.float16: cudnn.data_type.HALF}[call.dtype]
        self.tensors = 0
        self.graph = cudnn.pygraph(
            io_data_type=self.io, intermediate_data_type=self.float32, compute_data_type=self.float32, **options
        )

    def _input(self, tile: Tile, data_type: Any) -> Any:
        tensor = self.graph.tensor(dim=list(tile.size), stride=list(tile.stride), data_type=data_type)
        return self._numbered(tensor)

    def _output(self, tensor: Any, tile: Tile, data_type: Any) -> None:
        tensor.set_output(True).set_dim(list(tile.size)).set_stride(list(tile.stride)).set_data_type(data_type)
        self._numbered(tensor)

    def _numbered(self, tensor: Any) -> Any:
        self.tensors += 1
        tensor.set_uid(self.tensors)
        return tensor

    def forward(self, call: Call, *, training: bool) -> "Plan":
        q, k, v = (self._input(tile, self.io) for tile in (call.q, call.k, call.v))
        out, statistics = self.graph.sdpa(q=q, k=k, v=v, generate_stats=training, **call.band)
        self._output(out, call.q.dense, self.io)
        if training:
            self._output(statistics, call.statistics, self.float32)
        return self

    def backward(self, call: Call) -> "Plan":
        dense = [tile.dense for tile in (call.q, call.k, call.v)]
        q, k, v = (self._input(tile, self.io) for tile in (call.q, call.k, call.v))
        out, grad_out = (self._input(dense[0], self.io) for _ in range(2))
        statistics = self._input(call.statistics, self.float32)
        gradients = self.graph.sdpa_backward(
            q=q,
            k=k,
            v=v,
            o=out,
            dO=grad_out,
            stats=statistics,
            # Its atomic additions to queries' gradients make two runs differ by rounding. The other algorithm takes a
            # workspace of the length's square (576 GiB at 131,072 tokens) and 40% longer.
            use_deterministic_algorithm=False,
            **call.band,
        )
        for gradient, tile in zip(gradients, dense, strict=True):
            self._output(gradient, tile, self.io)
        return self

    def checked(self) -> "Plan":
        """Raises what cuDNN raises where it does not compute the graph."""
        modes = _cudnn().heur_mode
        self.graph.validate()
        self.graph.build_operation_graph()
        self.graph.create_execution_plans([modes.A, modes.FALLBACK])
        self.graph.check_support()
        return self

    def compiled(self) -> "Plan":
        self.checked()
        self.graph.build_plans()
        return self

    def launch(self, tensors: Iterable[Tensor]) -> None:
        """Queues the kernels on the current stream; the workspace returns to PyTorch's allocator in stream order."""
        workspace = torch.empty(max(1, self.graph.get_workspace_size()), dtype=torch.uint8, device=self.device)
        pointers = {number: tensor.data_ptr() for number, tensor in enumerate(tensors, start=1)}
        if len(pointers) != self.tensors:
            raise ValueError(f"{len(pointers)} tensors for a graph of {self.tensors}")
        with torch.cuda.device(self.device):
            self.graph.execute(pointers, workspace.data_ptr(), handle=_handle(self.device))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        out, statistics = call.q.dense.empty(like=q), call.statistics.empty(like=q, dtype=torch.float32)
        call.plan("training").launch((q, k, v, out, statistics))
        ctx.call = call
        ctx.save_for_backward(q, k, v, out, statistics)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, statistics = ctx.saved_tensors
        call: Call = ctx.call
        grad_out = _laid_out_as(grad_out, out)
        gradients = [tile.dense.empty(like=out) for tile in (call.q, call.k, call.v)]
        call.plan("backward").launch((q, k, v, out, grad_out, statistics, *gradients))
        return *gradients, None


@lru_cache(maxsize=MAX_PLANS)
def _built(call: Call, kind: str) -> Plan | str:
    """A compiled graph, or why cuDNN does not compute it. It is kept, so that it is built once."""
    return _attempted(call, kind, Plan.compiled)


def _attempted(call: Call, kind: str, finish: Callable[[Plan], Plan]) -> Plan | str:
    """A graph of a kind, brought as far as `finish` does, or why cuDNN does not compute it."""
    try:
        with torch.cuda.device(call.device):
            plan = Plan(call, handle=_handle(call.device))
            plan = plan.backward(call) if kind == "backward" else plan.forward(call, training=kind == "training")
            return finish(plan)
    except (_cudnn().cudnnGraphNotSupportedError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        return (
            f"cuDNN {_cudnn().backend_version_string()} declines the {kind} of window attention for q {call.q.size}, "
            f"k {call.k.size}, window {call.window}: {reason}"
        )


@cache
def _cudnn() -> Any:
    return importlib.import_module("cudnn")


@cache
def _new_handle(device: torch.device) -> int:
    with torch.cuda.device(device):
        return _cudnn().create_handle()


def _handle(device: torch.device) -> int:
    handle = _new_handle(device)
    _cudnn().set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
    return handle


def _readable(tensor: Tensor) -> Tensor:
    """As cuDNN reads it: the head dimension in one piece and every row aligned. A copy where it is not so."""
    rows = ALIGNED_BYTES // tensor.element_size()
    strides = [stride for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True) if size > 1]
    fits = tensor.stride(3) == 1 and all(stride and stride % rows == 0 for stride in strides)
    if fits and tensor.data_ptr() % ALIGNED_BYTES == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _laid_out_as(tensor: Tensor, like: Tensor) -> Tensor:
    if tensor.stride() == like.stride() and tensor.data_ptr() % ALIGNED_BYTES == 0:
        return tensor
    return Tile.of(like).empty(like=like).copy_(tensor)
