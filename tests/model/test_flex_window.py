"""The blocks that flex_attention visits: whole blocks skip the mask, blocks that are not listed are not seen."""

import pytest
import torch

from sambalm.model.ops.attention.flex import BLOCK, _window_blocks
from sambalm.model.ops.reference.window_attention import window_mask


@pytest.mark.parametrize("window", [1, 64, 128, 300, 2048])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (700, 700), (130, 193), (512, 512), (64, 500)])
def test_blocks_hold_what_the_window_sees(queries, keys, window):
    blocks = _window_blocks(queries, keys, window, torch.device("cpu"))
    seen = torch.zeros(-(-queries // BLOCK) * BLOCK, -(-keys // BLOCK) * BLOCK, dtype=torch.bool)
    numbers = torch.arange(keys - queries, keys)
    seen[:queries, :keys] = window_mask(numbers, torch.arange(keys), window=window)
    seen = seen.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).transpose(1, 2)  # [rows, columns, BLOCK, BLOCK]
    # Queries beyond the last are nobody's, so a block may be whole without them.
    real = torch.arange(seen.shape[0] * BLOCK).view(-1, 1, BLOCK, 1) < queries
    parts = blocks.kv_num_blocks[0, 0], blocks.kv_indices[0, 0]
    wholes = blocks.full_kv_num_blocks[0, 0], blocks.full_kv_indices[0, 0]
    for row in range(seen.shape[0]):
        part, whole = (set(indices[row, : counts[row]].tolist()) for counts, indices in (parts, wholes))
        assert not part & whole
        assert part | whole == {column for column in range(seen.shape[1]) if seen[row, column].any()}
        assert all((seen[row, column] | ~real[row, 0]).all() for column in whole)
