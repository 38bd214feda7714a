"""The weights of a Hugging Face folder as canonical tensors."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sambalm.model.mixers.base import HFTensor

from .configuration_samba import SambaConfig
from .errors import HFError
from .names import hf_shape, hf_tensors

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
FLOAT_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # all of which are exact in fp32
_TIED = ("lm_head.weight", "backbone.embeddings.weight")


class FolderState:
    """The weights of a Hugging Face folder as canonical tensors; one tensor is read at a time.

    Raises HFError where the folder's tensors are not those of its configuration.
    """

    def __init__(self, folder: Path, config: SambaConfig) -> None:
        self._folder = folder
        self._files = _tensor_files(folder)
        tensors = hf_tensors(config.pattern, tie_embeddings=config.tie_word_embeddings)
        self._refuse_differences(set(tensors), tied=config.tie_word_embeddings)
        self._sources: dict[str, tuple[str, HFTensor, int]] = {}
        for name, tensor in tensors.items():
            for number, part in enumerate(tensor.parts):
                self._sources[part] = (name, tensor, number)

    def _refuse_differences(self, expected: set[str], *, tied: bool) -> None:
        given = set(self._files)
        if tied and "lm_head.weight" in given:
            head, embedding = (self._open(name, lambda f, n: f.get_tensor(n)) for name in _TIED)
            if not torch.equal(head, embedding):
                raise HFError(
                    f"{self._folder} has a lm_head.weight unlike its embeddings, but tie_word_embeddings is true in "
                    "config.json: set it to false"
                )
            given.remove("lm_head.weight")
        for names, word in ((expected - given, "lacks"), (given - expected, "has an unknown")):
            if names:
                raise HFError(f"{self._folder} {word} tensor {min(names)}: its weights do not fit its config.json")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every canonical tensor."""
        return {part: self._shape(part) for part in self._sources}

    def check_shapes(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """
        Args:
            expected: name and shape of the model's canonical tensors.

        Raises:
            HFError: a tensor of the folder has another shape than these make, or a dtype that is not exact in fp32.
        """
        for name, tensor, _ in self._sources.values():
            whole = self._open(name, lambda file, key: file.get_slice(key))
            shape, wanted = tuple(whole.get_shape()), hf_shape(tensor, expected)
            if shape != wanted:
                raise HFError(
                    f"tensor {name} in {self._folder} has shape {shape} where config.json makes it {wanted}: its "
                    "weights do not fit its config.json"
                )
            if whole.get_dtype() not in FLOAT_DTYPES:
                raise HFError(
                    f"tensor {name} in {self._folder} is {whole.get_dtype()}: only fp32, bf16 and fp16 are read"
                )

    def _shape(self, part: str) -> tuple[int, ...]:
        name, tensor, _ = self._sources[part]
        rows, *rest = self._open(name, lambda file, key: file.get_slice(key).get_shape())
        return (rows // len(tensor.parts), *(rest[1:] if tensor.is_conv else rest))

    def read(self, name: str) -> Tensor:
        """One canonical tensor in fp32."""
        hf_name, tensor, number = self._sources[name]
        rows = self._shape(name)[0]
        part = self._open(hf_name, lambda file, key: file.get_slice(key)[number * rows : (number + 1) * rows])
        return (part.squeeze(1) if tensor.is_conv else part).float()

    def read_hf(self, name: str) -> Tensor:
        """One tensor in fp32, by its name in the folder."""
        return self._open(name, lambda file, key: file.get_tensor(key)).float()

    def _open(self, name: str, use: Callable[[Any, str], Any]) -> Any:
        try:
            with safe_open(self._files[name], "pt") as file:
                return use(file, name)
        except (OSError, SafetensorError) as error:
            raise HFError(
                f"{self._files[name]} cannot be read ({error}); export or download the folder again"
            ) from error


def weight_files(folder: Path) -> list[Path]:
    """Returns the files that hold a folder's weights. Raises HFError where they cannot be told."""
    return sorted(set(_tensor_files(folder).values()))


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Each tensor's name and the file that holds it."""
    index, single = folder / INDEX_FILE, folder / SINGLE_FILE
    try:
        if index.is_file():
            weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
            return {name: folder / file for name, file in weight_map.items()}
        if single.is_file():
            with safe_open(single, "pt") as file:
                return {name: single for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise HFError(f"the weights in {folder} cannot be read ({error}); export or download them again") from error
    raise HFError(f"the folder {folder} has neither {INDEX_FILE} nor {SINGLE_FILE}; give a model folder")
