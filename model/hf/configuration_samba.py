"""The Hugging Face configuration of Samba.

Keys and defaults are those of flash-linear-attention's `samba`, so one folder serves both wherever that package can
express the model. Added here are `pattern`, `mlp_size`, `layer_types`, `sliding_window` and `extensions`. A block is a
mixer with the MLP behind it; a mixer without an MLP and an MLP without a mixer are blocks of their own.

The pattern's letters are M (Mamba), * (attention), - (MLP), and those that `extensions` describes:

    {"T": {"name": "token_shift", "layer_type": "linear_attention", "is_mlp": false, "sizes": {"rank": 4}}}

`layer_type` is the kind of cache layer that transformers makes for the mixer, `sizes` are what its layer is made with,
and `is_mlp` says whether it stands behind a mixer in the mixer's block, as an MLP does.
"""

import math
import os
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

MAMBA, ATTENTION, MLP = "M", "*", "-"

# The kinds of cache layer that transformers builds for blocks; NO_CACHE is of one that holds nothing.
NO_CACHE, SLIDING_ATTENTION, FULL_ATTENTION = "moe", "sliding_attention", "full_attention"
LAYER_TYPES = {MAMBA: "linear_attention", ATTENTION: SLIDING_ATTENTION, MLP: NO_CACHE}
CACHE_LAYERS = (*LAYER_TYPES.values(), FULL_ATTENTION)
EXTENSION_KEYS = {"name": str, "layer_type": str, "is_mlp": bool, "sizes": dict}

# What flash-linear-attention takes when the key is missing.
FLA_ATTENTION = {
    "layers": [1, 3, 5, 7, 9, 11, 13, 15, 17],
    "num_heads": 18,
    "num_kv_heads": 18,
    "qkv_bias": False,
    "window_size": 2048,
    "rope_theta": 10000.0,
}
FLA_HIDDEN_RATIO = 4

# There is no last position; programs that cut their input by max_position_embeddings are given this one. It is not
# larger because flash-linear-attention makes a table of rotary angles as long as it.
MAX_POSITIONS = 2**20
FORMER_MAX_POSITIONS = 1_000_000_000  # of folders from before that
FLA_MLP_MULTIPLE = 256


class Block(NamedTuple):
    """One block of the model: the letters of its layers and the numbers that these have in the pattern."""

    mixer: str | None
    mixer_sublayer: int | None
    mlp: str | None
    mlp_sublayer: int | None


def pattern_blocks(pattern: str, *, mlps: str = MLP) -> list[Block]:
    """Returns the blocks of a pattern, in which the letters `mlps` stand behind a mixer where there is one."""
    blocks: list[Block] = []
    for number, letter in enumerate(pattern):
        if letter not in mlps:
            blocks.append(Block(letter, number, None, None))
        elif blocks and blocks[-1].mlp is None:
            blocks[-1] = blocks[-1]._replace(mlp=letter, mlp_sublayer=number)
        else:
            blocks.append(Block(None, None, letter, number))
    return blocks


def fla_mlp_size(hidden_size: int, hidden_ratio: float) -> int:
    """The MLP width that flash-linear-attention makes of a ratio."""
    return math.ceil(int(hidden_size * hidden_ratio * 2 / 3) / FLA_MLP_MULTIPLE) * FLA_MLP_MULTIPLE


def fla_hidden_ratio(hidden_size: int, mlp_size: int) -> float | None:
    """The simplest ratio (fewest binary places) that gives the MLP width there; None when there is none."""
    if mlp_size % FLA_MLP_MULTIPLE:
        return None
    for places in range(16):
        ratio = math.floor(mlp_size * 1.5 / hidden_size * 2**places) / 2**places
        if fla_mlp_size(hidden_size, ratio) == mlp_size:
            return int(ratio) if places == 0 else ratio
    return None


class SambaConfig(PreTrainedConfig):
    """What a Samba model is.

    Either `pattern` and `mlp_size` are given, or num_hidden_layers, attn["layers"] and hidden_ratio as
    flash-linear-attention has them: then every block is a mixer with an MLP. The other of the two is derived.
    `extensions` is written for mixers beyond the first three. Raises ValueError when keys contradict each other or ask
    for something that this implementation lacks.

    intermediate_size is Mamba's inner width, mlp_size the MLP's. hidden_act "swish" is SiLU.

    `sliding_window` and attn["window_size"] are one number: setting either sets both, and sliding_window wins where two
    are given. training_sequence_tokens is the length that the model was trained at, which limits nothing. Folders of
    other versions and of flash-linear-attention have it as max_position_embeddings, and it is read from there.
    """

    model_type = "samba"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 - Trainer adds lists to it

    pattern: str | None = None
    extensions: dict[str, dict] | None = None
    vocab_size: int = 32000
    hidden_size: int = 2304
    num_hidden_layers: int | None = None
    num_layers: int | None = None  # some versions of flash-linear-attention read the number of blocks under this name
    mlp_size: int | None = None
    hidden_ratio: int | float | None = None
    hidden_act: str = "swish"
    attn: dict | None = None
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    state_size: int = 16
    expand: int = 2
    intermediate_size: int | None = None
    conv_kernel: int = 4
    use_bias: bool = False
    use_conv_bias: bool = True
    time_step_rank: int | str = "auto"
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    norm_eps: float = 1e-5
    initializer_range: float = 0.02
    max_position_embeddings: int = MAX_POSITIONS
    training_sequence_tokens: int | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs: Any) -> None:
        given_layers = (self.attn or {}).get("layers") if self.pattern else None
        window = {} if self.sliding_window is None else {"window_size": self.sliding_window}
        self.attn = FLA_ATTENTION | (self.attn or {}) | window
        self.sliding_window = self.attn["window_size"]
        if self.pattern is None:
            attention = set(self.attn["layers"])
            count = 18 if self.num_hidden_layers is None else self.num_hidden_layers
            self.pattern = "".join((ATTENTION if i in attention else MAMBA) + MLP for i in range(count))
        if self.max_position_embeddings != MAX_POSITIONS:
            if self.training_sequence_tokens is None and self.max_position_embeddings != FORMER_MAX_POSITIONS:
                self.training_sequence_tokens = self.max_position_embeddings
            self.max_position_embeddings = MAX_POSITIONS
        self._check_letters()
        if self.mlp_size is None:
            self.mlp_size = fla_mlp_size(self.hidden_size, self.hidden_ratio or FLA_HIDDEN_RATIO)
        if self.time_step_rank == "auto":
            self.time_step_rank = math.ceil(self.hidden_size / 16)
        self._derive_from_pattern(given_layers)
        self._refuse_unsupported()
        super().__post_init__(**kwargs)

    def __setattr__(self, key: str, value: Any) -> None:
        super().__setattr__(key, value)
        if key == "sliding_window" and value is not None and "window_size" in (self.__dict__.get("attn") or {}):
            self.__dict__["attn"] = self.attn | {"window_size": value}
        elif key == "attn" and "window_size" in (value or {}) and self.__dict__.get("sliding_window") is not None:
            self.__dict__["sliding_window"] = value["window_size"]

    def _check_letters(self) -> None:
        for letter, extension in (self.extensions or {}).items():
            given = {key: type(value) for key, value in extension.items()}
            if letter in LAYER_TYPES or len(letter) != 1 or given != EXTENSION_KEYS:
                raise ValueError(
                    f"extensions has {letter!r}: {extension}; it describes other letters than M, * and -, each by "
                    f"{', '.join(EXTENSION_KEYS)}"
                )
            if extension["layer_type"] not in CACHE_LAYERS:
                kinds = ", ".join(CACHE_LAYERS)
                raise ValueError(
                    f"extensions gives {letter} the layer_type {extension['layer_type']!r}: use one of {kinds}"
                )
        letters = [*LAYER_TYPES, *(self.extensions or {})]
        if not self.pattern or set(self.pattern) - set(letters):
            listed = f"{', '.join(letters[:-1])} and {letters[-1]}"
            raise ValueError(f"pattern is {self.pattern!r}: allowed are the letters {listed}")

    def _derive_from_pattern(self, given_layers: list[int] | None) -> None:
        """Fills the keys that follow from others; one that was given must agree."""
        mixers = [block.mixer for block in self.blocks]
        others = {letter: extension["layer_type"] for letter, extension in (self.extensions or {}).items()}
        layer_types = {None: NO_CACHE} | LAYER_TYPES | others
        derived = {
            "num_hidden_layers": len(mixers),
            "num_layers": len(mixers),
            "layer_types": [layer_types[mixer] for mixer in mixers],
            "intermediate_size": self.expand * self.hidden_size,
        }
        for key, value in derived.items():
            given = getattr(self, key)
            if given is not None and given != value:
                raise ValueError(f"{key} is {given!r}, but pattern, attn, expand and hidden_size make it {value!r}")
            setattr(self, key, value)
        attention = [i for i, mixer in enumerate(mixers) if mixer == ATTENTION]
        if given_layers is not None and sorted(given_layers) != attention:
            raise ValueError(f"attn['layers'] is {given_layers}, but pattern {self.pattern} makes it {attention}")
        self.attn = self.attn | {"layers": attention}
        if self.hidden_ratio is None:
            self.hidden_ratio = fla_hidden_ratio(self.hidden_size, self.mlp_size)
        elif fla_mlp_size(self.hidden_size, self.hidden_ratio) != self.mlp_size:
            raise ValueError(f"hidden_ratio is {self.hidden_ratio}, which does not make mlp_size {self.mlp_size}")

    def _refuse_unsupported(self) -> None:
        fixed = {"use_bias": False, "use_conv_bias": True, "attn.qkv_bias": False}
        given = {"use_bias": self.use_bias, "use_conv_bias": self.use_conv_bias, "attn.qkv_bias": self.attn["qkv_bias"]}
        for key, value in fixed.items():
            if given[key] != value:
                raise ValueError(f"{key} is {given[key]}, but this implementation of Samba only has {key}={value}")
        if self.hidden_act not in ("swish", "silu"):
            raise ValueError(f"hidden_act is {self.hidden_act!r}, but Samba's is 'swish' (the same as 'silu')")
        if self.hidden_size % self.attn["num_heads"] or self.attn["num_heads"] % self.attn["num_kv_heads"]:
            raise ValueError(
                f"attn has num_kv_heads {self.attn['num_kv_heads']} and num_heads {self.attn['num_heads']} at "
                f"hidden_size {self.hidden_size}: each must divide the next"
            )

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As its parent's. Classes that were not loaded from a folder's code write none, so nothing may refer to it."""
        if self._auto_class is None and hasattr(self, "auto_map"):
            del self.auto_map
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As its parent's. Without further mixers the content is what flash-linear-attention's folders have."""
        content = super().to_dict()
        if not self.extensions:
            content.pop("extensions", None)
        return content

    @property
    def blocks(self) -> list[Block]:
        others = (letter for letter, extension in (self.extensions or {}).items() if extension["is_mlp"])
        return pattern_blocks(self.pattern, mlps="".join((MLP, *others)))

    def sizes(self, name: str) -> dict[str, Any]:
        """Returns what the layer of an extension is made with. Raises KeyError where no letter has that name."""
        return {extension["name"]: extension["sizes"] for extension in (self.extensions or {}).values()}[name]

    @property
    def num_attention_heads(self) -> int:
        return self.attn["num_heads"]

    @property
    def num_key_value_heads(self) -> int:
        return self.attn["num_kv_heads"]

    @property
    def rotary_base(self) -> float | None:
        """The base of the rotary angles; None: the attention knows no positions."""
        return self.attn["rope_theta"]

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.attn["num_heads"]

    @property
    def fla_obstacle(self) -> str | None:
        """One sentence on why flash-linear-attention cannot load this model; None when it can."""
        for letter, extension in (self.extensions or {}).items():
            if letter in self.pattern:
                return f"It has no layer like {letter} ({extension['name']}) of the pattern {self.pattern}."
        for i, block in enumerate(self.blocks):
            if block.mlp_sublayer is None:
                return f"Block {i} of the pattern {self.pattern} is a mixer without an MLP."
            if block.mixer is None:
                return f"Block {i} of the pattern {self.pattern} is an MLP without a mixer."
        if self.rotary_base is None:
            return "It has no attention without rotary positions."
        if self.mlp_size % FLA_MLP_MULTIPLE:
            return f"The MLP width {self.mlp_size} is not a multiple of {FLA_MLP_MULTIPLE}."
        if self.hidden_ratio is None:
            return f"No hidden_ratio gives the MLP width {self.mlp_size} at hidden_size {self.hidden_size}."
        return None

    @property
    def fla_compatible(self) -> bool:
        return self.fla_obstacle is None
