"""What a layer brings so that one token a row can go through a model as one CUDA graph (see `decoder.py`)."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn

from sambalm.model.ops.decode.linear import Norm, ResidualStream, Workspace

from .layers import SambaLayer
from .names import hf_side


class LayerStep(ABC):
    """A layer with the norm before it and the residual sum behind it, for one further token of each row.

    It takes the weights as they are when it is made, and keeps the state of its rows in tensors that stay where they
    are. What it launches depends on no value of any tensor.
    """

    def __init__(self, layer: SambaLayer, norm: Norm, workspace: Workspace) -> None:
        self.config, self.norm, self.workspace = layer.config, norm, workspace

    @abstractmethod
    def __call__(self, stream: ResidualStream, positions: Tensor, following: Tensor) -> None:
        """Adds the layer's result to the residual stream, which is scaled by the weight of the layer's norm.

        Args:
            positions: int64 [B], how many tokens each row has read before.
            following: the weight of the norm that comes next, by which it leaves the stream scaled.
        """

    def load(self, state: Mapping[str, Tensor], seen_tokens: list[int]) -> None:  # noqa: B027 - most layers hold none
        """Takes the state of the first rows, by the names that `state` gives; it is empty before the first token."""

    def state(self, seen_tokens: list[int]) -> dict[str, Tensor]:
        """Returns copies of the first rows' state as caches have it: conv, scan, or keys and values, oldest first."""
        return {}


def step_class(letter: str) -> type[LayerStep] | None:
    """Returns what steps the layers of a letter; None: they cannot be stepped so."""
    name = hf_side(letter).step
    if name is None:
        return None
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def plain(module: nn.Module) -> Tensor:
    """Returns a module's weight as it is."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def taken(buffer: Tensor, state: Tensor | None) -> None:
    """Fills a buffer with a state; with zeros where there is none."""
    if state is None:
        buffer.zero_()
    else:
        buffer.copy_(state)
