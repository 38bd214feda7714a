"""Models that no run of ours has saved, Hugging Face folders and files of others, as canonical tensors."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sambalm.model.config import ModelConfig
from sambalm.model.hf.configuration_samba import SambaConfig
from sambalm.model.hf.errors import HFError
from sambalm.model.hf.folder import FolderState
from sambalm.model.hf.generate import load_config
from sambalm.model.hf.lit_gpt import LitGPTState, ReferenceSizes
from sambalm.model.hf.names import CanonicalState, hf_config, hf_shape, hf_tensors, model_config
from sambalm.model.hf.verify import HFWeights
from sambalm.model.samba import Samba
from sambalm.parallel.sharding import canonical_slices


@dataclass(frozen=True)
class OtherModel:
    """A model that no run of ours has saved.

    Attributes:
        state: the weights as canonical tensors, whose shapes have been held against the configuration.
        config: the model in training.
        hf: the model in transformers, in fp32.
        hf_weights: the weights as that model has them.
    """

    state: CanonicalState
    config: ModelConfig
    hf: SambaConfig
    hf_weights: HFWeights


def open_other_model(
    source: Path, *, query_heads: int | None = None, window: int | None = None, assumed: ReferenceSizes | None = None
) -> OtherModel:
    """Opens a Hugging Face folder, ours or flash-linear-attention's, or a `.pth` file of microsoft/Samba.

    Args:
        query_heads, window: of a `.pth` file, whatever it says of itself.
        assumed: of a `.pth` file that names none of the reference's models.

    Raises:
        HFError: one sentence, for the user.
    """
    if source.is_file():
        state = LitGPTState(source, query_heads=query_heads, window=window, assumed=assumed)
        config = _with_default_rank(state.config)
        return OtherModel(state, config, hf_config(config, dtype="float32"), _AsInTransformers(state, config))
    if not source.is_dir():
        raise HFError(f"{source} does not exist: give a Hugging Face folder or a .pth file of microsoft/Samba")
    if query_heads is not None or window is not None:
        raise HFError(f"--query-heads and --window are for .pth files, and {source} has a config.json: leave them out")
    hf = load_config(source)
    hf.dtype = torch.float32
    config, folder = _with_default_rank(model_config(hf)), FolderState(source, hf)
    folder.check_shapes(canonical_shapes(config))
    return OtherModel(folder, config, hf, folder)


def canonical_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns name and shape of every canonical tensor of a model."""
    with torch.device("meta"):
        model = Samba(config)
    return {name: tuple(piece.shape) for name, _, piece in canonical_slices(model)}


def _with_default_rank(config: ModelConfig) -> ModelConfig:
    """The model without the key dt_rank where it says what it is without it, as a run's config is most likely to be."""
    plain = ModelConfig.model_validate(config.model_dump() | {"dt_rank": None})
    return plain if plain.dt_rank_size == config.dt_rank_size else config


class _AsInTransformers:
    """A state's weights by their names in the Hugging Face model."""

    def __init__(self, state: CanonicalState, config: ModelConfig) -> None:
        self._state, self._shapes = state, state.shapes()
        self._tensors = hf_tensors(config.pattern, tie_embeddings=config.tie_embeddings)

    def read_hf(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        return torch.cat([self._state.read(part) for part in tensor.parts]).view(hf_shape(tensor, self._shapes))
