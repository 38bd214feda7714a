"""How tensors must lie in memory for cuDNN. Its kernels need a GPU (tests/gpu)."""

import pytest
import torch

from sambalm.model.ops.attention.cudnn import Tile, _laid_out_as, _readable

FUSED = torch.zeros(10, 2, 8, 64, dtype=torch.bfloat16)  # [tokens, batch, heads of q, k and v, head dim]


@pytest.mark.parametrize(
    "tensor",
    [
        FUSED.permute(1, 2, 0, 3),
        FUSED[:, :, 4:6].permute(1, 2, 0, 3),
        FUSED.permute(1, 2, 0, 3).contiguous()[:, :, 3:],
        FUSED[:1].permute(1, 2, 0, 3),
    ],
)
def test_aligned_views_are_taken_as_they_are(tensor):
    assert _readable(tensor) is tensor
    dense = Tile.of(tensor).dense
    assert dense.stride == torch.empty_like(tensor).stride()
    assert sorted(range(4), key=lambda i: dense.stride[i]) == sorted(range(4), key=lambda i: tensor.stride(i))


@pytest.mark.parametrize(
    "tensor",
    [
        FUSED.flatten()[1 : 1 + 9 * 2 * 8 * 64].view(9, 2, 8, 64),  # begins at an odd address
        FUSED[..., ::2],
        FUSED[..., :60].contiguous(),  # rows of 120 bytes
        FUSED[:, :, :1].expand(10, 2, 4, 64),
    ],
)
def test_others_are_copied(tensor):
    copy = _readable(tensor)
    assert copy is not tensor
    assert copy.is_contiguous()
    assert torch.equal(copy, tensor)


def test_a_gradient_takes_the_layout_of_its_output():
    out = FUSED.permute(1, 2, 0, 3)
    assert _laid_out_as(out, out) is out
    gradient = torch.randn(2, 8, 10, 64, dtype=torch.bfloat16)
    moved = _laid_out_as(gradient, out)
    assert moved.stride() == out.stride()
    assert torch.equal(moved, gradient)
    assert _laid_out_as(torch.ones((), dtype=torch.bfloat16).expand(out.shape), out).stride() == out.stride()
