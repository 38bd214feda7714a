"""Pages of made English that pass Gopher's rules, and copies of them with some words changed."""

import random

_COMMON = ["the", "of", "and", "that", "with", "have", "to", "be"]
_LETTERS = ["ba", "co", "der", "fi", "gan", "hou", "in", "ker", "lo", "mar", "ner", "os", "pre", "ro", "sti", "ten"]


def _words() -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices(_LETTERS, k=draw.randint(2, 4))) for _ in range(1500)]


def make_pages(pages: int, *, words: int, seed: int) -> list[str]:
    """Texts without a run of five words in common, so that none is like another."""
    draw, vocabulary = random.Random(seed), _words()
    return [" ".join(_sentence(draw, vocabulary) for _ in range(words // 10)) for _ in range(pages)]


def _sentence(draw: random.Random, vocabulary: list[str]) -> str:
    chosen = [draw.choice(_COMMON) if draw.random() < 0.3 else draw.choice(vocabulary) for _ in range(10)]
    return " ".join(chosen).capitalize() + "."


def with_changes(page: str, *, changes: int, seed: int) -> str:
    """A page with so many of its words replaced."""
    draw, vocabulary, words = random.Random(seed), _words(), page.split(" ")
    for place in draw.sample(range(len(words)), changes):
        words[place] = draw.choice(vocabulary)
    return " ".join(words)
