"""A Samba model, read as a stream whose memory does not grow with what it has read."""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from sambalm.evaluation.models.base import Identity, LanguageModel, Reader
from sambalm.model.hf import Stream
from sambalm.model.hf.stream import Scores, fingerprint
from sambalm.pretrain.generation.source import Source
from sambalm.pretrain.generation.text import TextStream


class SambaModel(LanguageModel):
    """The model of a run, of a checkpoint or of a Hugging Face folder.

    Args:
        path: as the user named it.
        step: that its weights are of, None where they are of no run.
    """

    max_tokens, joins_rows = None, True

    def __init__(self, source: Source, *, path: Path, step: int | None) -> None:
        self._source = source
        self.device = source.model.device
        self.vocab_size = source.model.config.vocab_size
        self.eos_ids = source.eos_ids
        self.begin_id = source.model.config.bos_token_id
        self.begin_ids = source.encode("")
        self.end_id = min(source.eos_ids, default=None)
        self.identity = Identity(
            path=str(path),
            kind=type(source.model).__name__,
            parameters=sum(parameter.numel() for parameter in source.model.parameters()),
            dtype=str(source.model.dtype).removeprefix("torch."),
            device=str(self.device),
            fingerprint=fingerprint(source.model),
            step=step,
        )

    def new_reader(self, rows: int) -> Reader:
        return _StreamReader(Stream(self._source.model, rows=rows))

    def joined(self, readers: Sequence[Reader]) -> Reader:
        return _StreamReader(Stream.join([reader.stream for reader in readers if isinstance(reader, _StreamReader)]))

    def tokenize(self, text: str) -> list[int]:
        return self._source.encode(text)[len(self.begin_ids) :]

    def new_text(self) -> TextStream:
        return self._source.new_text()


class _StreamReader(Reader):
    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    @property
    def logits(self) -> Tensor | None:  # type: ignore[override]  # the stream's own
        return self.stream.logits

    def score(self, ids: Tensor, *, progress: Callable[[int], None] | None = None) -> Scores:
        return self.stream.score(ids, progress=_by_piece(progress, rows=len(ids)))

    def read(self, ids: Tensor, *, progress: Callable[[int], None] | None = None) -> Tensor:
        return self.stream.read(ids, progress=_by_piece(progress, rows=len(ids)))

    def step(self, ids: Tensor) -> Tensor:
        return self.stream.step(ids)


def _by_piece(progress: Callable[[int], None] | None, *, rows: int) -> Callable[[int, int], None] | None:
    """Makes what tells the tokens of each piece of what is told the tokens so far."""
    if progress is None:
        return None
    before = 0

    def tell(done: int, _: int) -> None:
        nonlocal before
        progress((done - before) * rows)
        before = done

    return tell
