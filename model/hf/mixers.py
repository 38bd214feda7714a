"""The layers of a pattern's letters, by the registry.

An exported folder has another file of this name, which lists the letters of its own pattern and imports copies of their
layers (see `sambalm.model.hf.folder_code`).
"""

import importlib

from .layers import SambaLayer
from .names import hf_side


def layer_class(letter: str) -> type[SambaLayer]:
    """Returns the class of a letter's layer. Raises HFError for a letter without one."""
    side = hf_side(letter)
    return getattr(importlib.import_module(side.module), side.layer)


def fp32_tensors(letter: str) -> tuple[str, ...]:
    """Returns the tensors of a letter's layer, by their names in it, that are fp32 in a model of any dtype."""
    return tuple(name for name, tensor in hf_side(letter).tensors.items() if tensor.is_fp32)
