"""The selective scan in CUDA C++ (source/scan_*): softplus, skip and gate fused, states from and to anywhere.

Time is walked in order with the states in registers; nothing is stored a step and state. The forward keeps the states
before every 16th token for the backward, which computes those between again. Where batch and channels alone would not
fill the device, time is cut into segments: a first pass finds the state that each reaches from zero, and from these
follow the states that the segments start at. No atomics: two runs give the same bits.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sambalm.model.ops.cuda.memory import (
    EIGHT,
    INPUTS,
    aligned,
    dense,
    dense_strides,
    filled_up,
    sequence_first,
    strides,
)
from sambalm.model.ops.cuda.nvrtc import Kernel, kernel
from sambalm.model.ops.cuda.scan_sizes import (
    D_STATES,
    TILE_TOKENS,
    WARP_CHANNELS,
    WARPS_PER_MULTIPROCESSOR,
    backward_shared_bytes,
    border_bytes,
    compiled_states,
    tiles_of_a_segment,
    warps_of_a_block,
)
from sambalm.model.ops.errors import KernelError


def cuda_selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor,
    z: Tensor | None,
    dt_bias: Tensor,
    initial_state: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`selective_scan.gated_selective_scan` on a GPU: the same arguments and results, at most 64 states.

    All is computed in fp32. With 16-bit inputs the states that the forward keeps for the backward, before every 16th
    token, are rounded to 2^-15 of the largest of four neighbours. Raises KernelError for more states.
    """
    channels, states = A.shape
    if states > max(D_STATES):
        raise KernelError(
            f"model.d_state is {states} and the scan 'cuda' holds at most {max(D_STATES)}: set kernels.scan to "
            "'mamba-ssm' or 'torch'"
        )
    more_channels, more_states = -channels % EIGHT, compiled_states(states) - states
    u, dt = (filled_up(t, more_channels) for t in (u, dt.to(u.dtype)))
    gate = None if z is None else aligned(filled_up(z.to(u.dtype), more_channels))
    A = filled_up(A.float(), more_states, more_channels)
    BC = torch.cat([filled_up(t, more_states) for t in (B, C)], dim=-1).float()
    D, dt_bias = (filled_up(t.float(), more_channels) for t in (D, dt_bias))
    if initial_state is not None:
        initial_state = filled_up(initial_state.float(), more_states, more_channels).contiguous()
    if resets is not None:
        resets = resets.to(torch.uint8).contiguous()
    y, state = _Scan.apply(
        dense(u), dense(dt), A.contiguous(), BC, D.contiguous(), gate, dt_bias.contiguous(), initial_state, resets
    )
    return y[..., :channels], state[:, :channels, :states]


@dataclass(frozen=True)
class _Shape:
    """Sizes of a call and how it is spread over the device."""

    dtype: torch.dtype
    batch: int
    length: int
    channels: int
    states: int
    segment_tiles: int
    has_gate: bool = True

    @classmethod
    def of(cls, u: Tensor, A: Tensor, *, has_gate: bool = True) -> "_Shape":
        batch, length, channels = u.shape
        multiprocessors = torch.cuda.get_device_properties(u.device).multi_processor_count
        segment_tiles = tiles_of_a_segment(
            sequences=batch, channels=channels, tokens=length, multiprocessors=multiprocessors
        )
        return cls(u.dtype, batch, length, channels, A.shape[1], segment_tiles=segment_tiles, has_gate=has_gate)

    @property
    def tiles(self) -> int:
        return math.ceil(self.length / TILE_TOKENS)

    @property
    def segments(self) -> int:
        return math.ceil(self.tiles / self.segment_tiles)

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return warps_of_a_block(self.states)

    @property
    def grid(self) -> tuple[int, int, int]:
        return math.ceil(self.channels / (WARP_CHANNELS * self.warps)), self.batch, self.segments

    @property
    def grid_of_ends(self) -> tuple[int, int, int]:
        """The grid of the first pass, in which one of the segments has nothing to tell."""
        blocks, batch, segments = self.grid
        return blocks, batch, segments - 1

    @property
    def border_bytes(self) -> int:
        """Bytes of a warp's states before a tile."""
        return border_bytes(self.states, element_bytes=self.dtype.itemsize)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.length, self.channels, self.segments, self.segment_tiles

    def kernel(self, name: str, *, ends: bool = False) -> Kernel:
        compact = self.dtype != torch.float32 and self.states == 16
        backward_bytes = backward_shared_bytes(self.states)
        shared_bytes = backward_bytes if name == "scan_backward" else 0
        defines = {
            "INPUT": INPUTS[self.dtype],
            "N": self.states,
            "ENDS": int(ends),
            "GATED": int(self.has_gate),
            "WARPS": self.warps,
            "BLOCKS": WARPS_PER_MULTIPROCESSOR // self.warps if compact else 1,
            "SHARED_BYTES": shared_bytes,
        }
        return kernel(name, "elements.cuh", "scan_common.cuh", f"{name}.cu", defines=defines, shared_bytes=shared_bytes)

    def at_segments(
        self, reached: Tensor, steps: Tensor, A: Tensor, start: Tensor | None, *, backwards: bool
    ) -> Tensor:
        """[batch, segments, channels, states] at the start (backwards: at the end) of each segment."""
        result = torch.empty_like(reached)
        blocks = math.ceil(self.channels * self.states / 256)
        self.kernel("scan_combine")(
            (blocks, self.batch, 1), 256, reached, steps, A, start, result, self.segments, self.channels, int(backwards)
        )
        return result


def _places(u: Tensor, z: Tensor | None) -> list[int]:
    """The strides of u and z, as the kernels take them; they read no z where there is none."""
    return [*dense_strides(u), *strides(u if z is None else z)]


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        BC: Tensor,
        D: Tensor,
        z: Tensor | None,
        dt_bias: Tensor,
        initial_state: Tensor | None,
        resets: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        shape = _Shape.of(u, A, has_gate=z is not None)
        threads = 32 * shape.warps
        per_segment = (shape.batch, shape.segments, shape.channels)
        start = initial_state
        inputs, at = (u, dt, z, BC, A, D, dt_bias, resets), _places(u, z)
        if shape.segments > 1:
            reached, steps = A.new_empty(*per_segment, shape.states), A.new_empty(per_segment)
            shape.kernel("scan_forward", ends=True)(
                shape.grid_of_ends, threads, *inputs, None, None, None, reached, steps, *shape.sizes, *at
            )
            start = shape.at_segments(reached, steps, A, initial_state, backwards=False)
        out, end = sequence_first(u), A.new_empty(shape.batch, shape.channels, shape.states)
        borders = None
        if any(ctx.needs_input_grad):
            warps = math.ceil(shape.channels / WARP_CHANNELS)
            borders = torch.empty(
                shape.batch * shape.tiles * warps * shape.border_bytes, dtype=torch.uint8, device=u.device
            )
        shape.kernel("scan_forward")(shape.grid, threads, *inputs, start, out, borders, end, None, *shape.sizes, *at)
        ctx.shape, ctx.has_start = shape, initial_state is not None
        ctx.save_for_backward(u, dt, A, BC, D, z, dt_bias, resets, borders)
        return out, end

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_end: Tensor | None) -> tuple[Tensor | None, ...]:
        u, dt, A, BC, D, z, dt_bias, resets, borders = ctx.saved_tensors
        shape: _Shape = ctx.shape
        threads, per_segment = 32 * shape.warps, (shape.batch, shape.segments, shape.channels)
        grad_out = torch.zeros_like(u) if grad_out is None else dense(grad_out)
        grad_end = None if grad_end is None else grad_end.contiguous()
        inputs = (u, dt, z, BC, A, D, dt_bias, resets, borders, grad_out)
        at = _places(u, z)
        if shape.segments > 1:
            handed, steps = A.new_empty(*per_segment, shape.states), A.new_empty(per_segment)
            shape.kernel("scan_backward", ends=True)(
                shape.grid_of_ends, threads, *inputs, *7 * [None], steps, handed, *shape.sizes, *at
            )
            grad_end = shape.at_segments(handed, steps, A, grad_end, backwards=True)
        grad_u, grad_dt = (sequence_first(u) for _ in range(2))
        grad_z = None if z is None else sequence_first(u)
        grad_BC = A.new_empty(shape.grid[0], *BC.shape)
        grad_A = A.new_empty(*per_segment, shape.states)
        grad_D, grad_bias = A.new_empty(per_segment), A.new_empty(per_segment)
        grad_start = A.new_empty(shape.batch, shape.channels, shape.states)
        outputs = (grad_u, grad_dt, grad_z, grad_BC, grad_A, grad_D, grad_bias, grad_start)
        shape.kernel("scan_backward")(shape.grid, threads, *inputs, grad_end, *outputs, *shape.sizes, *at)
        grad_A, grad_D, grad_bias = (t.sum((0, 1)) for t in (grad_A, grad_D, grad_bias))
        grad_start = grad_start if ctx.has_start else None
        return grad_u, grad_dt, grad_A, grad_BC.sum(0), grad_D, grad_z, grad_bias, grad_start, None
