"""torch.compile for kernels, which meet more kinds of inputs in a run than dynamo expects of one function."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch

from sambalm.model.ops.reference.elementwise import Elementwise

# Training, validation at several lengths and evaluation each bring shapes and gradient modes of their own; the stream's
# norm has as many again with and without a branch to add. Beyond dynamo's 8, all of them would run uncompiled.
VARIANTS = 64


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function fused by torch.compile, which keeps up to VARIANTS compilations of it."""
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, VARIANTS)
    return torch.compile(function)


def compiled_elementwise() -> Elementwise:
    """Returns the operations each fused into as few passes over memory as it takes; logits are never held in fp32."""
    plain = Elementwise()
    return Elementwise(**{field.name: compiled(getattr(plain, field.name)) for field in fields(plain)})
