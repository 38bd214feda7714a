"""Test processes of pytest-xdist begin with another GPU each: `pytest tests/gpu -n 4` uses all that there are."""

import os

from tests.conftest import has_cuda_device


def turned(gpus: list[str], worker: str) -> list[str]:
    """All GPUs, a test process's own one first: tests of several GPUs still see all of them."""
    turn = int(worker.removeprefix("gw")) % len(gpus)
    return gpus[turn:] + gpus[:turn]


if "PYTEST_XDIST_WORKER" in os.environ and has_cuda_device():
    import torch

    listed = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(turned(listed.split(","), os.environ["PYTEST_XDIST_WORKER"]))
