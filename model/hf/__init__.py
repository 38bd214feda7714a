"""Samba for Hugging Face transformers.

Importing this package registers its classes, so that AutoConfig, AutoModel, AutoModelForCausalLM and AutoTokenizer load
a Samba folder without executing code from it. flash-linear-attention registers the same model type "samba"; whichever
of the two is imported last wins, and neither import fails. `load_for_generation` takes the classes of this package in
any case.

`save_pretrained` of these classes writes weights and configuration, not their code: such a folder is for this package.
Folders that load without it come from `sambalm.model.hf.export`, or from classes that were loaded from such a folder.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from .configuration_samba import SambaConfig
from .errors import HFError
from .generate import load_for_generation
from .modeling_samba import SambaForCausalLM, SambaModel, SambaPreTrainedModel
from .stream import Stream
from .tokenization_samba import SambaTokenizer


def register() -> None:
    """Make this package's classes those of the Auto classes for "samba", also where another has registered it."""
    AutoConfig.register(SambaConfig.model_type, SambaConfig, exist_ok=True)
    AutoModel.register(SambaConfig, SambaModel, exist_ok=True)
    AutoModelForCausalLM.register(SambaConfig, SambaForCausalLM, exist_ok=True)
    AutoTokenizer.register(SambaConfig, slow_tokenizer_class=SambaTokenizer, exist_ok=True)


register()

__all__ = [
    "HFError",
    "SambaConfig",
    "SambaForCausalLM",
    "SambaModel",
    "SambaPreTrainedModel",
    "Stream",
    "load_for_generation",
    "register",
]
