"""Parameter counts by kind."""

from sambalm.model.config import ModelConfig
from sambalm.model.registry import mixer


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Counts each kind of layer, all but the embeddings, and the total; a shared embedding once."""
    embedding = config.vocab_size * config.hidden_size
    counts = {"embedding": embedding}
    counts |= {
        one.name: config.pattern.count(one.letter) * layer_parameters(config, one.letter) for one in config.kinds
    }
    counts["norms"] = (len(config.pattern) + 1) * config.hidden_size
    counts["head"] = 0 if config.tie_embeddings else embedding
    total = sum(counts.values())
    return counts | {"non-embedding": total - counts["embedding"] - counts["head"], "total": total}


def layer_parameters(config: ModelConfig, letter: str) -> int:
    """Counts the parameters of one layer without its norm."""
    return sum(each.counted for each in mixer(letter).parameters(config, tensor_ranks=1))
