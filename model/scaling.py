"""Learning rates by width and depth: muP (arXiv 2203.03466) and Depth-muP (arXiv 2310.02244), `model.scaling: mup`.

What is tuned on a narrow and shallow model, `model.base`, then serves a wide and deep one. A layer says how a tensor's
steps depend on sizes by the fill that it gives it (`initialization.py`). The base's layers give the numbers that these
are compared with, so nothing here knows a mixer.

A multiplier in the forward would be the other way to write the same. Under AdamW a weight that is multiplied by c is a
weight that begins c times as large and takes steps c times as large. So the attention's and the output's multiplier and
that of the residual branches lie in weights, and a model computes the same with scaling and without: kernels, Hugging
Face folders and checkpoints know nothing of it.
"""

import math
from collections import defaultdict

import torch

from sambalm.model.samba import Samba
from sambalm.parallel.sharding import canonical_slices
from sambalm.parallel.zero.parameter_info import Init, info_of

_DIGITS = 9  # that tell learning rates apart: equal ones must not differ by a rounding, for each has buckets of its own


def set_lr_scales(model: Samba) -> None:
    """Sets `ParameterInfo.lr_scale` of a model, or of a pipeline's part of it; without `model.scaling` all stay 1."""
    config, base = model.config, model.config.base_model
    if config.scaling is None:
        return
    with torch.device("meta"):
        tuned = Samba(base)
    steps = {_kind(name, base.pattern): _step(piece.init) for name, _, piece in canonical_slices(tuned)}
    scales = defaultdict(set)
    for name, parameter, piece in canonical_slices(model):
        scale = _step(piece.init) / steps[_kind(name, config.pattern)]
        if name.startswith("layers."):
            scale *= math.sqrt(len(base.pattern) / len(config.pattern))
        scales[parameter].add(float(f"{scale:.{_DIGITS}g}"))
    for parameter, found in scales.items():
        if len(found) > 1:
            raise TypeError(f"a parameter joins tensors with different learning rates: {sorted(found)}")
        (info_of(parameter).lr_scale,) = found


def _kind(name: str, pattern: str) -> str:
    """Returns a canonical name with the letter of its layer in the place of the layer's number."""
    first, _, rest = name.partition(".")
    if first != "layers":
        return name
    number, _, below = rest.partition(".")
    return f"{pattern[int(number)]}.{below}"


def _step(fill: Init) -> float:
    """Returns what a tensor's steps are in proportion to, where the width or the depth changes it."""
    return getattr(fill, "step", 1.0)
