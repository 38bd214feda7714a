"""Slices of canonical tensors as torch.distributed.checkpoint understands them: any layout saves, any other loads."""

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from sambalm.parallel.zero.parameter_info import CanonicalSlice


class CheckpointSlice(Tensor):
    """A rectangle of a canonical tensor held by this rank.

    It has the canonical tensor's shape and stores only the rectangle, like a DTensor, but any rectangle of any size (a
    DTensor's are even). It serves saving and loading and nothing else.
    """

    local: Tensor
    offsets: torch.Size

    @staticmethod
    def __new__(cls, local: Tensor, piece: CanonicalSlice) -> "CheckpointSlice":
        """
        Args:
            local: the slice, of piece.sizes; saving reads it and loading writes it.
        """
        self = Tensor._make_wrapper_subclass(cls, piece.shape, dtype=local.dtype, device=local.device)
        self.local, self.offsets = local, torch.Size(piece.offsets)
        return self

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub has no arguments' names
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        raise NotImplementedError(f"{func} on a slice of a checkpoint's tensor")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # as above
        return f"CheckpointSlice({tuple(self.shape)} from {tuple(self.offsets)}: {self.local!r})"

    # torch.distributed.checkpoint's protocol for tensors that it does not know (planner_helpers._create_write_items).

    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(offsets=self.offsets, sizes=self.local.shape)

    def __create_write_items__(self, name: str, tensor: Tensor) -> list[WriteItem]:
        data = TensorWriteData(
            chunk=self._chunk(), properties=TensorProperties.create_from_tensor(self.local), size=self.shape
        )
        return [WriteItem(index=MetadataIndex(name, self.offsets), type=WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.local
