"""What layers need to know of a batch besides its activations.

Activations are [sequence, batch, width] between layers and [batch, sequence, ...] inside the kernels; both are views of
the same memory. S: sequence, B: batch, D: Mamba's channels, N: its states, H: heads.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
    memories: Mapping[str, Any] = field(default_factory=dict)  # what layers before have written, by `Mixer.writes`

    def with_memory(self, name: str, memory: Any) -> "SequenceContext":
        """The same for the layers after one that writes a memory. Those before keep theirs, also when run again."""
        return replace(self, memories={**self.memories, name: memory})

    @property
    def resets(self) -> Tensor | None:
        """Marks the tokens that begin a document, bool [B, S]; None where sequences are one stream."""
        return self.documents.resets if self.documents else None
