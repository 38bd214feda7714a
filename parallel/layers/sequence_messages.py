"""What tensor-parallel ranks send each other around a column-parallel product, on its way while they compute."""

import torch.distributed as dist
from torch import Tensor

from sambalm.parallel.groups import TensorParallel


class Gathered:
    """All ranks' sequence shards, joined along dimension 0, on their way under sequence parallelism; else x itself."""

    def __init__(self, x: Tensor, tp: TensorParallel) -> None:
        self.x, self.work = x, None
        if tp.size > 1 and tp.sequence:
            self.shard = x.contiguous()
            self.x = x.new_empty(tp.size * x.shape[0], *x.shape[1:])
            self.work = dist.all_gather_into_tensor(self.x, self.shard, group=tp.group, async_op=True)

    def wait(self) -> Tensor:
        if self.work:
            self.work.wait()
        return self.x


class Summed:
    """The sum of the ranks' rows on its way, or this rank's sequence shard of it under sequence parallelism."""

    def __init__(self, rows: Tensor, tp: TensorParallel) -> None:
        self.rows, self.sum, self.work = rows, rows, None
        if tp.size > 1 and tp.sequence:
            self.sum = rows.new_empty(rows.shape[0] // tp.size, rows.shape[1])
            self.work = dist.reduce_scatter_tensor(self.sum, rows, group=tp.group, async_op=True)
        elif tp.size > 1:
            self.work = dist.all_reduce(rows, group=tp.group, async_op=True)

    def wait(self) -> Tensor:
        if self.work:
            self.work.wait()
        return self.sum
