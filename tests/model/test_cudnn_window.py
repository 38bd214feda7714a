"""What cuDNN is asked for, and how tensors must lie in memory for it. Its kernels need a GPU (tests/gpu)."""

from types import SimpleNamespace

import pytest
import torch

from sambalm.model.ops.attention import cudnn
from sambalm.model.ops.attention.cudnn import Tile, _laid_out_as, _readable
from sambalm.model.ops.implementations import AttentionCall

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


@pytest.mark.parametrize(
    ("queries", "keys", "window", "bound", "alignment"),
    [(32, 32, 8, 8, "top left"), (32, 39, 8, 8, "bottom right"), (8, 8, 8, None, "top left")],
)
def test_a_query_sees_its_own_key_and_those_of_a_window_less_one(queries, keys, window, bound, alignment, monkeypatch):
    alignments = SimpleNamespace(TOP_LEFT="top left", BOTTOM_RIGHT="bottom right")
    monkeypatch.setattr(cudnn, "_cudnn", lambda: SimpleNamespace(diagonal_alignment=alignments))
    q, k = torch.zeros(1, 2, queries, 16), torch.zeros(1, 1, keys, 16)
    assert cudnn.Call.of(q, k, k, window=window).band == {
        "attn_scale": 0.25,
        "diagonal_alignment": alignment,
        "diagonal_band_left_bound": bound,  # cuDNN counts the query's own key
        "diagonal_band_right_bound": 0,
    }


def test_keys_that_no_query_sees_are_not_asked_for():
    sizes = {"batch": 1, "query_heads": 2, "kv_heads": 1, "head_dim": 16, "window": 8}
    for keys, seen in ((40, 39), (39, 39), (36, 36)):
        call = AttentionCall(queries=32, keys=keys, **sizes)
        assert cudnn.Call.sequence_first(call, dtype=torch.bfloat16, device=torch.device("cpu")).k.size[2] == seen
