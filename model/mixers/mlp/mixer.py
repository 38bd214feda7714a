"""The SwiGLU MLP as the rest of the code knows it, and a second one of another width."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from sambalm.model.mixers.base import Ability, HFSide, HFTensor, Mixer
from sambalm.model.mixers.counts import (
    Kernel,
    MemoryPass,
    Message,
    Parameter,
    Share,
    Traffic,
    input_and_output_messages,
)
from sambalm.model.mixers.mlp.sizes import MLP2Sizes
from sambalm.parallel.shard import Position, Shard, shard

if TYPE_CHECKING:
    from torch import nn

    from sambalm.model.config import ModelConfig
    from sambalm.model.ops.registry import Kernels
    from sambalm.parallel.groups import TensorParallel

# SiLU and product; backward two products, SiLU's and both gradients joined.
SWIGLU = {"torch": Traffic(10, 26), "compiled": Traffic(6, 10, fused=True)}


class MLPHF(HFSide):
    """The MLP in the Hugging Face format, by the names of flash-linear-attention."""

    tensors: ClassVar = {
        "gate_proj.weight": HFTensor(("gate_up_proj.gate.weight",)),
        "up_proj.weight": HFTensor(("gate_up_proj.up.weight",)),
        "down_proj.weight": HFTensor(("down_proj.weight",)),
    }
    module, layer = "sambalm.model.mixers.mlp.hf", "SambaMLP"
    step = "sambalm.model.mixers.mlp.step:MLPStep"
    is_mlp = True

    def to_config(self, config: "ModelConfig") -> dict[str, Any]:
        return {"mlp_size": config.mlp_size}

    def from_config(self, hf: Any) -> dict[str, Any]:
        return {"mlp_size": hf.mlp_size}

    def describe(self, hf: Any) -> str:
        return f"SwiGLU MLP of width {hf.mlp_size}"


class MLP2HF(MLPHF):
    """The second MLP, which stands where a mixer does and holds nothing between calls."""

    layer, is_mlp = "SambaMLP2", False

    def to_config(self, config: "ModelConfig") -> dict[str, Any]:
        return {}  # its section of `model.mixers` travels by itself

    def from_config(self, hf: Any) -> dict[str, Any]:
        return {}

    def describe(self, hf: Any) -> str:
        return f"SwiGLU MLP of width {hf.sizes('mlp2')['size']}, in the place of a mixer"


class MLP(Mixer):
    """down(SiLU(gate(x)) * up(x))."""

    letter, name = "-", "mlp"
    title, abilities = "MLP", frozenset(Ability)
    key = "model.mlp_size"  # of its width
    hf = MLPHF()

    def layer(self, config: "ModelConfig", *, tp: "TensorParallel", kernels: "Kernels") -> "nn.Module":
        from sambalm.model.mixers.mlp.layer import SwiGLU

        return SwiGLU(config, size=self._size(config), tp=tp, kernels=kernels)

    def _size(self, config: "ModelConfig") -> int:
        return config.mlp_size

    def check(self, config: "ModelConfig", *, tensor_ranks: int) -> None:
        size = self._size(config)
        if size < tensor_ranks:
            raise ValueError(f"{self.key} is {size}, less than parallel.tensor {tensor_ranks}: lower parallel.tensor")

    def parameters(self, config: "ModelConfig", *, tensor_ranks: int) -> Sequence[Parameter]:
        width, inner = config.hidden_size, self._inner(config, tensor_ranks)
        held, zeros = inner.held, inner.padding * width
        product = {"in_product": True, "matmul_only": True, "takes_fp8": True}
        return (
            Parameter("gate_up_proj.weight", (2 * held, width), **product, padding=2 * zeros),
            Parameter("down_proj.weight", (width, held), **product, padding=zeros),
        )

    def messages(self, config: "ModelConfig", share: Share) -> Iterator[Message]:
        return input_and_output_messages(config.hidden_size, share)

    def kernels(self, config: "ModelConfig", share: Share) -> Iterator[Kernel]:
        elements = share.tokens * self._inner(config, share.tensor_ranks).held
        yield MemoryPass(SWIGLU[share.kernels.elementwise], elements)

    def saved_bytes(self, config: "ModelConfig", share: Share, *, inside: bool) -> int:
        """Counts gate and up, SiLU of the gate where it is an operation of its own, and their product."""
        widths = 3 if share.kernels.elementwise == "compiled" else 4
        return share.activation_bytes * share.tokens * widths * self._inner(config, share.tensor_ranks).held

    def backward_bytes(self, config: "ModelConfig", share: Share) -> int:
        return share.tokens * share.activation_bytes * 4 * self._inner(config, share.tensor_ranks).held

    def _inner(self, config: "ModelConfig", tensor_ranks: int) -> Shard:
        return shard(self._size(config), Position(tensor_ranks))


class MLP2(MLP):
    """The same with a width of its own, in the place of a mixer."""

    letter, name, title, sizes = "=", "mlp2", "second MLP", MLP2Sizes
    key = "model.mixers.mlp2.size"
    hf = MLP2HF()

    def _size(self, config: "ModelConfig") -> int:
        return config.sizes_of(self).size


MIXER, SECOND = MLP(), MLP2()
