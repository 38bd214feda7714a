"""Sizes, data and budgets of a comparison: `small` for a GPU, `tiny` to try the scripts on a CPU."""

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Scale:
    """What all models of a comparison share.

    Args:
        hidden_size: width of the residual stream.
        heads: query heads, and key and value heads.
        sublayers: of the model of Mamba layers alone, whose parameters the others are fitted to.
        mlp_multiple: divides the width of an MLP.
        tolerance: how far a model's parameters may be from that number, as a share of it.
        length: tokens of a training sample.
        window: positions that a query of window attention sees.
        batch_tokens: of one optimizer step.
        micro_batch: sequences of one forward and backward pass.
        precision: of training and of measuring.
        tokens: that a model is trained on, in full and in the sweep of learning rates.
        learning_rates: of the sweep.
        lengths: of the table that the paper has.
        pattern_lengths: of the table of patterns.
        far_lengths: of the extrapolation.
        long_lengths: beyond these, of models whose state does not grow.
        document_length: tokens of the documents that are read from their beginning.
        text_tokens: that are predicted at each length.
        evaluation_tokens: that are read together.
        tuning: how trained models are tuned on made documents.
        passkey: what they are then asked.
        phonebook_lengths: of the phonebooks.
        retrieval_lengths: of the needles and questions.
        retrieval_samples: texts of each length and kind; a tenth of them at the first of `long_lengths`.
    """

    hidden_size: int
    heads: int
    sublayers: int
    mlp_multiple: int
    tolerance: float
    length: int
    window: int
    batch_tokens: int
    micro_batch: int
    precision: str
    tokens: int
    sweep_tokens: int
    learning_rates: Sequence[float]
    lengths: Sequence[int]
    pattern_lengths: Sequence[int]
    far_lengths: Sequence[int]
    long_lengths: Sequence[int]
    document_length: int
    text_tokens: int
    evaluation_tokens: int
    tuning: "Tuning"
    passkey: "Passkey"
    phonebook_lengths: Sequence[int]
    retrieval_lengths: Sequence[int]
    retrieval_samples: int


@dataclass(frozen=True)
class Tuning:
    """How models are tuned on documents that are made.

    Args:
        documents: that are made of the longest; of shorter ones as many tokens.
        tokens: of a document; of several lengths one after the other, each for its share of the steps.
        steps: of the optimizer, each on `batch` of the longest documents or as many tokens of shorter ones.
        peak_lr: after half of the steps, as the paper has it for passkeys.
    """

    documents: int
    tokens: Sequence[int]
    steps: int
    batch: int
    peak_lr: float

    def changed(self, *, steps: int | None, tokens: Sequence[int] | None) -> "Tuning":
        """Returns it with other steps and lengths, if given; a step keeps its tokens, as do a length's documents."""
        tokens = tokens or self.tokens
        documents, batch = (max(1, count * self.tokens[-1] // tokens[-1]) for count in (self.documents, self.batch))
        return replace(self, documents=documents, tokens=tokens, steps=steps or self.steps, batch=batch)

    def documents_of(self, tokens: int) -> int:
        """Returns how many documents of so many tokens are made."""
        return self.documents * self.tokens[-1] // tokens


@dataclass(frozen=True)
class Passkey:
    """Which passkeys tuned models are asked for.

    Args:
        lengths: of the grid.
        pattern_lengths: of the grid of the patterns.
        samples: keys at each length and depth; `long_samples` at the first of the scale's `long_lengths`.
    """

    lengths: Sequence[int]
    pattern_lengths: Sequence[int]
    depths: int
    samples: int
    long_samples: int


def _powers(first: int, last: int) -> tuple[int, ...]:
    """Returns the powers of two from one to another."""
    return tuple(2**number for number in range(first.bit_length() - 1, last.bit_length()))


SCALES = {
    "small": Scale(
        hidden_size=512,
        heads=8,
        sublayers=16,
        mlp_multiple=16,
        tolerance=0.01,
        length=4096,
        window=2048,
        batch_tokens=131_072,
        micro_batch=16,
        precision="bf16",
        tokens=150_000_000,
        sweep_tokens=30_000_000,
        learning_rates=(1e-3, 2e-3, 4e-3),
        lengths=(4096, 8192, 16384),
        pattern_lengths=(4096, 16384, 65536),
        far_lengths=_powers(2**10, 2**18),
        long_lengths=(2**20, 2**22),
        document_length=2**16,
        text_tokens=2**19,
        evaluation_tokens=2**17,
        tuning=Tuning(documents=12_800, tokens=(4096,), steps=400, batch=64, peak_lr=5e-4),
        passkey=Passkey(
            lengths=_powers(2**12, 2**18),
            pattern_lengths=_powers(2**12, 2**16),
            depths=11,
            samples=5,
            long_samples=1,
        ),
        phonebook_lengths=_powers(2**10, 2**14),
        retrieval_lengths=_powers(2**12, 2**16),
        retrieval_samples=50,
    ),
    "tiny": Scale(
        hidden_size=32,
        heads=4,
        sublayers=16,
        mlp_multiple=1,
        tolerance=0.15,
        length=64,
        window=16,
        batch_tokens=256,
        micro_batch=4,
        precision="fp32",
        tokens=40 * 256,
        sweep_tokens=5 * 256,
        learning_rates=(1e-3, 4e-3),
        lengths=(64, 128),
        pattern_lengths=(64, 256),
        far_lengths=(32, 64, 128, 256),
        long_lengths=(512, 1024),
        document_length=64,
        text_tokens=512,
        evaluation_tokens=512,
        tuning=Tuning(documents=64, tokens=(640,), steps=8, batch=4, peak_lr=1e-3),
        passkey=Passkey(lengths=(256, 512), pattern_lengths=(256,), depths=2, samples=1, long_samples=1),
        phonebook_lengths=(512, 640),
        retrieval_lengths=(512, 640),
        retrieval_samples=10,
    ),
}
