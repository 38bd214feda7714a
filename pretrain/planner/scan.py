"""How long our CUDA scan takes on a device: its blocks, dealt to multiprocessors, which wait for the busiest one."""

import math
from dataclasses import dataclass

from sambalm.model.ops.cuda.scan_sizes import TILE_TOKENS, WARP_CHANNELS, tiles_of_a_segment, warps_of_a_block
from sambalm.pretrain.planner.hardware import H100, Hardware

BLOCK_CHANNELS = WARP_CHANNELS * warps_of_a_block(16)


@dataclass(frozen=True)
class _Pass:
    """The forward or the backward on one H200, whose clock is an H100's (benchmarks/kernels.py; 16 states, bf16)."""

    token_s: float  # of each of the blocks that share a multiprocessor
    ends_share: float  # of that, what the first pass over segments takes for the states that they reach
    ends_start_s: float  # besides: its launches, and those that make segments' starts of the states


# B4 D5632 L4096: 352 blocks, of which 88 multiprocessors have three. The first pass from B1 D5632 of 131072 tokens, and
# its start from B1 D5632 and B1 D3072 of 4096.
_BUSIEST_BLOCKS, _TOKENS = 3, 4096
FORWARD = _Pass(0.728e-3 / _TOKENS / _BUSIEST_BLOCKS, ends_share=0.77, ends_start_s=27e-6)
BACKWARD = _Pass(2.142e-3 / _TOKENS / _BUSIEST_BLOCKS, ends_share=0.31, ends_start_s=40e-6)


def cuda_scan_s(*, sequences: int, channels: int, tokens: int, hardware: Hardware, again: bool) -> float:
    """The time of a forward and a backward, and of a second forward if again."""
    segment_tiles = tiles_of_a_segment(
        sequences=sequences, channels=channels, tokens=tokens, multiprocessors=hardware.multiprocessors
    )
    segments = math.ceil(math.ceil(tokens / TILE_TOKENS) / segment_tiles)
    blocks = sequences * math.ceil(channels / BLOCK_CHANNELS)

    def pass_s(one: _Pass) -> float:
        segment_s = segment_tiles * TILE_TOKENS * one.token_s * H100.clock_ghz / hardware.clock_ghz
        busiest, busiest_of_ends = (
            math.ceil(blocks * count / hardware.multiprocessors) for count in (segments, segments - 1)
        )
        ends_s = busiest_of_ends * segment_s * one.ends_share + one.ends_start_s if segments > 1 else 0.0
        return busiest * segment_s + ends_s

    return pass_s(FORWARD) * (2 if again else 1) + pass_s(BACKWARD)
