"""Loading a model for text generation, of a folder without executing any code from it, or of a checkpoint's weights."""

import json
from pathlib import Path

import torch

from sambalm.model.config import ModelConfig

from .configuration_samba import SambaConfig
from .errors import HFError
from .folder import INDEX_FILE, SINGLE_FILE
from .modeling_samba import SambaForCausalLM
from .names import CanonicalState, check_mixers, hf_config, hf_dtype, hf_shape, hf_tensors
from .tokenizer import FolderTokenizer, load_tokenizer


def load_for_generation(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[SambaForCausalLM, FolderTokenizer]:
    """The model, in eval mode on the device, and its tokenizer. dtype None is that of the folder's weights.

    Raises HFError for a folder that is not a complete Samba model with its tokenizer.
    """
    folder = Path(folder)
    model = load_model(folder, dtype=dtype)
    return model.to(device), load_tokenizer(folder)


def load_model(folder: Path, *, dtype: torch.dtype | None = None) -> SambaForCausalLM:
    """The model on the CPU, in eval mode. Raises HFError where the folder lacks a tensor or cannot be read."""
    config = load_config(folder)
    if not any((folder / name).is_file() for name in (INDEX_FILE, SINGLE_FILE)):
        raise HFError(f"the folder {folder} has neither {INDEX_FILE} nor {SINGLE_FILE}; give a folder with weights")
    try:
        model, report = SambaForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # transformers and safetensors raise many kinds for a bad folder
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise HFError(f"the weights in {folder} cannot be loaded ({reason}); export or download them again") from error
    for names, word in ((report["missing_keys"], "lack"), (report["unexpected_keys"], "have an unknown")):
        if names:
            raise HFError(f"the weights in {folder} {word} {min(names)}: they do not fit config.json")
    return model.eval()


def load_config(folder: Path) -> SambaConfig:
    """Returns the configuration in config.json.

    Raises:
        HFError: it is not a Samba model's, or it has a mixer that is not installed.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise HFError(f"{folder} has no config.json; give a folder that holds a Samba model in Hugging Face format")
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise HFError(f"{path} cannot be read ({error}); export or download the folder again") from error
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind != SambaConfig.model_type:
        raise HFError(f"{path} has model_type {kind!r}, but this program loads only 'samba' models")
    try:
        config = SambaConfig.from_dict(content)
    except Exception as error:  # ValueError of ours, or huggingface_hub's for a wrong type
        raise HFError(f"{path} is not a valid Samba configuration: {str(error).strip()}") from error
    check_mixers(config)
    return config


def model_of_state(state: CanonicalState, config: ModelConfig, *, dtype: torch.dtype) -> SambaForCausalLM:
    """Returns the model of canonical weights, such as a checkpoint's, in eval mode and where the state's tensors are.

    Reads one tensor at a time. Raises HFError where the state does not fit the configuration or a mixer has no side in
    the Hugging Face format.
    """
    hf = hf_config(config, dtype=dtype)
    with torch.device("meta"):
        model = SambaForCausalLM(hf)
    shapes = state.shapes()
    weights = {}
    for name, tensor in hf_tensors(config.pattern, tie_embeddings=config.tie_embeddings).items():
        missing = next((part for part in tensor.parts if part not in shapes), None)
        if missing is not None:
            raise HFError(f"the weights lack tensor {missing}: they do not fit their model configuration")
        rows = [state.read(part).to(hf_dtype(tensor, dtype)) for part in tensor.parts]
        joined = rows[0] if len(rows) == 1 else torch.cat(rows)
        weights[name] = joined.view(hf_shape(tensor, shapes))
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    unfilled = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if unfilled:
        raise HFError(f"the weights give no value to {unfilled[0]}: they do not fit their model configuration")
    return model.eval()
