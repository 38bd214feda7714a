"""Floating-point operations of a training step, counted by kind."""

from collections.abc import Mapping
from dataclasses import dataclass

from sambalm.model.config import ModelConfig
from sambalm.model.mixers.counts import FORWARD_AND_BACKWARD
from sambalm.model.registry import mixer

# Dense bf16 peak of one device in FLOP/s by NVIDIA's data sheets, by a part of the name that CUDA gives it; the first
# match counts.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}


@dataclass(frozen=True)
class StepFlops:
    """Operations a token, forward and backward."""

    matrix: float  # products with weights
    mixing: Mapping[str, float]  # beside them, by mixer: the scan, queries with keys and weights with values

    @property
    def total(self) -> float:
        return self.matrix + sum(self.mixing.values())


def flops_per_token(config: ModelConfig, *, sequence_length: int) -> StepFlops:
    """Counts a multiplication and an addition as two; norms, gates and the convolution are left out (under 1%)."""
    matrix = sum(_product_weights(config, letter) for letter in config.pattern) + config.hidden_size * config.vocab_size
    return StepFlops(
        matrix=FORWARD_AND_BACKWARD * 2.0 * matrix,
        mixing={
            one.name: config.pattern.count(one.letter) * one.mixing_flops(config, sequence_tokens=sequence_length)
            for one in config.kinds
        },
    )


def layer_flops(config: ModelConfig, *, sequence_length: int) -> list[float]:
    """Counts the operations a token of each sublayer, forward and backward."""
    cost = {
        one.letter: FORWARD_AND_BACKWARD * 2.0 * _product_weights(config, one.letter)
        + one.mixing_flops(config, sequence_tokens=sequence_length)
        for one in config.kinds
    }
    return [cost[letter] for letter in config.pattern]


def _product_weights(config: ModelConfig, letter: str) -> int:
    return sum(each.counted for each in mixer(letter).parameters(config, tensor_ranks=1) if each.in_product)


def peak_flops(device_name: str) -> float | None:
    """Returns the peak of a device by its CUDA name; None when it is not known."""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in device_name), None)
