"""From a model of others, or from a Hugging Face folder of ours, to a run folder that training goes on from.

The run folder holds one checkpoint, of step 0: the source's weights in fp32, moments of zero, and no data, since none
has been read. `model.yaml` beside it is the section `model` for the config of the run.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from sambalm.data_pipeline.files import sync
from sambalm.model.config import ModelConfig
from sambalm.model.hf.errors import HFError
from sambalm.model.hf.names import CanonicalState
from sambalm.model.hf.verify import MAX_LOGIT_DIFFERENCE, ROWS, largest_difference
from sambalm.parallel.zero.engine import MOMENTS, WEIGHT
from sambalm.pretrain.checkpointing import format as files
from sambalm.pretrain.checkpointing.data_record import NO_DATA_YET
from sambalm.pretrain.checkpointing.other_models import OtherModel, open_other_model
from sambalm.pretrain.checkpointing.shard_file import UnreadTensor, write_shard
from sambalm.pretrain.checkpointing.snapshot import FP32_BYTES
from sambalm.pretrain.checkpointing.to_hf import appearing_folder
from sambalm.pretrain.checkpointing.write import PACKAGES
from sambalm.pretrain.packages import installed_versions

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
    opened = open_other_model(source, query_heads=query_heads, window=window)
    with _new_folder(output) as folder:
        checkpoint = write_checkpoint(folder, opened.state, opened.config, progress=progress)
        _verify(checkpoint, opened, source=source)
        (folder / MODEL_FILE).write_text(_model_yaml(opened.config, source=source), "utf-8")
        sync(folder / MODEL_FILE)
    return opened.config


def write_checkpoint(
    folder: Path, state: CanonicalState, config: ModelConfig, *, progress: Progress
) -> files.Checkpoint:
    """Commits the weights as the checkpoint of step 0 in a run folder and opens it, which reads its checksums.

    Args:
        progress: receives (bytes written, bytes in all).
    """
    final = files.checkpoint_folder(folder, 0)
    draft = final.with_name(f".{final.name}.partial")
    draft.mkdir(parents=True)
    shapes = state.shapes()
    done, total = 0, sum(FP32_BYTES * math.prod(shape) for shape in shapes.values())

    def read(name: str) -> Tensor:
        nonlocal done
        tensor = state.read(name)
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
    files.write_json(draft / files.STATE, _state(config))
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
        "versions": installed_versions(PACKAGES),
        "hooks": {},
    }


def _verify(checkpoint: files.Checkpoint, opened: OtherModel, *, source: Path) -> None:
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
