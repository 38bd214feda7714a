"""A Samba with random weights, for figures that trained weights would not change."""

import torch

from sambalm.model.config import ModelConfig
from sambalm.model.hf import SambaForCausalLM
from sambalm.model.hf.mixers import fp32_tensors
from sambalm.model.hf.names import hf_config


def random_model(config: ModelConfig, *, device: torch.device, dtype: torch.dtype) -> SambaForCausalLM:
    """Returns a model of a dtype, but for what is always fp32, with the weights that training would begin with."""
    with device:
        model = SambaForCausalLM(hf_config(config, dtype=dtype)).eval()
    kept = {name for letter in set(config.pattern) for name in fp32_tensors(letter)}
    for name, parameter in model.named_parameters():
        if not name.endswith(tuple(kept)):
            parameter.data = parameter.data.to(dtype)
    return model
