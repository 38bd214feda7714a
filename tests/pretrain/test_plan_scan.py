"""The planner's time of our CUDA scan against measurements, and its segments against the kernel's own."""

from types import SimpleNamespace

import pytest
import torch

from sambalm.model.ops.cuda_scan import _Shape
from sambalm.pretrain.plan_hardware import DEVICES, H100
from sambalm.pretrain.plan_scan import cuda_scan_s, segments_of

# Forward and backward in ms of one H100 80GB, 16 states, bf16 (docs/performance.md).
MEASURED = {
    (1, 3072, 4096): 0.577,
    (8, 3072, 4096): 2.845,
    (4, 4608, 4096): 2.829,
    (1, 5632, 4096): 0.980,
    (4, 5632, 4096): 2.842,
    (1, 5632, 131072): 29.3,
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
    assert twice - once == pytest.approx(0.712)


@pytest.mark.parametrize("multiprocessors", [108, 132])
@pytest.mark.parametrize("tokens", [1, 100, 2048, 4096, 131072])
@pytest.mark.parametrize("channels", [40, 704, 3072, 4608, 5632])
@pytest.mark.parametrize("sequences", [1, 2, 3, 4, 16])
def test_segments_are_the_kernels_own(monkeypatch, sequences, channels, tokens, multiprocessors):
    device = SimpleNamespace(multi_processor_count=multiprocessors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    u = torch.empty(sequences, tokens, channels, device="meta", dtype=torch.bfloat16)
    shape = _Shape.of(u, torch.empty(channels, 16, device="meta"))
    found = segments_of(sequences=sequences, channels=channels, tokens=tokens, multiprocessors=multiprocessors)
    assert found == (shape.segments, shape.segment_tiles)
