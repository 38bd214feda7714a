"""What layers need to know of a batch besides its activations.

Activations are [sequence, batch, width] between layers and [batch, sequence, ...] inside the kernels; both are views of
the same memory. S: sequence, B: batch, D: Mamba's channels, N: its states, H: heads.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sambalm.model.ops.documents import Documents
from sambalm.parallel.groups import ContextParallel


@dataclass(frozen=True)
class SequenceContext:
    """One micro-batch as all its layers see it."""

    cp: ContextParallel  # where this rank's part of the sequence lies
    documents: Documents | None = None  # of packed sequences, where states and attention end with them
    shared: Mapping[str, Any] = field(default_factory=dict)  # `Mixer.shared_inputs`, by the mixers' letters

    @property
    def resets(self) -> Tensor | None:
        """Marks the tokens that begin a document, bool [B, S]; None where sequences are one stream."""
        return self.documents.resets if self.documents else None
