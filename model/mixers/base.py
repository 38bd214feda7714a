"""The interface of a mixer: everything that the rest of the code asks of a kind of layer, in one place.

A mixer is what stands between the norm and the residual sum of a sublayer. Its folder brings one object of a class
below, which `model/registry.py` finds by the letter that stands for it in a layer pattern. Another package registers
its own through the entry point group `sambalm.mixers`. Importing a mixer's object must not import torch: plans,
counts and checks of a config need none.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel

from sambalm.model.mixers.counts import Kernel, Message, Parameter, Share
from sambalm.parallel.shard import Place

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sambalm.model.config import ModelConfig
    from sambalm.model.ops.registry import Kernels
    from sambalm.parallel.groups import TensorParallel
    from sambalm.parallel.shard import Place


class Ability(StrEnum):
    """What a mixer may be able to do; a run that needs what one lacks is refused before it starts.

    The Hugging Face format is no ability: a mixer that has `hf` can be written in it.
    """

    TENSOR_PARALLEL = "tensor parallelism"
    SEQUENCE_PARALLEL = "sequence parallelism"
    CONTEXT_PARALLEL = "context parallelism"
    PACKED_DOCUMENTS = "packed documents"


@dataclass(frozen=True)
class HFTensor:
    """How a tensor of a Hugging Face folder is made: of canonical tensors, joined along their first dimension."""

    parts: tuple[str, ...]  # canonical names, in order; where there are several, their tensors have one shape
    is_conv: bool = False  # nn.Conv1d has a dimension of one input channel, which the canonical [channels, taps] lacks
    is_fp32: bool = False  # whatever the dtype of the rest


class HFSide(ABC):
    """A mixer in the Hugging Face format: names, configuration, and the layer that `modeling_samba.py` runs."""

    tensors: ClassVar[Mapping[str, HFTensor]]
    """Names below the mixer in the Hugging Face model, and the canonical names there that each is made of. transformers
    knows what stays fp32 by these names alone, so one name is fp32 in all mixers of a model or in none."""

    module: ClassVar[str]
    """The importable Python file with the layer. An exported folder takes a copy, which loads without our packages.

    It may import torch, transformers and the standard library as it likes. Of sambalm it imports
    `sambalm.model.hf.layers`, `sambalm.model.hf.configuration_samba` and files of `sambalm.model.ops.reference`; of its
    own package the files beside it, which keep the same rule. Folders take copies of those too. Each such import is a
    line `from MODULE import NAME`, where MODULE is the file; the export refuses any other.
    """

    layer: ClassVar[str]
    """The class in `module`, a subclass of `sambalm.model.hf.layers.SambaLayer`, which says what it takes and gives."""

    step: ClassVar[str | None] = None
    """Where a `sambalm.model.hf.layer_steps.LayerStep` is that takes one token a row on a GPU, as MODULE:CLASS; None:
    models with the mixer generate by the layer alone. An exported folder has no part in it."""

    cache_layer: ClassVar[str] = "moe"
    """The kind of cache layer that transformers makes for it: linear_attention (a convolution's last inputs and a
    state), sliding_attention (keys and values of the attention's window), full_attention (those of all tokens), or moe
    for none."""

    is_mlp: ClassVar[bool] = False
    """Whether it stands behind another mixer in one block, as the MLP does. The block's cache layer is the other's."""

    def to_config(self, config: "ModelConfig") -> dict[str, Any]:
        """Returns the keys of SambaConfig that say what this mixer is.

        Sizes in `model.mixers` need none: they travel by themselves, and the layer reads them as `config.sizes(name)`.
        """
        return {}

    def from_config(self, hf: Any) -> dict[str, Any]:
        """Returns the keys of ModelConfig, from a SambaConfig. The inverse of `to_config`."""
        return {}

    def describe(self, hf: Any) -> str | None:
        """Returns what a line of the model card says of the layer; None: the mixer's name."""
        return None


class Mixer(ABC):
    """One kind of layer. Methods take the whole ModelConfig; a mixer reads `hidden_size` and its own sizes."""

    letter: ClassVar[str]
    """What stands for it in a layer pattern: one character, no digit, no x, no space."""

    name: ClassVar[str]
    """What metrics, counts and the section `model.mixers` call it."""

    title: ClassVar[str]
    """What tables and descriptions for people call it, in a word or two."""

    abilities: ClassVar[frozenset[Ability]]
    """What it can do. There is no default, since a mixer that claims too much trains to silently wrong weights."""

    sizes: ClassVar[type[BaseModel] | None] = None
    """The schema of `model.mixers.NAME`, where the mixer's sizes are; those of the first three mixers are keys of
    `model` itself."""

    hf: ClassVar[HFSide | None] = None
    """The mixer in the Hugging Face format; None: a model with it trains, and `sambalm convert to-hf` refuses it."""

    writes: ClassVar[str | None] = None
    """The name of a memory that each of its layers leaves to layers after it; None: it leaves none."""

    reads: ClassVar[str | None] = None
    """The name of a memory that its layers take, of the last layer before that writes it. A pipeline keeps both in one
    chunk; any other layout and recomputation keep what the writer leaves as it is, gradients included."""

    takes_stream: ClassVar[bool] = False
    """Whether its layers take the stream itself as a third argument, of x's shape: those that gate between the stream
    and an output of their own, and so return what is added to come to the gated sum."""

    @abstractmethod
    def layer(self, config: "ModelConfig", *, tp: "TensorParallel", kernels: "Kernels") -> "nn.Module":
        """Returns the uninitialised layer of one rank.

        Its forward takes the normed stream x [S, B, width], [S / tensor-parallel ranks, B, width] under sequence
        parallelism, and a `SequenceContext`, and returns what is added to the stream, of x's shape. S is the rank's
        part of the sequence. `ColumnParallelLinear` gathers the whole S and `RowParallelLinear` shares it out again.
        `context.resets` is [B, S], while activations are [S, B, ...] until the layer transposes them. Selective
        recomputation wraps the kernels of scan and attention and no more: a layer that computes other insides again
        calls `parallel.layers.recompute.recomputed` itself. A mixer that `writes` returns what is added and the memory,
        one tensor or several; one that `reads` finds it in `context.memories` under the name.
        """

    @abstractmethod
    def parameters(self, config: "ModelConfig", *, tensor_ranks: int) -> Sequence[Parameter]:
        """Returns the parameters of the first tensor-parallel rank's layer; with one rank those of the model."""

    def check(self, config: "ModelConfig", *, tensor_ranks: int) -> None:  # noqa: B027 - there may be nothing to check
        """Raises ValueError, with a sentence that names the keys, where so many ranks cannot share a layer."""

    def shrunk(self, config: "ModelConfig", *, hidden_size: int, sequence_share: float) -> dict[str, Any]:
        """Returns keys of `model.mixers.NAME` that a small model, on which a layout is checked, has in place of these.

        Args:
            hidden_size: of the small model.
            sequence_share: the length of its sequences over that of the config's.
        """
        return {}

    def weight_copies(self, config: "ModelConfig", *, tensor_ranks: int) -> int:
        """Returns how many neighbouring tensor-parallel ranks hold the same slice of a weight, such as a kv head."""
        return 1

    def kernel_needs(
        self, config: "ModelConfig", *, sequences: int, part_tokens: int, tp: Place, cp: Place
    ) -> dict[str, Any]:
        """Returns fields of `KernelRequirements`: what this mixer asks of kernels on one rank.

        Args:
            sequences: of a micro-batch.
            part_tokens: of each sequence on the rank.
            tp: the rank's place among tensor-parallel ranks.
            cp: its place among context-parallel ranks.
        """
        return {}

    def shared_inputs(self, config: "ModelConfig", positions: "Tensor") -> Any:
        """Returns what all layers of this kind read and a micro-batch makes once, such as rotary tables.

        Args:
            positions: int64 [S, B or 1]: of each token in its document, or in the sequence.
        """
        return None

    def shared_inputs_bytes(self, config: "ModelConfig", share: Share) -> int:
        return 0

    def mixing_flops(self, config: "ModelConfig", *, sequence_tokens: int) -> float:
        """Returns the operations a token, forward and backward, beside the products with weights."""
        return 0.0

    @abstractmethod
    def saved_bytes(self, config: "ModelConfig", share: Share, *, inside: bool) -> int:
        """Returns what autograd keeps of a layer for its backward, without the norm and the weights' copies.

        Args:
            inside: whether kernels keep what selective recomputation would drop.
        """

    @abstractmethod
    def backward_bytes(self, config: "ModelConfig", share: Share) -> int:
        """Returns the widest gradients and buffers that are alive together in a layer's backward."""

    def messages(self, config: "ModelConfig", share: Share) -> Iterable[Message]:
        """Returns what a rank sends in a layer's forward and backward; what `share` has no ranks for is left out."""
        return ()

    def kernels(self, config: "ModelConfig", share: Share) -> Iterable[Kernel]:
        """Returns the kernels of a layer beside products with weights, the norm and the residual sum."""
        return ()
