"""The mixers by the letters of a layer pattern: those of this project, and those that other packages bring.

Another package registers a mixer through the entry point group `sambalm.mixers`, whose entries name an object of a
class of `sambalm.model.mixers.base.Mixer`. This file imports no torch, and a mixer only once a pattern has its letter.
"""

import importlib
from collections.abc import Iterable
from functools import lru_cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from sambalm.model.mixers.base import Mixer

if TYPE_CHECKING:
    from sambalm.model.config import ModelConfig

ENTRY_POINT_GROUP = "sambalm.mixers"
BUILT_IN = {
    "M": "sambalm.model.mixers.mamba.mixer:MIXER",
    "*": "sambalm.model.mixers.attention.mixer:MIXER",
    "-": "sambalm.model.mixers.mlp.mixer:MIXER",
    "F": "sambalm.model.mixers.attention.mixer:FULL",
    "=": "sambalm.model.mixers.mlp.mixer:SECOND",
    "G": "sambalm.model.mixers.delta.mixer:MIXER",
    "K": "sambalm.model.mixers.delta.mixer:KIMI",
    "X": "sambalm.model.mixers.attention.mixer:CROSS",
    "A": "sambalm.model.mixers.linear_attention.mixer:MIXER",
    "R": "sambalm.model.mixers.linear_attention.mixer:RETNET",
    "S": "sambalm.model.mixers.mamba2.mixer:MIXER",
    "U": "sambalm.model.mixers.mamba2.mixer:GMU",
    "Z": "sambalm.model.mixers.mega.mixer:MIXER",
}


class MixerError(ValueError):
    """A letter without a mixer, or a mixer that cannot be registered; one sentence for the user."""


def mixer(letter: str) -> Mixer:
    """Returns the mixer of a letter. Raises MixerError where there is none."""
    if letter in BUILT_IN:
        return _load(BUILT_IN[letter])
    found = external_mixers().get(letter)
    if found is None:
        known = ", ".join(f"{one.letter} {one.name}" for one in all_mixers())
        raise MixerError(f"no mixer has the letter {letter!r}: known are {known}")
    return found


def mixers_of(letters: Iterable[str]) -> list[Mixer]:
    """Returns each mixer of a pattern, or of some letters, once, in the registry's order."""
    return sorted((mixer(letter) for letter in set(letters)), key=lambda one: _rank(one.letter))


def all_mixers() -> list[Mixer]:
    """Returns every mixer that is installed, our own first."""
    return [*map(mixer, BUILT_IN), *external_mixers().values()]


@lru_cache(maxsize=1)
def external_mixers() -> dict[str, Mixer]:
    """Loads the mixers of other packages, by their letters.

    Raises:
        MixerError: two mixers have one letter, or one has a letter that a pattern cannot hold.
    """
    found: dict[str, Mixer] = {}
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        one = entry.load()
        if not isinstance(one, Mixer):
            raise MixerError(f"the entry point {entry.name} of {ENTRY_POINT_GROUP} names no object of the class Mixer")
        if len(one.letter) != 1 or one.letter.isdigit() or one.letter.isspace() or one.letter == "x":
            raise MixerError(f"the mixer {one.name} has the letter {one.letter!r}: take one that is no digit and no x")
        if not isinstance(getattr(one, "abilities", None), frozenset):
            raise MixerError(f"the mixer {one.name} does not say what it can do: give it `abilities`, a frozenset")
        taken = BUILT_IN.keys() | found.keys()
        if one.letter in taken:
            raise MixerError(f"the mixer {one.name} has the letter {one.letter!r}, which another mixer has")
        found[one.letter] = one
    return found


@lru_cache(maxsize=64)
def _load(reference: str) -> Mixer:
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def memory_writers(pattern: str) -> dict[int, int]:
    """Returns, by the number of each sublayer that reads a memory, the number of the one that wrote it.

    Raises:
        MixerError: there is none before it.
    """
    writers: dict[str | None, int] = {}
    found = {}
    for number, letter in enumerate(pattern):
        one = mixer(letter)
        if one.reads is not None:
            if one.reads not in writers:
                able = " or ".join(other.letter for other in all_mixers() if other.writes == one.reads)
                raise MixerError(
                    f"sublayer {number + 1} of model.pattern, {letter} ({one.name}), reads the {one.reads} of a layer "
                    f"before it, and there is none: put {able} before it"
                )
            found[number] = writers[one.reads]
        writers[one.writes] = number
    return found


def without_cuts_through_memories(pattern: str, ends: Iterable[int]) -> list[int]:
    """Returns those of some cuts of a pattern, each by the sublayers before it, that part no reader from its writer."""
    read = memory_writers(pattern).items()
    return [end for end in ends if not any(writer < end <= reader for reader, writer in read)]


def _rank(letter: str) -> tuple[int, str]:
    letters = list(BUILT_IN)
    return (letters.index(letter) if letter in BUILT_IN else len(letters), letter)


def weight_copies(config: "ModelConfig", *, tensor_ranks: int) -> int:
    """Returns how many neighbouring tensor-parallel ranks hold the same slice of some weight; 1 where none do."""
    numbers = {one.weight_copies(config, tensor_ranks=tensor_ranks) for one in config.kinds} - {1}
    if len(numbers) > 1:
        raise ValueError(f"the mixers of this model need copies of weights on {sorted(numbers)} ranks: one number only")
    return next(iter(numbers), 1)
