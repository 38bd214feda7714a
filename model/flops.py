"""Floating-point operations of a training step, counted by part."""

from dataclasses import dataclass

from sambalm.model.config import ATTENTION, MAMBA, MLP, ModelConfig

# Of the scan, for each channel and state: dt * A, its exponential, decay * h, dt * u * B (one of its two products is
# shared by the states), the sum, C * h and the sum over states.
SCAN_FLOPS = 7
BACKWARD_OVER_FORWARD = 2

# Dense bf16 peak of one device in FLOP/s, by a part of the name that CUDA gives it; the first match counts.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}


@dataclass(frozen=True)
class StepFlops:
    """Operations a token, forward and backward, by part."""

    matrix: float
    window: float
    scan: float

    @property
    def total(self) -> float:
        return self.matrix + self.window + self.scan


def flops_per_token(config: ModelConfig, *, sequence_length: int) -> StepFlops:
    """Counts a multiplication and an addition as two; norms, gates and the convolution are left out (under 1%)."""
    matrix = sum(_matrix_weights(config, letter) for letter in config.pattern) + config.hidden_size * config.vocab_size
    training = 1 + BACKWARD_OVER_FORWARD
    return StepFlops(
        matrix=training * 2.0 * matrix,
        window=config.pattern.count(ATTENTION) * _window(config, sequence_length),
        scan=config.pattern.count(MAMBA) * _scan(config),
    )


def layer_flops(config: ModelConfig, *, sequence_length: int) -> list[float]:
    """Operations a token of each sublayer, forward and backward."""
    beside = {MAMBA: _scan(config), ATTENTION: _window(config, sequence_length), MLP: 0.0}
    training = 1 + BACKWARD_OVER_FORWARD
    cost = {letter: training * 2.0 * _matrix_weights(config, letter) + extra for letter, extra in beside.items()}
    return [cost[letter] for letter in config.pattern]


def _matrix_weights(config: ModelConfig, letter: str) -> int:
    width, inner, rank, states = config.hidden_size, config.inner_size, config.dt_rank_size, config.d_state
    return {
        MAMBA: width * 2 * inner + inner * (rank + 2 * states) + rank * inner + inner * width,
        ATTENTION: width * (2 * width + 2 * config.kv_size),
        MLP: 3 * width * config.mlp_size,
    }[letter]


def _window(config: ModelConfig, sequence_length: int) -> float:
    keys = _mean_keys(sequence_length, config.window)
    return (1 + BACKWARD_OVER_FORWARD) * 4.0 * config.hidden_size * keys


def _scan(config: ModelConfig) -> float:
    return (1 + BACKWARD_OVER_FORWARD) * float(SCAN_FLOPS * config.inner_size * config.d_state)


def peak_flops(device_name: str) -> float | None:
    """Peak of a device by its CUDA name; None when it is not known."""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in device_name), None)


def _mean_keys(length: int, window: int) -> float:
    """Keys that a query sees, on average over a sequence: position t sees min(t, window), t counted from 1."""
    ramp = min(length, window)
    return (ramp * (ramp + 1) / 2 + (length - ramp) * window) / length
