"""One token a row through a whole model as one CUDA graph: norms, SwiGLU, states and sums ride on the products.

B: rows, V: vocabulary.
"""

import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sambalm.model.ops.decode.linear import HeldWeights, Norm, ResidualStream, RowLinear, Workspace

from .layer_steps import LayerStep, plain, step_class
from .layers import SambaLayer, SambaRMSNorm, has_hooks
from .modeling_samba import SambaForCausalLM

if TYPE_CHECKING:
    from .stream import Stream


class Decoder:
    """A model's weights as they are now, the state of up to so many rows, and the graph that takes a token of each.

    Projections whose width is no multiple of 128, and those of queries, keys and values, are copied; other weights are
    read where they are. `seen_tokens` counts the tokens of each row that is in use.
    """

    def __init__(self, model: SambaForCausalLM, *, rows: int, held: HeldWeights | None = None) -> None:
        """
        Args:
            held: copies of weights that decoders of the model share.

        Raises:
            ValueError: `why_not` declines the model.
        """
        if reason := why_not(model):
            raise ValueError(f"the model cannot be stepped as one graph: {reason}")
        device, backbone = model.device, model.backbone
        self.seen_tokens = [0] * rows
        self.holder: Callable[[], Stream | None] = lambda: None
        workspace = Workspace(rows, device=device, held=held)
        self._embeddings = plain(backbone.embeddings)
        self._stream = ResidualStream(workspace, like=self._embeddings)
        self._ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self._positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self._steps = _steps(model, workspace)
        self._norm = _norm(backbone.norm_f)
        self._head = RowLinear(plain(model.lm_head), workspace=workspace)
        self._logits = self._embeddings.new_empty(rows, model.lm_head.weight.shape[0])
        self._graph = self._captured() if device.type == "cuda" else None

    def load(self, state: Mapping[str, Tensor], *, seen_tokens: list[int]) -> None:
        """Takes the state of rows that have read so many tokens, as a `Stream` names its tensors."""
        self.seen_tokens = list(seen_tokens)
        self._positions[: len(seen_tokens)] = torch.tensor(seen_tokens)
        for number, step in self._steps:
            prefix = f"layers.{number}."
            own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
            step.load(own, self.seen_tokens)

    def state(self) -> dict[str, Tensor]:
        """Returns copies of the state, by the names of a `Stream`'s tensors."""
        return {
            f"layers.{number}.{name}": tensor
            for number, step in self._steps
            for name, tensor in step.state(self.seen_tokens).items()
        }

    def __call__(self, ids: Tensor) -> Tensor:
        """Takes one token of every row, int64 [B]; returns the logits after it, [B, V] in the model's dtype."""
        rows = len(self.seen_tokens)
        self._ids[:rows] = ids
        if self._graph:
            self._graph.replay()
        else:
            self._launch()
        self.seen_tokens = [seen + 1 for seen in self.seen_tokens]
        return self._logits[:rows].clone()

    def _launch(self) -> None:
        norms = [step.norm.weight for _, step in self._steps] + [self._norm.weight]
        self._stream.start(self._ids, self._embeddings, norms[0])
        for (_, step), following in zip(self._steps, norms[1:], strict=True):
            step(self._stream, self._positions, following)
        self._head.of_stream(self._stream, self._logits, eps=self._norm.eps)
        self._positions += 1

    def _captured(self) -> torch.cuda.CUDAGraph:
        """Compiles the kernels by a first run, which leaves a state of no meaning, and records a second one."""
        with torch.cuda.device(self._ids.device):
            self._launch()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._launch()
        return graph


class Decoders:
    """The decoders of a model, one for each power of two of rows, for streams of which one has each at a time.

    Streams that are made of each other share them, so that texts which come and go cost no new graph.
    """

    def __init__(self, model: SambaForCausalLM) -> None:
        self._model, self._held = model, HeldWeights()
        self._of_rows: dict[int, Decoder] = {}

    def lend(self, stream: "Stream") -> Decoder | None:
        """Returns a decoder for a stream, which another leaves for it; None where the model cannot be stepped so."""
        rows = 1 << (stream.rows - 1).bit_length()
        if rows not in self._of_rows:
            if why_not(self._model):
                return None
            self._of_rows[rows] = Decoder(self._model, rows=rows, held=self._held)
        decoder = self._of_rows[rows]
        holder = decoder.holder()
        if holder is not None and holder is not stream:
            holder.leave(decoder)
        decoder.holder = weakref.ref(stream)
        return decoder


def _steps(model: SambaForCausalLM, workspace: Workspace) -> list[tuple[int, LayerStep]]:
    """Returns the steps of all layers in order, each with the number of its block."""
    steps = []
    for number, (letters, block) in enumerate(zip(model.config.blocks, model.backbone.layers, strict=True)):
        layers = ((letters.mixer, block.mixer, "mixer_norm"), (letters.mlp, block.mlp, "mlp_norm"))
        for letter, layer, norm in layers:
            kind = None if letter is None else step_class(letter)
            if kind is not None and isinstance(layer, SambaLayer):
                steps.append((number, kind(layer, _norm(block.get_submodule(norm)), workspace)))
    return steps


def _norm(module: nn.Module) -> Norm:
    assert isinstance(module, SambaRMSNorm)
    return Norm(plain(module), module.eps)


def why_not(model: SambaForCausalLM) -> str | None:
    """Why a model cannot be stepped as one graph; None where it can."""
    letters = {letter for block in model.config.blocks for letter in (block.mixer, block.mlp) if letter is not None}
    for letter in sorted(letters):
        if step_class(letter) is None:
            return f"its layers {letter!r} have no step of one token"
    changed = next((module for module in model.modules() if _is_changed(module)), None)
    if changed is not None:
        return f"its {type(changed).__name__} is not as it was made (an adapter, quantised, or offloaded)"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "its weights lie on several devices"
    if model.dtype == torch.float64:
        return "its weights are fp64"
    return None


def _is_changed(module: nn.Module) -> bool:
    """Whether a module computes something else than its class says, or is of a class that is not the model's."""
    is_own = isinstance(module, SambaLayer) or type(module).__module__.startswith(("sambalm.", "torch.nn.modules."))
    return not is_own or has_hooks(module)
