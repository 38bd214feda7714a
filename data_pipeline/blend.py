"""What a blend of sources will draw, from their manifests alone, before any of it is indexed or read."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from .config import DataConfig, WeightedSource
from .errors import DataError
from .shards import Manifest, read_manifest

# Up to here repeated text is worth nearly as much as new text (Muennighoff et al., arXiv 2305.16264).
HARMLESS_EPOCHS = 4


@dataclass(frozen=True)
class Draw:
    """One source's part of a run: its share of the samples, the tokens it has to train on, and how many are drawn."""

    prefix: str
    share: float
    train_tokens: int
    drawn_tokens: int

    @property
    def epochs(self) -> float:
        """How often its training part is gone through."""
        return self.drawn_tokens / self.train_tokens


def parse_blend(texts: Sequence[str], *, validation_fraction: float) -> DataConfig:
    """PREFIX or PREFIX=WEIGHT each, all with a weight or none. Raises DataError for what is neither."""
    try:
        return DataConfig(train=_sources(texts), sequence_length=1, validation_fraction=validation_fraction)
    except ValidationError as error:
        raise DataError(
            error.errors()[0]["msg"].removeprefix("Value error, ").replace("data.train", "the blend")
        ) from None


def _sources(texts: Sequence[str]) -> list[str | WeightedSource]:
    sources: list[str | WeightedSource] = []
    for text in texts:
        prefix, separator, weight = text.rpartition("=")
        if not separator:
            sources.append(text)
            continue
        try:
            sources.append(WeightedSource(prefix=prefix, weight=float(weight)))
        except ValueError:
            raise DataError(f"the source {text!r} has no weight above 0 after '='; write PREFIX=WEIGHT") from None
    return sources


def blend_draws(config: DataConfig, *, tokens: int) -> list[Draw]:
    """What a run of `tokens` training tokens draws from each source of the config.

    The training part is counted as that fraction of a source's tokens, and may differ by the length of a document in
    each shard. Raises DataError where a source has no manifest, or two have different tokenizers.
    """
    manifests = [_manifest(prefix) for prefix in config.prefixes]
    for prefix, manifest in zip(config.prefixes, manifests, strict=True):
        if manifest.tokenizer.sha256 != manifests[0].tokenizer.sha256:
            raise DataError(
                f"{config.prefixes[0]} and {prefix} belong to different tokenizers; preprocess all data with one"
            )
    train = [
        round((1 - fraction) * sum(shard.tokens for shard in manifest.shards))
        for manifest, fraction in zip(manifests, config.validation_fractions, strict=True)
    ]
    weights = config.weights or train
    return [
        Draw(prefix, weight / sum(weights), train_tokens, round(tokens * weight / sum(weights)))
        for prefix, weight, train_tokens in zip(config.prefixes, weights, train, strict=True)
    ]


def sum_draws(draws: Sequence[Sequence[Draw]]) -> list[Draw]:
    """What the phases of a run draw from each source together."""
    drawn: Counter[str] = Counter()
    train_tokens = {draw.prefix: draw.train_tokens for phase in draws for draw in phase}
    for draw in (draw for phase in draws for draw in phase):
        drawn[draw.prefix] += draw.drawn_tokens
    total = drawn.total()
    return [Draw(prefix, drawn[prefix] / total, tokens, drawn[prefix]) for prefix, tokens in train_tokens.items()]


def _manifest(prefix: str) -> Manifest:
    manifest = read_manifest(prefix)
    if manifest is None:
        raise DataError(f"{prefix}.json does not exist: a blend is reckoned from the manifests of preprocessed data")
    return manifest


def describe_draws(draws: Sequence[Draw], *, warns: bool = True) -> str:
    """A table, and a line for each source that is repeated.

    Args:
        warns: whether there are such lines.
    """
    width = max(len("source"), *(len(draw.prefix) for draw in draws))
    total = Draw("all", 1, sum(draw.train_tokens for draw in draws), sum(draw.drawn_tokens for draw in draws))
    lines = [f"{'source':<{width}} {'share':>8} {'training tokens':>20} {'tokens drawn':>20} {'epochs':>8}"]
    lines += [
        f"{draw.prefix:<{width}} {draw.share:>8.2%} {draw.train_tokens:>20,} {draw.drawn_tokens:>20,} "
        f"{draw.epochs:>8.2f}"
        for draw in (*draws, total)
    ]
    for draw in draws if warns else ():
        if draw.epochs > HARMLESS_EPOCHS:
            lines.append(
                f"warning: {draw.prefix} is gone through {draw.epochs:.1f} times; beyond {HARMLESS_EPOCHS} epochs "
                "repeated text teaches little, so lower its weight or give more text"
            )
        elif draw.epochs > 1:
            lines.append(f"{draw.prefix} is repeated: {draw.epochs:.2f} epochs")
    return "\n".join(lines)
