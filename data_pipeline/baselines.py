"""Losses of models that count: what a training run has to beat. All in nats per token."""

from dataclasses import dataclass

import numpy as np

from .config import DataConfig
from .dataset import build_validation_dataset
from .sources import Source, open_sources


@dataclass(frozen=True)
class Baselines:
    """Entropy of the validation labels themselves, and cross-entropies of models counted on the training part."""

    unigram_entropy: float
    unigram: float
    bigram: float


def baseline_losses(
    config: DataConfig,
    *,
    validation_samples: int,
    vocab_size: int,
    max_train_tokens: int = 20_000_000,
) -> Baselines:
    """Baselines on the tokens and labels of `build_validation_dataset` with the same arguments, those that count.

    Counts the training documents in stored order, all sources alike, up to `max_train_tokens`.
    Raises DataError where the data is missing, damaged or too short.
    """
    sources = open_sources(config)
    dataset = build_validation_dataset(config, sources, num_samples=validation_samples)
    samples = [dataset[number] for number in range(len(dataset))]
    counted = [slice(None) if s.loss_weights is None else s.loss_weights.numpy() > 0 for s in samples]
    tokens = np.concatenate([sample.tokens.numpy()[which] for sample, which in zip(samples, counted, strict=True)])
    labels = np.concatenate([sample.labels.numpy()[which] for sample, which in zip(samples, counted, strict=True)])
    train_tokens = _train_tokens(sources, limit_tokens=max_train_tokens)
    return Baselines(
        unigram_entropy=entropy(labels),
        unigram=unigram_cross_entropy(train_tokens, labels, vocab_size=vocab_size),
        bigram=bigram_cross_entropy(train_tokens, tokens, labels, vocab_size=vocab_size),
    )


def entropy(labels: np.ndarray) -> float:
    """Entropy of the distribution of the ids in labels [n], integer."""
    counts = np.unique(labels, return_counts=True)[1]
    frequencies = counts / counts.sum()
    return float(-(frequencies * np.log(frequencies)).sum())


def unigram_cross_entropy(train_tokens: np.ndarray, labels: np.ndarray, *, vocab_size: int) -> float:
    """Cross-entropy on labels [n] of frequencies in train_tokens [m] with one added to each id's count."""
    counts = np.bincount(train_tokens, minlength=vocab_size) + 1
    return float(-np.log(counts[labels] / counts.sum()).mean())


def bigram_cross_entropy(train_tokens: np.ndarray, tokens: np.ndarray, labels: np.ndarray, *, vocab_size: int) -> float:
    """Cross-entropy on labels [n], each after tokens [n], of an interpolated Kneser-Ney bigram of train_tokens [m].

    One discount for all counts; the lower order, the number of different ids before an id, has one added.
    """
    stream = train_tokens.astype(np.int64)
    pairs, counts = np.unique(stream[:-1] * vocab_size + stream[1:], return_counts=True)
    before, after = np.divmod(pairs, vocab_size)
    once, twice = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
    discount = once / (once + 2 * twice) if once else 0.5

    continuations = np.bincount(after, minlength=vocab_size) + 1
    lower = continuations[labels] / continuations.sum()
    context_counts = np.bincount(before, weights=counts, minlength=vocab_size)[tokens]
    context_kinds = np.bincount(before, minlength=vocab_size)[tokens]

    wanted = tokens.astype(np.int64) * vocab_size + labels
    at = np.searchsorted(pairs, wanted).clip(max=len(pairs) - 1)
    pair_counts = np.where(pairs[at] == wanted, counts[at], 0)
    seen = np.maximum(context_counts, 1)
    higher = np.maximum(pair_counts - discount, 0) / seen
    backoff = np.where(context_counts > 0, discount * context_kinds / seen, 1.0)
    return float(-np.log(higher + backoff * lower).mean())


def _train_tokens(sources: list[Source], *, limit_tokens: int) -> np.ndarray:
    parts = []
    for source in sources:
        stream = source.stream(held_out=False)
        parts.append(stream.read(0, min(limit_tokens, len(stream))))
        limit_tokens -= len(parts[-1])
    return np.concatenate(parts)
