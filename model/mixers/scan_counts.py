"""What the selective scan and the passing of its states keep and send, for the mixers that have it. Imports no torch.

T: tokens of a micro-batch on the rank, D: channels on the rank, N: states; `a` is the bytes of an activation.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from sambalm.model.mixers.counts import FP32_BYTES, Message, Share, halo_message

# For each channel and state: dt * A, its exponential, decay * h, dt * u * B (one of its two products is shared by the
# states), the sum, C * h and the sum over states.
SCAN_FLOPS = 7
CUDA_SCAN_CHUNK_TOKENS = 16  # model/ops/cuda/scan.py keeps states before each, in 16 bits with 16-bit inputs
MAMBA_SSM_CHUNK_TOKENS = 2048  # mamba-ssm 2.3.2 (csrc/selective_scan) keeps a pair of fp32 states for each


@dataclass(frozen=True)
class ScanCounts:
    """One layer's scan on one rank."""

    channels: int
    states: int
    share: Share
    has_gate: bool = True

    def inside_bytes(self) -> int:
        """Counts what a scan keeps that selective recomputation drops: states, and more besides u, z and its output."""
        return self._states_bytes() + self._scan_bytes()

    def context_bytes(self, *, inside: bool) -> int:
        """Counts what passing states over context-parallel ranks keeps."""
        ranks, D, N, T = self.share.context_ranks, self.channels, self.states, self.share.tokens
        states, total = FP32_BYTES * self.share.sequences * D * N, 0
        if ranks > 1:  # all ranks' decays and reached states, and the state at the start
            total += (2 * ranks + 1) * states
        if ranks > 2:  # a rank between others: the step sizes and the decay that it passes on
            total += FP32_BYTES * T * D + 2 * states
            if inside:  # and a scan from zero, of which the output and so the gate are not kept
                in_torch = FP32_BYTES * T * (3 * D + 2 * N if self.share.is_narrow else 2 * D)
                total += in_torch if self.share.kernels.scan == "torch" else self._scan_bytes()
                total += self._states_bytes()
        return total

    def chunk_bytes(self) -> int:
        """Counts one buffer of a chunk's states in the scan in PyTorch, whose backward has decays, states and more."""
        if self.share.kernels.scan != "torch":
            return 0
        token = self._state_elements()
        return FP32_BYTES * token * _torch_chunk_tokens(token, self.share)

    def messages(self, *, d_conv: int) -> Iterator[Message]:
        """Yields what context-parallel ranks send: states, and what the convolution before the scan sees."""
        ranks = self.share.context_ranks
        if ranks == 1:
            return
        states = 2 * self._state_elements() * FP32_BYTES
        yield Message("context", "all-gather", ranks, states, times=self.share.forwards)
        yield Message("context", "reduce-scatter", ranks, ranks * states)
        yield halo_message(self.channels, d_conv - 1, self.share)

    def _scan_bytes(self) -> int:
        a, T, N, D = self.share.activation_bytes, self.share.tokens, self.states, self.channels
        if self.share.kernels.scan == "mamba-ssm":  # u, dt, B and C time-innermost, z and the output before the gate
            return a * T * ((4 if self.has_gate else 2) * D + 2 * N)
        if self.share.kernels.scan == "cuda":  # dt, and B and C in fp32
            return T * (a * D + FP32_BYTES * 2 * N)
        # softplus's argument and result, with a gate the sum with the skip and the gate; u and z in fp32 where they
        # were not.
        tensors = 4 if self.has_gate else 2
        narrow = D * (2 if self.has_gate else 1) + 2 * N if self.share.is_narrow else 0
        return FP32_BYTES * T * (tensors * D + narrow)

    def _states_bytes(self) -> int:
        """Counts the states that a scan keeps at the borders of its chunks."""
        one, tokens = self._state_elements(), self.share.part_tokens
        if self.share.kernels.scan == "mamba-ssm":
            return math.ceil(tokens / MAMBA_SSM_CHUNK_TOKENS) * 2 * one * FP32_BYTES
        if self.share.kernels.scan == "cuda":
            exponents = one // 4 if self.share.is_narrow else 0
            return math.ceil(tokens / CUDA_SCAN_CHUNK_TOKENS) * (one * self.share.activation_bytes + exponents)
        return math.ceil(tokens / _torch_chunk_tokens(one, self.share)) * one * FP32_BYTES

    def _state_elements(self) -> int:
        return self.share.sequences * self.channels * self.states


def _torch_chunk_tokens(token_elements: int, share: Share) -> int:
    """Returns the tokens that the scan in plain PyTorch takes at a time."""
    from sambalm.model.ops.reference.selective_scan import CHUNK_ELEMENTS, MAX_CHUNK_TOKENS

    return max(1, min(MAX_CHUNK_TOKENS, CHUNK_ELEMENTS[share.kernels.device] // token_elements))
