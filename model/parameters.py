"""Parameter counts by part."""

import torch

from sambalm.model.config import ATTENTION, MAMBA, MLP, ModelConfig
from sambalm.model.samba import Samba
from sambalm.parallel.sharding import canonical_slices

_BODY = {MAMBA: "mamba", ATTENTION: "attention", MLP: "mlp"}


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Counts of each part, of all but the embeddings and in total, from a model without memory (the meta device)."""
    with torch.device("meta"):
        model = Samba(config)
    counts = dict.fromkeys(("embedding", "mamba", "attention", "mlp", "norms", "head"), 0)
    for name, _, piece in canonical_slices(model):
        counts[_part(name, config.pattern)] += torch.Size(piece.shape).numel()
    total = sum(counts.values())
    return counts | {"non-embedding": total - counts["embedding"] - counts["head"], "total": total}


def _part(name: str, pattern: str) -> str:
    owner, *rest = name.split(".")
    if owner != "layers":
        return "norms" if owner == "final_norm" else owner
    number, component, *_ = rest
    return "norms" if component == "norm" else _BODY[pattern[int(number)]]
