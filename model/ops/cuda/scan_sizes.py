"""What our CUDA scan (scan.py) needs of a device, known before anything is compiled. Needs no torch."""

import math

TILE_TOKENS = 16
WARP_CHANNELS = 16
WARPS_PER_MULTIPROCESSOR = 12  # that keep it busy
MIN_SEGMENT_TILES = 8
D_STATES = (16, 32, 64)  # what the kernels are compiled for; others are filled up with zeros


def compiled_states(d_state: int) -> int:
    """The states of the kernel that runs `d_state` of them; at most 64."""
    return next(n for n in D_STATES if n >= d_state)


def warps_of_a_block(states: int) -> int:
    """Four tiles of 64 states would not fit into shared memory."""
    return 2 if states == 64 else 4


def tiles_of_a_segment(*, sequences: int, channels: int, tokens: int, multiprocessors: int) -> int:
    """Tiles of one segment of time; there are several segments where warps alone would not fill a device."""
    tiles, warps = math.ceil(tokens / TILE_TOKENS), sequences * math.ceil(channels / WARP_CHANNELS)
    segments = min(WARPS_PER_MULTIPROCESSOR * multiprocessors // warps, tiles // MIN_SEGMENT_TILES)
    return math.ceil(tiles / max(1, segments))


def border_bytes(states: int, *, element_bytes: int) -> int:
    """Bytes of a warp's states before a tile, as the forward keeps them, with activations of so many bytes each."""
    exponents = WARP_CHANNELS * states // 4 if element_bytes < 4 else 0  # a byte for four states
    return WARP_CHANNELS * states * element_bytes + exponents


def backward_shared_bytes(states: int) -> int:
    """Shared memory of a block of the backward, the largest of the kernels: BackwardShared in scan_backward.cu."""
    # Two floats a channel; 18 float4 for each step, and the states in fp32 for each two.
    warp_bytes = 2 * 4 * WARP_CHANNELS + TILE_TOKENS * 18 * 16 + TILE_TOKENS // 2 * WARP_CHANNELS * states * 4
    projection_bytes = 2 * (2 * (TILE_TOKENS + 1) * 256 + 64)  # in two turns
    return projection_bytes + warps_of_a_block(states) * warp_bytes


def why_too_large(d_state: int, *, block_memory_bytes: int) -> str | None:
    """Why a device whose blocks may have that much shared memory cannot run the scan; None when it can.

    Args:
        d_state: at most 64.
    """
    needed = backward_shared_bytes(compiled_states(d_state))
    if needed > block_memory_bytes:
        return (
            f"with {d_state} states it needs {needed:,} bytes of shared memory a block and this GPU has "
            f"{block_memory_bytes:,}"
        )
    return None
