"""A text without end: a model that reads and continues, in constant time and memory a token.

The state of a Samba model after any number of tokens is a few tensors of fixed size: of each attention layer the keys
and values of the last window - 1 tokens, of each Mamba layer its convolution's inputs and its scan's state. A Stream
owns these and nothing else, so it can be saved, copied, and go on for as long as it is stepped. Layers of full
attention keep the keys and values of all tokens: their state, and the time of a token, grow with the text. On a GPU a
Stream steps by a `Decoder`, one CUDA graph a token, which holds the state from the first step until something else
needs it. Models with full attention, whose layers have no such step, are stepped layer by layer there.

B: rows, V: vocabulary.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .configuration_samba import FULL_ATTENTION, NO_CACHE, SLIDING_ATTENTION, SambaConfig
from .errors import HFError
from .kernels import has_kernels
from .layers import carried_states
from .modeling_samba import AttentionFreeCache, SambaForCausalLM, new_cache

if TYPE_CHECKING:
    from .decoder import Decoder, Decoders

PIECE_TOKENS = 2048
GPU_PIECE_TOKENS = 65536  # of all rows: enough to fill a GPU, and few enough for the memory of a small one
_LOGIT_BYTES = 1 << 28  # of the logits that are held at once while tokens are scored
FORMAT = "sambalm stream 1"
SAMPLED_VALUES = 1024  # of each weight, in a fingerprint
_WITH_KEYS = (SLIDING_ATTENTION, FULL_ATTENTION)
_EXTRA = "extra."


class Scores(NamedTuple):
    """How likely tokens were, each after those before it.

    Attributes:
        log_likelihoods: natural logarithms of their probabilities, fp32 [B, S]; nan for the first token of all.
        is_likeliest: whether each was the likeliest of the vocabulary, bool [B, S]; False for the first token of all.
    """

    log_likelihoods: Tensor
    is_likeliest: Tensor


class Stream:
    """A model and its state after the tokens that each of its rows has read.

    Rows may have read different numbers of tokens. Nothing that it keeps grows with them but full attention's keys.
    `logits` [B, V] are those after the last token of each row, None before the first; `seen_tokens` counts the tokens
    of each row, and `extras` holds what the file had beside the state that `load` read.
    """

    def __init__(self, model: SambaForCausalLM, *, rows: int = 1) -> None:
        self.model = model
        self.seen_tokens = [0] * rows
        self.logits: Tensor | None = None
        self.extras: dict[str, Tensor] = {}
        self._decoder: Decoder | None = None  # which holds the state in place of the cache
        self._decoders: Decoders | None = None
        self._may_decode = has_kernels(model.device)
        self._start(new_cache(model.config))

    def _start(self, cache: Any) -> None:
        """Takes a cache for the tokens of `seen_tokens`, and makes the buffers of one token."""
        self._cache, self._decoder = cache, None
        device = self.model.device
        self._ids = torch.zeros(self.rows, 1, dtype=torch.int64, device=device)
        self._positions = torch.tensor(self.seen_tokens, dtype=torch.int64, device=device)[:, None]

    @property
    def rows(self) -> int:
        """How many texts it holds."""
        return len(self.seen_tokens)

    @torch.no_grad()
    def read(self, ids: Tensor, *, progress: Callable[[int, int], None] | None = None) -> Tensor:
        """Reads further tokens of every row, in pieces, so that memory does not grow with their number.

        Args:
            ids: int64 [B, S], S at least 1, on any device.
            progress: is told (tokens of a row read, tokens in all) after each piece; an exception of its leaves a state
                that has read so far.

        Returns:
            the logits after the last of them, [B, V] in the model's dtype.
        """
        for start, piece in self._pieces(ids):
            self._forward(piece)
            if progress:
                progress(start + piece.shape[1], ids.shape[1])
        return self._last_logits()

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """Reads one token of every row, int64 [B]; returns the logits after it, [B, V] in the model's dtype.

        On a GPU the weights are taken as they are at the first step.
        """
        if decoder := self._held_decoder():
            self.logits = decoder(ids)
            self.seen_tokens = list(decoder.seen_tokens)
            return self.logits
        self._ids.copy_(ids[:, None])
        self._forward(self._ids)
        return self._last_logits()

    def _held_decoder(self) -> "Decoder | None":
        """Returns the decoder that has the state from now on; None where the layers go on with it."""
        if self._may_decode and self._decoder is None:
            decoder = self._shared_decoders().lend(self)
            if decoder is None:
                self._may_decode = False
                return None
            decoder.load(self._tensors(), seen_tokens=self.seen_tokens)
            self._decoder, self._cache = decoder, None
        return self._decoder

    def _shared_decoders(self) -> "Decoders":
        """Returns the decoders of this stream and of those that are made of it."""
        if self._decoders is None:
            from .decoder import Decoders

            self._decoders = Decoders(self.model)
        return self._decoders

    def leave(self, decoder: "Decoder") -> None:
        """Takes the state back from a decoder, if that has it."""
        if self._decoder is decoder:
            self._start(_filled_cache(self.model.config, self._tensors(), seen_tokens=max(self.seen_tokens)))

    @torch.no_grad()
    def score(self, ids: Tensor, *, progress: Callable[[int, int], None] | None = None) -> Scores:
        """Reads further tokens as `read` does, and tells how likely each was after those before it."""
        device = self.model.device
        likelihoods = torch.full(ids.shape, float("nan"), dtype=torch.float32, device=device)
        is_likeliest = torch.zeros(ids.shape, dtype=torch.bool, device=device)
        for start, piece in self._pieces(ids):
            before = self.logits
            hidden = self._advance(piece)
            if before is not None:
                likelihoods[:, start], is_likeliest[:, start] = scores_of(before, piece[:, 0])
            at_once = max(1, _LOGIT_BYTES // (4 * self.rows * self.model.config.vocab_size))
            for begin in range(0, piece.shape[1], at_once):
                logits = self.model.lm_head(hidden[:, begin : begin + at_once])
                next_ids = piece[:, begin + 1 : begin + 1 + logits.shape[1]]
                places = slice(start + begin + 1, start + begin + 1 + next_ids.shape[1])
                scored = scores_of(logits[:, : next_ids.shape[1]], next_ids)
                likelihoods[:, places], is_likeliest[:, places] = scored
            self.logits = logits[:, -1].clone()  # not a view, which would keep the others
            if progress:
                progress(start + piece.shape[1], ids.shape[1])
        return Scores(likelihoods, is_likeliest)

    def _pieces(self, ids: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yields the pieces in which ids are read, each with the place of its first token, on the model's device."""
        if ids.ndim != 2 or ids.shape[0] != self.rows or not ids.shape[1]:
            raise ValueError(f"ids have shape {list(ids.shape)}: give [{self.rows}, at least 1]")
        if self._decoder:
            self.leave(self._decoder)
        is_short = self.model.device.type == "cpu" or self._mask(1) is not None  # a mask is of pairs of tokens
        length = PIECE_TOKENS if is_short else max(PIECE_TOKENS, GPU_PIECE_TOKENS // self.rows)
        for start in range(0, ids.shape[1], length):
            yield start, ids[:, start : start + length].to(self.model.device)

    def _forward(self, ids: Tensor) -> None:
        self.logits = self.model.lm_head(self._advance(ids)[:, -1])

    def _advance(self, ids: Tensor) -> Tensor:
        """Reads tokens; returns what the head makes logits of, [B, S, width]."""
        uneven = min(self.seen_tokens) != max(self.seen_tokens)
        positions = self._positions + torch.arange(ids.shape[1], device=ids.device)
        outputs = self.model.backbone(
            input_ids=ids,
            attention_mask=self._mask(ids.shape[1]),
            position_ids=positions if uneven else None,  # which the cache counts
            cache=self._cache,
            use_cache=True,
        )
        self.seen_tokens = [seen + ids.shape[1] for seen in self.seen_tokens]
        self._positions += ids.shape[1]
        if self.model.config.sliding_window == 1:
            _forget_keys(self._cache, self.model.config)
        return outputs.last_hidden_state

    def _last_logits(self) -> Tensor:
        assert self.logits is not None
        return self.logits

    def _mask(self, new_tokens: int) -> Tensor | None:
        """Makes the mask that keeps rows from what stands in the place of keys that they do not have yet.

        Returns None where all rows have as many keys, else [B, 1, new, kept + new], to be added to the scores; in a
        model that has full attention [B, seen + new], False for such keys.
        """
        window, device = self.model.config.sliding_window, self.model.device
        if FULL_ATTENTION in self.model.config.layer_types:
            most = max(self.seen_tokens)
            if min(self.seen_tokens) == most:
                return None
            first = torch.tensor([most - seen for seen in self.seen_tokens], device=device)[:, None]
            return torch.arange(most + new_tokens, device=device) >= first
        kept = [min(seen, window - 1) for seen in self.seen_tokens]
        if min(kept) == max(kept) or SLIDING_ATTENTION not in self.model.config.layer_types:
            return None
        first = torch.tensor([max(kept) - own for own in kept], device=device)[:, None, None]
        queries = torch.arange(max(kept), max(kept) + new_tokens, device=device)[:, None]
        keys = torch.arange(max(kept) + new_tokens, device=device)
        seen = (keys <= queries) & (keys > queries - window) & (keys >= first)
        dtype = self.model.dtype
        return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]

    def fork(self, rows: Sequence[int] | None = None) -> "Stream":
        """Returns a stream with copies of some rows, each as often as it is named; None: of all rows, once."""
        numbers = list(range(self.rows)) if rows is None else list(rows)
        index = torch.tensor(numbers, device=self.model.device)
        seen_tokens = [self.seen_tokens[number] for number in numbers]
        tensors = {name: tensor.index_select(0, index) for name, tensor in self._tensors().items()}
        for name in (name for name in tensors if name.endswith((".keys", ".values"))):
            # Without the zeros that stood in the place of other rows' keys.
            kept = min(tensors[name].shape[2], max(seen_tokens))
            tensors[name] = tensors[name][:, :, tensors[name].shape[2] - kept :]
        return self._of(self.model, tensors, seen_tokens=seen_tokens, like=self)

    @staticmethod
    def join(streams: Sequence["Stream"]) -> "Stream":
        """Returns one stream with copies of all rows of several streams of one model, each of which has read a token.

        Rows with fewer keys than others get zeros in the place of those, which a mask hides while they are there.
        """
        if any(stream.logits is None or stream.model is not streams[0].model for stream in streams):
            raise ValueError("only streams of one model that have read a token can be joined")
        states = [stream._tensors() for stream in streams]
        tensors = {}
        for name in states[0]:
            parts = [state[name] for state in states]
            if name.endswith((".keys", ".values")):
                longest = max(part.shape[2] for part in parts)
                parts = [torch.nn.functional.pad(part, (0, 0, longest - part.shape[2], 0)) for part in parts]
            tensors[name] = torch.cat(parts)
        seen_tokens = [seen for stream in streams for seen in stream.seen_tokens]
        return Stream._of(streams[0].model, tensors, seen_tokens=seen_tokens, like=streams[0])

    def save(self, path: str | Path, extras: Mapping[str, Tensor] | None = None) -> None:
        """Writes the state as a safetensors file, which replaces an older one once it is complete.

        Args:
            extras: further tensors, which `load` gives back.

        Raises:
            HFError: the file cannot be written, or no token has been read.
        """
        path = Path(path)
        if self.logits is None:
            raise HFError(f"there is nothing to save in {path}: no token has been read")
        tensors = self._tensors() | {f"{_EXTRA}{name}": tensor for name, tensor in (extras or {}).items()}
        metadata = {
            "format": FORMAT,
            "model": fingerprint(self.model),
            "seen_tokens": json.dumps(self.seen_tokens),
        }
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(content, unfinished, metadata=metadata)
            os.replace(unfinished, path)
        except (OSError, SafetensorError) as error:
            raise HFError(f"the state cannot be written to {path} ({error}); choose another file") from error
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def load(cls, model: SambaForCausalLM, path: str | Path) -> "Stream":
        """Returns the stream that was saved, on the model's device; it goes on with the same bits.

        Raises:
            HFError: the file is no such state, or that of a model with other weights or of another dtype.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        except (OSError, SafetensorError) as error:
            raise HFError(f"the state {path} cannot be read ({error}); give a file that was saved as one") from error
        if metadata.get("format") != FORMAT:
            raise HFError(f"{path} is not the saved state of a stream; give a file that was saved as one")
        if metadata["model"] != fingerprint(model):
            raise HFError(f"the state {path} is of a model with other weights or another dtype; load it into its own")
        state = {n: tensor.to(model.device) for n, tensor in tensors.items() if not n.startswith(_EXTRA)}
        stream = cls._of(model, state, seen_tokens=json.loads(metadata["seen_tokens"]))
        stream.extras = {n.removeprefix(_EXTRA): tensor for n, tensor in tensors.items() if n.startswith(_EXTRA)}
        return stream

    def _tensors(self) -> dict[str, Tensor]:
        """Returns the state by names, the stream's own tensors, each with the rows as its first dimension."""
        if self.logits is None:
            return {}
        tensors = {"logits": self.logits}
        if self._decoder:
            return tensors | self._decoder.state()
        for number, kind in enumerate(self.model.config.layer_types):
            if kind in _WITH_KEYS:
                layer = self._cache.layers[number]
                tensors |= {f"layers.{number}.keys": layer.keys, f"layers.{number}.values": layer.values}
            elif kind != NO_CACHE:
                states = zip(("conv", "scan"), carried_states(self._cache, number), strict=True)
                tensors |= {f"layers.{number}.{name}": state for name, state in states if state is not None}
        return tensors

    @classmethod
    def _of(
        cls,
        model: SambaForCausalLM,
        tensors: Mapping[str, Tensor],
        *,
        seen_tokens: list[int],
        like: "Stream | None" = None,
    ) -> "Stream":
        """Makes a stream of copies of a state, which shares the decoders of another one."""
        stream = cls(model, rows=len(seen_tokens))
        if like is not None and like._may_decode:
            stream._decoders, stream._may_decode = like._shared_decoders(), True
        if tensors:
            stream.seen_tokens = list(seen_tokens)
            stream.logits = tensors["logits"].clone()
            stream._start(_filled_cache(model.config, tensors, seen_tokens=max(seen_tokens)))
        return stream


def _filled_cache(config: SambaConfig, tensors: Mapping[str, Tensor], *, seen_tokens: int) -> Any:
    cache = new_cache(config)
    for number, kind in enumerate(config.layer_types):
        if kind in _WITH_KEYS:
            cache.update(tensors[f"layers.{number}.keys"], tensors[f"layers.{number}.values"], number)
            if kind == SLIDING_ATTENTION:
                cache.layers[number].cumulative_length = seen_tokens
        elif kind != NO_CACHE:
            conv, scan = (tensors.get(f"layers.{number}.{name}") for name in ("conv", "scan"))
            if conv is not None:
                cache.update_conv_state(conv, number)
            if scan is not None:
                cache.update_recurrent_state(scan, number)
    if isinstance(cache, AttentionFreeCache):
        cache.seen_tokens = seen_tokens
    return cache


def scores_of(logits: Tensor, ids: Tensor) -> Scores:
    """Returns the scores of ids [...] by logits [..., V]."""
    flat = torch.nn.functional.cross_entropy(logits.float().flatten(0, -2), ids.flatten(), reduction="none")
    return Scores(-flat.view(ids.shape), logits.argmax(dim=-1) == ids)


def _forget_keys(cache: Any, config: SambaConfig) -> None:
    """Empties the keys of a window of one token, which transformers' cache would keep for ever."""
    for layer in (cache.layers[number] for number, kind in enumerate(config.layer_types) if kind == SLIDING_ATTENTION):
        layer.keys, layer.values = layer.keys[:, :, :0], layer.values[:, :, :0]


def fingerprint(model: SambaForCausalLM) -> str:
    """Returns a SHA-256 of the model's tensors: of names, dtypes, shapes and evenly spaced values of each.

    Two checkpoints of one training differ in it, though it reads a small part of the weights. The device has no part.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        sampled = flat[:: max(1, flat.numel() // SAMPLED_VALUES)].contiguous().view(torch.uint8)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(sampled.cpu().numpy().tobytes())
    return digest.hexdigest()
