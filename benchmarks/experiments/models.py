"""The models as a table, each fitted to one number of parameters by the width of its MLPs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sambalm.model.config import ModelConfig
from sambalm.model.parameters import count_parameters

from .scales import Scale


class ExperimentError(Exception):
    """A mistake that the user can mend, as one sentence."""


@dataclass(frozen=True)
class Variant:
    """A model of a comparison.

    Args:
        title: as tables show it.
        block: letters of a layer pattern.
        share: sublayers over those of the model of Mamba layers alone.
        keys: of the section `model`, over what all models share; of `heads` multiples of the scale's.
        window_share: window over the scale's.
    """

    title: str
    block: str
    share: float = 1.0
    keys: Mapping[str, Any] = field(default_factory=dict)
    window_share: float = 1.0
    heads_share: float = 1.0
    kv_share: float = 1.0

    @property
    def grows(self) -> bool:
        """Whether its state grows with the text."""
        return "F" in self.block


SAMBA, SHORT_WINDOW = "samba", "samba-window-256"
ARCHITECTURES = {
    SAMBA: Variant("Samba", "M-*-"),
    "llama": Variant("Llama, full attention", "F-"),
    "llama-swa": Variant("Llama-SWA", "*-"),
    "mamba": Variant("Mamba", "M"),
    "mamba-swa-mlp": Variant("Mamba-SWA-MLP", "M*-"),
    "mlp2-swa-mlp": Variant("MLP2-SWA-MLP", "=-*-"),
    "samba-nope": Variant("Samba-NoPE", "M-*-", keys={"rope_base": None}),
    "sliding-gla": Variant("Sliding GLA", "A-*-"),
    "sliding-retnet": Variant("Sliding RetNet", "R-*-"),
    "gated-deltanet": Variant("Gated DeltaNet", "G-*-"),
    "sambay": Variant("SambaY", "S-*-S-F-U-X-U-X-"),
    "mega-s6": Variant("Mega-S6", "Z-"),
    SHORT_WINDOW: Variant("Samba, window 256", "M-*-", window_share=1 / 8),  # of a scale whose window is 2048
}
_WINDOWS = {"512": 1 / 4, "1024": 1 / 2, "4096": 2.0}
PATTERNS = {
    SAMBA: ARCHITECTURES[SAMBA],
    "attention-first": Variant("attention before Mamba", "*-M-"),
    "mamba-swa-mlp": ARCHITECTURES["mamba-swa-mlp"],
    "mamba-3-of-4": Variant("3 Mamba to 1 attention", "M-M-M-*-"),
    "mamba-1-of-4": Variant("1 Mamba to 3 attention", "M-*-*-*-"),
    "mamba-mlp": Variant("Mamba and MLP", "M-"),
    "swa-mlp": ARCHITECTURES["llama-swa"],
    "mamba-below": Variant("all Mamba below all attention", "M-M-M-M-*-*-*-*-"),
    "attention-below": Variant("all attention below all Mamba", "*-*-*-*-M-M-M-M-"),
    "no-mlp": Variant("Mamba and attention", "M*", share=1.25),
    "pairs": Variant("two mixers, then two MLPs", "M*--"),
    "window-256": ARCHITECTURES[SHORT_WINDOW],
    **{f"window-{name}": Variant(f"window {name}", "M-*-", window_share=share) for name, share in _WINDOWS.items()},
    "heads-half": Variant("half the heads", "M-*-", heads_share=0.5, kv_share=0.5),
    "heads-twice": Variant("twice the heads", "M-*-", heads_share=2.0, kv_share=2.0),
    "kv-quarter": Variant("a quarter of the key and value heads", "M-*-", kv_share=0.25),
    "state-8": Variant("8 states", "M-*-", keys={"d_state": 8}),
    "state-32": Variant("32 states", "M-*-", keys={"d_state": 32}),
    "state-64": Variant("64 states", "M-*-", keys={"d_state": 64}),
    "conv-2": Variant("a convolution of 2 taps", "M-*-", keys={"d_conv": 2}),  # the model takes no fewer
}


# Of mixers that have sizes of their own, as the paper has them: the section's name and values.
_SIZES: dict[str, Callable[[Scale], tuple[str, dict[str, int]]]] = {
    "=": lambda scale: ("mlp2", {"size": 2 * scale.hidden_size}),
    # Keys are half as wide as the stream, and values as wide. The paper's heads have 192 channels.
    "A": lambda scale: ("gla", {"num_heads": 2, "head_dim": scale.hidden_size // 4, "expand_v": 2}),
    # Keys are three quarters as wide as the stream, and values twice as wide as keys.
    "G": lambda scale: ("gated_deltanet", {"num_heads": 3, "head_dim": scale.hidden_size // 4}),
    # States of a quarter of the stream's width, and heads of an eighth.
    "S": lambda scale: ("mamba2", {"d_state": scale.hidden_size // 4, "head_dim": scale.hidden_size // 8}),
    # Half as many heads as the attention has; keys are as wide as the stream, and values twice.
    "R": lambda scale: ("retnet", {"num_heads": scale.heads // 2, "head_dim": 2 * scale.hidden_size // scale.heads}),
    # The paper's 128 channels are a twelfth of the stream's, of which twice as many have to divide these.
    "Z": lambda scale: ("mega", {"key_dim": scale.hidden_size // 16, "chunk_tokens": scale.window}),
}


def fitted_model(variant: Variant, scale: Scale, *, vocab_size: int) -> dict[str, Any]:
    """Returns the section `model` of a variant with as many parameters as the model of Mamba layers alone.

    Raises:
        ExperimentError: no width of its MLPs brings it within the scale's tolerance.
    """
    target = _parameters(_section(ARCHITECTURES["mamba"], scale, vocab_size=vocab_size))
    section = _section(variant, scale, vocab_size=vocab_size)
    if "-" in section["pattern"]:
        step = scale.mlp_multiple
        narrow, wide = (_parameters(section | {"mlp_size": step * times}) for times in (1, 2))
        times = 1 + round((target - narrow) / (wide - narrow))
        section["mlp_size"] = step * max(times, 1)
    found = _parameters(section)
    if abs(found - target) > scale.tolerance * target:
        raise ExperimentError(
            f"the pattern {section['pattern']} gives {found:,} parameters, where {target:,} are asked for: change its "
            "number of sublayers (share) or its mixers' sizes (keys) in benchmarks/experiments/models.py"
        )
    return section


def _section(variant: Variant, scale: Scale, *, vocab_size: int) -> dict[str, Any]:
    times = max(1, round(scale.sublayers * variant.share / len(variant.block)))
    section: dict[str, Any] = {"pattern": f"{variant.block} x {times}", "hidden_size": scale.hidden_size}
    section |= {"vocab_size": vocab_size, "tie_embeddings": True}
    letters = set(variant.block)
    if letters & {"*", "F"}:
        section["num_query_heads"] = round(scale.heads * variant.heads_share)
        section["num_kv_heads"] = max(1, round(scale.heads * variant.kv_share))
    if "*" in letters:
        section["window"] = round(scale.window * variant.window_share)
    if "-" in letters:
        section["mlp_size"] = scale.mlp_multiple
    if letters & _SIZES.keys():
        section["mixers"] = dict(_SIZES[letter](scale) for letter in letters & _SIZES.keys())
    return section | dict(variant.keys)


def _parameters(section: Mapping[str, Any]) -> int:
    return count_parameters(ModelConfig(**section))["total"]
