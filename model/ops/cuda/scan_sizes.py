"""What our CUDA scan (cuda_scan.py) needs of a device, known before anything is compiled."""

import math

import torch

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
    """Of time, which is cut into several segments where warps alone would not fill a device."""
    tiles, warps = math.ceil(tokens / TILE_TOKENS), sequences * math.ceil(channels / WARP_CHANNELS)
    segments = min(WARPS_PER_MULTIPROCESSOR * multiprocessors // warps, tiles // MIN_SEGMENT_TILES)
    return math.ceil(tiles / max(1, segments))


def state_bytes(dtype: torch.dtype, states: int) -> int:
    """Of a warp's states before a tile, as the backward keeps them."""
    return WARP_CHANNELS * states * (4 if dtype == torch.float32 else 2)


def backward_shared_bytes(dtype: torch.dtype, states: int) -> int:
    """Shared memory of a block of the backward, the largest of the kernels: BackwardShared in scan_backward.cu."""
    # Two floats a channel; for each step 18 float4 and the states, and the states before the tile besides.
    rows = TILE_TOKENS + 1
    warp_bytes = 2 * 4 * WARP_CHANNELS + TILE_TOKENS * 18 * 16 + rows * state_bytes(dtype, states)
    projection_bytes = 2 * (2 * rows * 256 + 64)  # in two turns
    return projection_bytes + warps_of_a_block(states) * warp_bytes


def why_too_large(dtype: torch.dtype, d_state: int, *, block_memory_bytes: int) -> str | None:
    """Why a device whose blocks may have that much shared memory cannot run the scan; None when it can.

    Args:
        dtype: of activations.
    """
    if d_state > max(D_STATES):
        return f"model.d_state is {d_state} and it holds at most {max(D_STATES)} states"
    needed = backward_shared_bytes(dtype, compiled_states(d_state))
    if needed > block_memory_bytes:
        return (
            f"with {d_state} states in {str(dtype).removeprefix('torch.')} it needs {needed:,} bytes of shared memory "
            f"a block and this GPU has {block_memory_bytes:,}"
        )
    return None
