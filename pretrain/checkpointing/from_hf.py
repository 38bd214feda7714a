"""From a model of others, or from a Hugging Face folder of ours, to a run folder that training goes on from.

The run folder holds one checkpoint, of step 0: the source's weights in fp32, moments of zero, and no data, since none
has been read. `model.yaml` beside it is the section `model` for the config of the run.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from sambalm.data_pipeline.files import sync
from sambalm.model.config import ModelConfig
from sambalm.model.hf.configuration_samba import SambaConfig
from sambalm.model.hf.errors import HFError
from sambalm.model.hf.folder import FolderState
from sambalm.model.hf.generate import load_config
from sambalm.model.hf.lit_gpt import LitGPTState
from sambalm.model.hf.names import CanonicalState, hf_config, hf_shape, hf_tensors, model_config
from sambalm.model.hf.verify import MAX_LOGIT_DIFFERENCE, ROWS, HFWeights, largest_difference
from sambalm.model.samba import Samba
from sambalm.parallel.sharding import canonical_slices
from sambalm.parallel.zero.engine import MOMENTS, WEIGHT
from sambalm.pretrain.checkpointing import format as files
from sambalm.pretrain.checkpointing.data_record import NO_DATA_YET
from sambalm.pretrain.checkpointing.shard_file import UnreadTensor, write_shard
from sambalm.pretrain.checkpointing.snapshot import FP32_BYTES
from sambalm.pretrain.checkpointing.to_hf import appearing_folder
from sambalm.pretrain.checkpointing.write import PACKAGES

MODEL_FILE, SHARD = "model.yaml", "shard-00001-0.safetensors"
VERIFIED_TOKENS = 64  # of each row, drawn at random
_TOKENS_SEED = 0

Progress = Callable[[int, int | None], None]


def checkpoint_from_hf(
    source: Path, output: Path, *, query_heads: int | None, window: int | None, progress: Progress
) -> ModelConfig:
    """Makes a run folder of a model, one tensor in memory at a time; returns what the model is.

    The folder appears once the stored weights equal the source's, bit by bit, and the training model of them gives the
    logits that the source's weights give in transformers.

    Args:
        source: a folder in the Hugging Face format, ours or flash-linear-attention's, or a `.pth` file of
            microsoft/Samba, which is read without executing any code of it.
        output: the run folder, which must not exist.
        query_heads, window: of a `.pth` file that names none of the reference's models.
        progress: receives (bytes written, bytes in all).

    Raises:
        HFError: one sentence, for the user; nothing is left at `output`.
    """
    opened = _open_source(source, query_heads=query_heads, window=window)
    with _new_folder(output) as folder:
        checkpoint = _write_checkpoint(folder, opened, progress=progress)
        _verify(checkpoint, opened, source=source)
        (folder / MODEL_FILE).write_text(_model_yaml(opened.config, source=source), "utf-8")
        sync(folder / MODEL_FILE)
    return opened.config


@dataclass(frozen=True)
class _Source:
    """What is converted.

    Attributes:
        state: the weights as canonical tensors, whose shapes have been held against the configuration.
        config: the model in training.
        hf: the model in transformers, in fp32.
        hf_weights: the weights as that model has them.
    """

    state: CanonicalState
    config: ModelConfig
    hf: SambaConfig
    hf_weights: HFWeights


def _open_source(source: Path, *, query_heads: int | None, window: int | None) -> _Source:
    if source.is_file():
        state = LitGPTState(source, query_heads=query_heads, window=window)
        config = _with_default_rank(state.config)
        return _Source(state, config, hf_config(config, dtype="float32"), _AsInTransformers(state, config))
    if not source.is_dir():
        raise HFError(f"{source} does not exist: give a Hugging Face folder or a .pth file of microsoft/Samba")
    if query_heads is not None or window is not None:
        raise HFError(f"--query-heads and --window are for .pth files, and {source} has a config.json: leave them out")
    hf = load_config(source)
    hf.dtype = torch.float32
    config, folder = _with_default_rank(model_config(hf)), FolderState(source, hf)
    folder.check_shapes(_canonical_shapes(config))
    return _Source(folder, config, hf, folder)


def _with_default_rank(config: ModelConfig) -> ModelConfig:
    """The model without the key dt_rank where it says what it is without it, as a run's config is most likely to be."""
    plain = ModelConfig.model_validate(config.model_dump() | {"dt_rank": None})
    return plain if plain.dt_rank_size == config.dt_rank_size else config


def _canonical_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = Samba(config)
    return {name: tuple(piece.shape) for name, _, piece in canonical_slices(model)}


def _write_checkpoint(folder: Path, source: _Source, *, progress: Progress) -> files.Checkpoint:
    """Commits the checkpoint of step 0 in a run folder and opens it, which reads its checksums."""
    final = files.checkpoint_folder(folder, 0)
    draft = final.with_name(f".{final.name}.partial")
    draft.mkdir(parents=True)
    shapes = source.state.shapes()
    done, total = 0, sum(FP32_BYTES * math.prod(shape) for shape in shapes.values())

    def read(name: str) -> Tensor:
        nonlocal done
        tensor = source.state.read(name)
        done += FP32_BYTES * tensor.numel()
        progress(done, total)
        return tensor

    slices = [UnreadTensor(f"{WEIGHT}.{name}", shape, partial(read, name)) for name, shape in shapes.items()]
    for kind in MOMENTS:
        zeros = torch.zeros(())
        slices += [
            UnreadTensor(f"{kind}.{name}", shape, partial(zeros.expand, shape)) for name, shape in shapes.items()
        ]
    checksums = {SHARD: write_shard(draft / SHARD, slices)}
    files.write_json(draft / files.STATE, _state(source.config))
    files.write_manifest(draft, checksums | files.checksums(draft, [files.STATE]))
    sync(draft)
    files.commit(draft, final)
    return files.open_checkpoint(final)


def _state(config: ModelConfig) -> dict[str, Any]:
    """What the checkpoint says besides its tensors; of a configuration it knows the model alone."""
    return {
        "step": 0,
        "samples": 0,
        "tokens": 0,
        "data": NO_DATA_YET,
        "config": {"model": config.model_dump()},
        "versions": {package: version(package) for package in PACKAGES},
        "hooks": {},
    }


def _verify(checkpoint: files.Checkpoint, opened: _Source, *, source: Path) -> None:
    """
    Raises:
        HFError: the checkpoint's weights are not the source's, or the two models' logits differ.
    """
    for name in opened.state.shapes():
        stored, given = (state.read(name).view(torch.int32) for state in (checkpoint, opened.state))
        if not torch.equal(stored, given):
            raise HFError(f"tensor {name} was not stored as it is in {source}: try again, on another disk")
    generator = torch.Generator().manual_seed(_TOKENS_SEED)
    tokens = torch.randint(opened.config.vocab_size, (ROWS, VERIFIED_TOKENS), generator=generator)
    difference = largest_difference(opened.hf_weights, opened.hf, checkpoint, opened.config, tokens=tokens)
    if not difference <= MAX_LOGIT_DIFFERENCE:  # NaN counts as different
        raise HFError(
            f"the training model's logits differ by {difference:.3g} from those that {source} gives in transformers, "
            f"more than {MAX_LOGIT_DIFFERENCE:g}: its weights make no usable model"
        )


class _AsInTransformers:
    """A state's weights by their names in the Hugging Face model."""

    def __init__(self, state: CanonicalState, config: ModelConfig) -> None:
        self._state, self._shapes = state, state.shapes()
        self._tensors = hf_tensors(config.pattern, tie_embeddings=config.tie_embeddings)

    def read_hf(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        return torch.cat([self._state.read(part) for part in tensor.parts]).view(hf_shape(tensor, self._shapes))


def _model_yaml(config: ModelConfig, *, source: Path) -> str:
    section = yaml.safe_dump({"model": config.model_dump(exclude_defaults=True)}, sort_keys=False)
    return (
        f"# The section `model` of a config that goes on from this folder, whose weights are those of {source.name}:\n"
        f"# sambalm train CONFIG run.dir=THIS_FOLDER\n{section}"
    )


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes `output` when the block ends, and vanishes when it raises.

    Raises:
        HFError: `output` exists or cannot be written.
    """
    output = output.absolute()
    if output.exists() or output.is_symlink():
        raise HFError(f"the output {output} exists: choose another run folder")
    with appearing_folder(output) as folder:
        yield folder
