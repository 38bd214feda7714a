"""Documents as tokens: of shards, of text files, or of the held-out part of a run's data."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from sambalm.data_pipeline.config import DataConfig
from sambalm.data_pipeline.documents import read_documents
from sambalm.data_pipeline.inputs import expand_inputs
from sambalm.data_pipeline.shards import manifest_path, read_manifest
from sambalm.data_pipeline.sources import open_sources
from sambalm.data_pipeline.tokenizer_formats import load_tokenizer
from sambalm.evaluation.errors import EvaluationError
from sambalm.evaluation.models.base import LanguageModel
from sambalm.evaluation.task import Surroundings


def documents(data: Sequence[str], surroundings: Surroundings, *, of: str) -> Iterator[np.ndarray]:
    """Yields documents as int64 [tokens], each with the token that ends it if there is one.

    Args:
        data: prefixes of token shards, or text files as `sambalm data preprocess` takes them; none for the held-out
            part of the run.
        of: the task, for messages.

    Raises:
        EvaluationError: there is no data, or it is not of the model's tokenizer.
        DataError: files are missing or damaged.
    """
    model, run = surroundings.model, surroundings.run
    if not data and run is None:
        raise EvaluationError(
            f"{of} has nothing to read, since {model.identity.path} is no run with held-out data: give --data with a "
            "prefix of token shards or with text files"
        )
    if not data:
        assert run is not None
        if not any(run.data.validation_fractions):
            validated = run.data.separate_validation
            other = f", such as that of its data.validation, {validated.prefixes[0]}" if validated else ""
            raise EvaluationError(
                f"{of} has nothing to read, since {model.identity.path} holds out no part of its training data "
                f"(data.validation_fraction is 0): give --data with a prefix of token shards{other}"
            )
        config = run.data.model_copy(update={"cache_dir": str(surroundings.cache_dir), "verify": False})
        for source in open_sources(config):
            found = source.stream(held_out=True).documents()
            yield from _of_the_model(found, model, prefix=source.prefix)
        return
    for name in data:
        yield from _shards(name, surroundings) if _is_prefix(name) else _texts(name, model)


def shown(data: Sequence[str], surroundings: Surroundings) -> str:
    """Names the data for messages and protocols."""
    return ", ".join(data) if data else f"the held-out part of {surroundings.model.identity.path}"


def digest(arrays: Sequence[np.ndarray]) -> str:
    """Returns a hexadecimal SHA-256 of tokens and of where documents end."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(f"{len(array)}\n".encode())
        found.update(array.astype(np.int64).tobytes())
    return found.hexdigest()


def _is_prefix(name: str) -> bool:
    return manifest_path(name).is_file() or Path(f"{name}.idx").is_file()


def _shards(prefix: str, surroundings: Surroundings) -> Iterator[np.ndarray]:
    config = DataConfig(train=prefix, sequence_length=1, verify=False, cache_dir=str(surroundings.cache_dir))
    (source,) = open_sources(config)
    parts = (source.stream(held_out=held_out).documents() for held_out in (False, True))
    found = (document for part in parts for document in part)
    yield from _of_the_model(found, surroundings.model, prefix=prefix)


def _of_the_model(found: Iterator[np.ndarray], model: LanguageModel, *, prefix: str) -> Iterator[np.ndarray]:
    """Yields documents of shards, which are refused where another tokenizer made them."""
    for number, ids in enumerate(_checked(found, model, name=prefix)):
        if number == 0:
            _refuse_other_tokenizer(prefix, ids, model)
        yield ids


def _checked(found: Iterator[np.ndarray], model: LanguageModel, *, name: str) -> Iterator[np.ndarray]:
    for ids in found:
        if len(ids) and int(ids.max()) >= model.vocab_size:
            raise EvaluationError(
                f"{name} holds the id {ids.max()}, but the model's vocab_size is {model.vocab_size}: give data of its "
                "tokenizer, or text files"
            )
        yield ids


def _refuse_other_tokenizer(prefix: str, ids: np.ndarray, model: LanguageModel) -> None:
    """Compares the first document with what the model's tokenizer makes of its text."""
    manifest = read_manifest(prefix)
    file = Path(prefix).parent / manifest.tokenizer.path if manifest else None
    if manifest is None or file is None or not file.is_file():
        return
    content = ids[ids != manifest.tokenizer.eos_id].tolist()
    if model.encode(load_tokenizer(file).decode(content)) != content:
        raise EvaluationError(
            f"{prefix} was made by {file}, whose ids are not those of the model's tokenizer: give data of its "
            "tokenizer, or text files"
        )


def _texts(name: str, model: LanguageModel) -> Iterator[np.ndarray]:
    end = [] if model.end_id is None else [model.end_id]
    for file in expand_inputs([name]):
        for document in read_documents(file):
            ids = np.array(model.encode(document.text) + end, dtype=np.int64)
            yield from _checked(iter([ids]), model, name=file.name)
