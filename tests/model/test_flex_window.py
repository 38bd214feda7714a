"""The blocks that flex_attention visits: whole blocks skip the mask, blocks that are not listed are not seen."""

import pytest
import torch

from sambalm.model.ops.attention.flex import BLOCK, _window_blocks, document_blocks
from sambalm.model.ops.reference.window_attention import window_mask


@pytest.mark.parametrize("window", [1, 64, 128, 300, 2048])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (700, 700), (130, 193), (512, 512), (64, 500)])
def test_blocks_hold_what_the_window_sees(queries, keys, window):
    blocks = _window_blocks(queries, keys, window, torch.device("cpu"))
    numbers = torch.arange(keys - queries, keys)
    _check(blocks, window_mask(numbers, torch.arange(keys), window=window).unsqueeze(0))


@pytest.mark.parametrize("window", [1, 128, 300, 2048])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (700, 700), (130, 193), (512, 512), (64, 500), (400, 1100)])
def test_blocks_hold_what_a_window_sees_of_documents(queries, keys, window):
    """Long documents and many short ones, others in each row, one row being one document."""
    generator = torch.Generator().manual_seed(queries + keys + window)
    shares = torch.tensor([0.0, 0.003, 0.02, 0.3]).unsqueeze(1)
    begins = torch.rand(len(shares), keys, generator=generator) < shares
    starts = (torch.arange(keys) * begins).cummax(1).values[:, keys - queries :]
    seen = window_mask(torch.arange(keys - queries, keys), torch.arange(keys), window=window)
    blocks = document_blocks(starts, keys=keys, window=window)
    _check(blocks, seen & (torch.arange(keys) >= starts.unsqueeze(2)))
    rows, queries_of, keys_of = torch.arange(len(shares)), torch.arange(queries), torch.arange(keys)
    mask = blocks.mask_mod(rows.view(-1, 1, 1), 0, queries_of.view(-1, 1), keys_of)
    assert torch.equal(mask, seen & (keys_of >= starts.unsqueeze(2)))


def _check(blocks, mask):
    """Every block that holds a pair of the mask is listed, as whole only where it holds all; [batch, queries, keys]."""
    for number, pairs in enumerate(mask):
        _check_row(blocks, number, pairs)


def _check_row(blocks, number, pairs):
    queries, keys = pairs.shape
    seen = torch.zeros(-(-queries // BLOCK) * BLOCK, -(-keys // BLOCK) * BLOCK, dtype=torch.bool)
    seen[:queries, :keys] = pairs
    seen = seen.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).transpose(1, 2)  # [rows, columns, BLOCK, BLOCK]
    # Queries beyond the last are nobody's, so a block may be whole without them.
    real = torch.arange(seen.shape[0] * BLOCK).view(-1, 1, BLOCK, 1) < queries
    parts = blocks.kv_num_blocks[number, 0], blocks.kv_indices[number, 0]
    wholes = blocks.full_kv_num_blocks[number, 0], blocks.full_kv_indices[number, 0]
    for row in range(seen.shape[0]):
        part, whole = (set(indices[row, : counts[row]].tolist()) for counts, indices in (parts, wholes))
        assert not part & whole
        assert part | whole == {column for column in range(seen.shape[1]) if seen[row, column].any()}
        assert whole == {column for column in range(seen.shape[1]) if (seen[row, column] | ~real[row, 0]).all()}, (
            "a block that could skip the mask does not"
        )
