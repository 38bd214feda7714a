"""The weights of microsoft/Samba's checkpoints, `.pth` files with lit-gpt's names, as canonical tensors.

Such a file is a pickle. torch's `weights_only` reader takes tensors and plain values out of it and executes nothing;
a file that asks for more is refused. Tensors are mapped from the disk, so that memory holds those in use alone.

A block is `transformer.h.I` with norm_1, attn, norm_2 and mlp. Its attn is mamba-ssm's Mamba, or an attention whose one
projection holds each group's queries, then its key, then its value (lit_gpt/model.py of the reference).
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from sambalm.model.config import ModelConfig

from .configuration_samba import ATTENTION, MAMBA, MLP
from .errors import HFError
from .folder import FLOAT_DTYPES

EMBEDDING, HEAD, FINAL_NORM = "transformer.wte.weight", "lm_head.weight", "transformer.ln_f.weight"
QKV = "attn.attn.weight"
_BLOCK = re.compile(r"transformer\.h\.(\d+)\.(.+)")
_WRAPPERS = re.compile(r"^(_forward_module\.|_orig_mod\.|module\.)+")  # which Fabric and torch put before names
MAMBA_TENSORS = {
    name: f"attn.{name}"
    for name in ("A_log", "D", "x_proj.weight", "dt_proj.weight", "dt_proj.bias", "out_proj.weight")
} | {"conv.bias": "attn.conv1d.bias"}
MLP_TENSORS = {
    "gate_up_proj.gate.weight": "mlp.swiglu.w1.weight",
    "gate_up_proj.up.weight": "mlp.swiglu.w2.weight",
    "down_proj.weight": "mlp.swiglu.w3.weight",
}


class ReferenceSizes(NamedTuple):
    """What no tensor's shape tells of a model."""

    query_heads: int
    window: int


REFERENCE_MODELS = {
    "Samba_421M": ReferenceSizes(12, 2048),
    "Samba_421M_mqa": ReferenceSizes(12, 2048),
    "Samba_421M_gqa2": ReferenceSizes(12, 2048),
    "Samba_421M_gqa4": ReferenceSizes(12, 2048),
    "Samba_421M_mqa6": ReferenceSizes(6, 2048),
    "Samba_421M_1k_window": ReferenceSizes(12, 1024),
    "Samba_421M_512_window": ReferenceSizes(12, 512),
    "Samba_1.3B": ReferenceSizes(18, 2048),
}
"""By the names of lit_gpt/config.py, which a file of the reference's training keeps as hparams["model_name"]."""


@dataclass(frozen=True)
class _Part:
    """How a canonical tensor is made of one of the file.

    Attributes:
        source: the name in the file.
        shape: of the tensor in the file.
        take: makes the canonical tensor of it; a view.
    """

    source: str
    shape: tuple[int, ...]
    take: Callable[[Tensor], Tensor] = lambda whole: whole


class LitGPTState:
    """The weights of a `.pth` file as canonical tensors, fp32 on the CPU.

    Attributes:
        config: the model, as shapes and names tell it; of embedding_std and dt_min to dt_floor, which only the
            initial weights depended on, the defaults.

    Args:
        query_heads, window: of the attention; None: those of the model that the file names.
        assumed: those of a file that names none of the reference's models.

    Raises:
        HFError: the file cannot be read, or not without executing its code; or it is not a Samba model.
    """

    def __init__(
        self,
        path: Path,
        *,
        query_heads: int | None = None,
        window: int | None = None,
        assumed: ReferenceSizes | None = None,
    ) -> None:
        self._path = path
        content = _load(path)
        self._tensors = _tensors(content, path)
        name = _model_name(content)
        known = REFERENCE_MODELS.get(name or "", assumed)
        pattern = self._pattern()
        heads = query_heads or (known.query_heads if known else None)
        window = window or (known.window if known else None)
        if ATTENTION not in pattern:
            heads, window = heads or 1, window or 1
        if heads is None or window is None:
            raise HFError(
                f"{path} does not tell the model's query heads and attention window ({name or 'no model'} is named "
                "in it, which is none of the reference's Samba models): give --query-heads and --window"
            )
        self.config = self._config(pattern, query_heads=heads, window=window)
        self._parts = dict(self._all_parts())
        self._refuse_differences()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every canonical tensor."""
        return {name: tuple(part.take(self._tensors[part.source]).shape) for name, part in self._parts.items()}

    def read(self, name: str) -> Tensor:
        """One canonical tensor in fp32."""
        part = self._parts[name]
        return part.take(self._tensors[part.source]).float().contiguous()

    def _pattern(self) -> str:
        blocks: dict[int, set[str]] = {}
        for name in self._tensors:
            if found := _BLOCK.fullmatch(name):
                blocks.setdefault(int(found[1]), set()).add(found[2])
        if EMBEDDING not in self._tensors or sorted(blocks) != list(range(len(blocks))) or not blocks:
            raise HFError(
                f"{self._path} holds no Samba model by lit-gpt's names: it lacks {EMBEDDING} or blocks transformer.h.0 "
                "to the last"
            )
        letters = []
        for number, names in sorted(blocks.items()):
            mixer = MAMBA if "attn.A_log" in names else ATTENTION if QKV in names else None
            if mixer is None:
                raise HFError(
                    f"block transformer.h.{number} in {self._path} has neither Mamba's attn.A_log nor the attention's "
                    f"{QKV}: the model is not a Samba"
                )
            letters.append(mixer + (MLP if "norm_2.weight" in names else ""))
        return "".join(letters)

    def _config(self, pattern: str, *, query_heads: int, window: int) -> ModelConfig:
        vocabulary, width = self._matrix(EMBEDDING)
        sizes: dict[str, Any] = {"num_query_heads": query_heads, "num_kv_heads": query_heads, "mlp_size": width}
        number = 0
        for letter in pattern:  # the first block of a kind says the sizes of all, which the shapes are held against
            if letter == MAMBA:
                inner, states = self._matrix(f"transformer.h.{number}.attn.A_log")
                rank = self._matrix(f"transformer.h.{number}.attn.dt_proj.weight")[1]
                taps = self._tensor(f"transformer.h.{number}.attn.conv1d.weight").shape[-1]
                sizes |= {"d_state": states, "d_conv": taps, "expand": inner // width, "dt_rank": rank}
            elif letter == ATTENTION:
                kv_rows = self._matrix(f"transformer.h.{number}.{QKV}")[0] - width
                sizes["num_kv_heads"] = kv_rows * query_heads // (2 * width)
            elif letter == MLP:
                sizes["mlp_size"] = self._matrix(f"transformer.h.{number - 1}.{MLP_TENSORS['down_proj.weight']}")[1]
            number += letter != MLP
        tied = HEAD not in self._tensors or torch.equal(self._tensors[HEAD], self._tensors[EMBEDDING])
        try:
            return ModelConfig(
                pattern=pattern,
                hidden_size=width,
                vocab_size=vocabulary,
                tie_embeddings=tied,
                window=window,
                **sizes,
            )
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise HFError(
                f"the weights in {self._path} make no model ({reason}): check the number of query heads"
            ) from error

    def _all_parts(self) -> Iterator[tuple[str, _Part]]:
        config = self.config
        width, vocabulary = config.hidden_size, config.vocab_size
        yield "embedding.weight", _Part(EMBEDDING, (vocabulary, width))
        block = -1
        for layer, letter in enumerate(config.pattern):
            block += letter != MLP
            place, norm = f"transformer.h.{block}", "norm_2" if letter == MLP else "norm_1"
            yield f"layers.{layer}.norm.weight", _Part(f"{place}.{norm}.weight", (width,))
            for name, part in _mixer_parts(letter, config):
                yield f"layers.{layer}.mixer.{name}", _Part(f"{place}.{part.source}", part.shape, part.take)
        yield "final_norm.weight", _Part(FINAL_NORM, (width,))
        if not config.tie_embeddings:
            yield "head.weight", _Part(HEAD, (vocabulary, width))

    def _refuse_differences(self) -> None:
        expected = {part.source: part.shape for part in self._parts.values()}
        unknown = self._tensors.keys() - expected.keys() - {HEAD}
        for names, word in ((expected.keys() - self._tensors.keys(), "lacks"), (unknown, "has an unknown")):
            if names:
                raise HFError(f"{self._path} {word} tensor {min(names)}: it is not a Samba model of the reference")
        for name, shape in expected.items():
            tensor = self._tensors[name]
            if tuple(tensor.shape) != shape:
                raise HFError(
                    f"tensor {name} in {self._path} has shape {tuple(tensor.shape)} where its model has {shape}: the "
                    "weights do not fit each other, or the number of query heads does not fit them"
                )
            if tensor.dtype not in FLOAT_DTYPES.values():
                raise HFError(f"tensor {name} in {self._path} is {tensor.dtype}: only fp32, bf16 and fp16 are read")

    def _tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise HFError(f"{self._path} lacks tensor {name}: it is not a Samba model of the reference")
        return self._tensors[name]

    def _matrix(self, name: str) -> tuple[int, int]:
        """Returns rows and columns."""
        shape = self._tensor(name).shape
        if len(shape) != 2 or 0 in shape:
            raise HFError(f"tensor {name} in {self._path} has shape {tuple(shape)} and is no matrix")
        return shape[0], shape[1]


def _mixer_parts(letter: str, config: ModelConfig) -> Iterator[tuple[str, _Part]]:
    """Yields a mixer's canonical names, and how the tensors are made of those of its block."""
    width, inner, states, rank = config.hidden_size, config.inner_size, config.d_state, config.dt_rank_size
    if letter == MAMBA:
        shapes = {
            "A_log": (inner, states),
            "D": (inner,),
            "x_proj.weight": (rank + 2 * states, inner),
            "dt_proj.weight": (inner, rank),
            "dt_proj.bias": (inner,),
            "out_proj.weight": (width, inner),
            "conv.bias": (inner,),
        }
        for name, source in MAMBA_TENSORS.items():
            yield name, _Part(source, shapes[name])
        yield "conv.weight", _Part("attn.conv1d.weight", (inner, 1, config.d_conv), lambda whole: whole.squeeze(1))
        for number, name in enumerate(("in_proj.x.weight", "in_proj.z.weight")):
            yield name, _Part("attn.in_proj.weight", (2 * inner, width), _rows(number * inner, inner))
    elif letter == ATTENTION:
        rows = width + 2 * config.kv_size
        for name in ("q", "k", "v"):
            yield f"qkv_proj.{name}.weight", _Part(QKV, (rows, width), _of_groups(name, config))
        yield "o_proj.weight", _Part("attn.proj.weight", (width, width))
    else:
        for name, source in MLP_TENSORS.items():
            shape = (width, config.mlp_size) if name == "down_proj.weight" else (config.mlp_size, width)
            yield name, _Part(source, shape)


def _rows(start: int, count: int) -> Callable[[Tensor], Tensor]:
    return lambda whole: whole[start : start + count]


def _of_groups(name: str, config: ModelConfig) -> Callable[[Tensor], Tensor]:
    """Takes queries, keys or values out of a projection [groups * (queries of a group + 2) * head dim, width]."""
    groups, queries = config.num_kv_heads, config.num_query_heads // config.num_kv_heads
    first, count = {"q": (0, queries), "k": (queries, 1), "v": (queries + 1, 1)}[name]

    def take(whole: Tensor) -> Tensor:
        grouped = whole.view(groups, queries + 2, config.head_dim, -1)
        return grouped[:, first : first + count].reshape(groups * count * config.head_dim, -1)

    return take


def _load(path: Path) -> Any:
    """
    Raises:
        HFError: the file is damaged, or no pickle of tensors and plain values alone.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise HFError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # torch raises many kinds for damaged files, and for those of before its version 1.6
        if type(error).__name__ == "UnpicklingError":  # of pickle, which no file of ours imports
            raise HFError(
                f"{path} holds more than tensors and plain values, which only executing code of it would read: save "
                'its weights alone, as torch.save({"model": state_dict}, ...) does'
            ) from error
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise HFError(f"{path} cannot be read as torch's checkpoint ({reason}): copy or save it again") from error


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    """Returns the weights by lit-gpt's names, of what the reference's training saves or of weights alone."""
    weights = content.get("model", content) if isinstance(content, Mapping) else None
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise HFError(f'{path} holds no weights: neither it nor its entry "model" is a mapping of names to tensors')
    return {_WRAPPERS.sub("", str(name)): tensor.detach() for name, tensor in weights.items()}


def _model_name(content: Mapping[str, Any]) -> str | None:
    hparams = content.get("hparams")
    name = hparams.get("model_name") if isinstance(hparams, Mapping) else None
    return name if isinstance(name, str) else None
