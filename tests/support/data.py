"""Small texts and shards. A module of its own: spawned processes import it, and there are several conftest modules."""

import json
import random
from pathlib import Path

import numpy as np

from sambalm.data_pipeline.shards import ShardWriter

VOCAB_SIZE = 400


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def make_texts(documents: int, *, seed: int) -> list[str]:
    draw = random.Random(seed)
    words = ["stone", "river", "42", "light\n", "  under", "harbour", "seven", "été", "window", "quiet"]
    letters = random.Random(0)
    words += ["".join(letters.choices("abcdefghijklmnop", k=letters.randint(3, 9))) for _ in range(40)]
    return [" ".join(draw.choices(words, k=draw.randint(5, 60))) for _ in range(documents)]


def write_shard(prefix: Path, documents: list, *, vocab_size: int = 60_000) -> str:
    """One bare pair of files, as other tools make them, without a manifest."""
    writer = ShardWriter(prefix, vocab_size)
    for tokens in documents:
        writer.add(tokens)
    writer.finish()
    writer.commit()
    return str(prefix)


def counting_documents(documents: int, *, start: int = 0, seed: int = 0) -> list[np.ndarray]:
    """Documents of 3 to 40 tokens whose ids count up from `start`, so that an id tells its document and place."""
    lengths = np.random.RandomState(seed).randint(3, 40, size=documents)
    return np.split(start + np.arange(lengths.sum()), np.cumsum(lengths)[:-1])


def listing(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))
