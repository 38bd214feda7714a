"""Tiny models with random weights, as canonical states and as Hugging Face models."""

import math

import torch

from sambalm.model.config import ModelConfig
from sambalm.model.hf.modeling_samba import SambaForCausalLM
from sambalm.model.hf.names import CanonicalState, hf_config, hf_shape, hf_tensors
from sambalm.model.samba import Samba
from sambalm.parallel.sharding import canonical_slices, initialize_parameters

VOCABULARY = 97


def tiny_config(pattern: str = "M-*-", **changes) -> ModelConfig:
    sizes = {"hidden_size": 32, "num_query_heads": 4, "num_kv_heads": 2, "mlp_size": 48, "window": 8}
    return ModelConfig(pattern=pattern, **({"vocab_size": VOCABULARY} | sizes | changes))


class RandomState:
    """A canonical state in which every tensor is random, norms and A_log too, so that no two are exchangeable."""

    def __init__(self, config: ModelConfig, *, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tensors = {
            name: self._fill(name, torch.empty(piece.shape), generator)
            for name, _, piece in canonical_slices(Samba(config))
        }

    @staticmethod
    def _fill(name: str, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("A_log") and tensor.ndim == 2:
            return torch.arange(1, tensor.shape[1] + 1).log() + 0.1 * noise
        if name.endswith(("dt_proj.bias", "dt_bias")):
            return -3 + noise
        if tensor.ndim == 1:
            return 1 + 0.3 * noise
        return noise / math.sqrt(tensor.shape[1])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name].clone()


class DrawnState:
    """What a new run of a seed begins with, as a canonical state."""

    def __init__(self, config: ModelConfig, *, seed: int) -> None:
        model = Samba(config)
        initialize_parameters(model, seed=seed)
        self.tensors = {
            name: piece.of_local(parameter).detach().clone() for name, parameter, piece in canonical_slices(model)
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def hf_model(config: ModelConfig, state: CanonicalState, **others) -> SambaForCausalLM:
    model = SambaForCausalLM(hf_config(config, pad_token_id=0, eos_token_id=None, **others))
    tensors = hf_tensors(config.pattern, tie_embeddings=config.tie_embeddings)
    weights = {}
    for name, tensor in tensors.items():
        joined = torch.cat([state.read(part) for part in tensor.parts])
        weights[name] = joined.view(hf_shape(tensor, state.shapes()))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def training_model(config: ModelConfig, state: RandomState) -> Samba:
    model = Samba(config)
    for name, parameter, piece in canonical_slices(model):
        piece.of_local(parameter).copy_(piece.of_canonical(state.read(name)))
    return model


def random_tokens(rows: int, length: int, *, seed: int = 1) -> torch.Tensor:
    """Without token 0, from which generate would infer padding."""
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
