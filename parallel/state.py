"""Who the other ranks are. `TensorParallel` is what a layer needs to know of them; `World` is what the run needs."""

from dataclasses import dataclass

from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class TensorParallel:
    """This rank's place among those that share each layer. The default is a process on its own, without any group."""

    rank: int = 0
    size: int = 1
    sequence: bool = False  # whether activations between the layers' matrix products are cut along the sequence too
    group: ProcessGroup | None = None
