"""The planner's time of our CUDA scan against measurements, and the segments of time that the kernel works on."""

import pytest

from sambalm.model.ops.cuda.scan_sizes import tiles_of_a_segment
from sambalm.pretrain.planner.hardware import DEVICES, H100
from sambalm.pretrain.planner.scan import cuda_scan_s

# Forward and backward in ms of one H200, 16 states, bf16 (docs/performance.md).
MEASURED = {
    (1, 3072, 4096): 0.576,
    (8, 3072, 4096): 2.881,
    (4, 4608, 4096): 2.858,
    (1, 5632, 4096): 0.983,
    (4, 5632, 4096): 2.870,
    (1, 5632, 131072): 29.54,
}


def estimated_ms(sequences, channels, tokens, *, device=H100, again=False):
    shape = {"sequences": sequences, "channels": channels, "tokens": tokens}
    return cuda_scan_s(**shape, hardware=device, again=again) * 1e3


@pytest.mark.parametrize("shape", MEASURED, ids=str)
def test_the_scan_takes_what_was_measured(shape):
    assert estimated_ms(*shape) == pytest.approx(MEASURED[shape], rel=0.03)


def test_multiprocessors_wait_for_the_busiest():
    assert estimated_ms(4, 4608, 4096) == estimated_ms(4, 5632, 4096)  # 288 and 352 blocks, three on the busiest
    assert estimated_ms(8, 5632, 4096) == 2 * estimated_ms(4, 5632, 4096)
    # 352 blocks are four on the busiest of an A100's 108 multiprocessors, whose clock is slower.
    on_a100 = estimated_ms(4, 5632, 4096, device=DEVICES["a100"])
    assert on_a100 == pytest.approx(4 / 3 * 1.98 / 1.41 * estimated_ms(4, 5632, 4096))


def test_recompute_adds_a_forward():
    once, twice = (estimated_ms(4, 5632, 4096, again=again) for again in (False, True))
    assert twice - once == pytest.approx(0.728)


@pytest.mark.parametrize(
    ("sequences", "channels", "tokens", "multiprocessors", "tiles"),
    [
        (4, 5632, 4096, 132, 256),  # 1,408 warps of 1,584: one segment of all tiles of 16 tokens
        (1, 12688, 4096, 132, 256),  # 793 warps are more than half of them
        (1, 12672, 4096, 132, 128),  # 792 are half
        (16, 5632, 4096, 132, 256),  # 5,632 are too many
        (1, 5632, 4096, 132, 64),  # 352 warps, four in 1,584
        (1, 5632, 131072, 132, 2048),
        (1, 5632, 4096, 108, 86),  # three in 1,296
        (1, 40, 4096, 132, 8),  # no segment is shorter than eight tiles
        (1, 40, 100, 132, 7),  # nor cut from fewer
    ],
)
def test_time_is_cut_where_warps_do_not_fill_the_device(sequences, channels, tokens, multiprocessors, tiles):
    shape = {"sequences": sequences, "channels": channels, "tokens": tokens}
    assert tiles_of_a_segment(**shape, multiprocessors=multiprocessors) == tiles
