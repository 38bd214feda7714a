"""What a checkpoint says of the run that saved it."""

from collections.abc import Iterable
from pathlib import Path

from sambalm.model.config import ModelConfig
from sambalm.pretrain.checkpointing.format import Checkpoint
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.config_file import parse_config
from sambalm.pretrain.config_paths import folders_of_paths


def saved_run(checkpoint: Checkpoint) -> RunConfig | None:
    """Returns the run's configuration; None for a converted model, which no run has saved.

    Paths that do not exist from here are looked for from the directory that the run was started in.

    Raises:
        ConfigError: this version does not know a key or a value of it.
    """
    run_folder = checkpoint.path.absolute().parent.parent
    return _parsed(checkpoint, folders_of_paths(run_folder, checkpoint.state["config"]))


def saved_model(checkpoint: Checkpoint) -> ModelConfig:
    """Returns what the checkpoint's model is. Raises as `saved_run`."""
    run = _parsed(checkpoint, ())  # without a word on paths, which do not matter here
    return run.model if run else ModelConfig.model_validate(checkpoint.state["config"]["model"])


def _parsed(checkpoint: Checkpoint, folders: Iterable[Path]) -> RunConfig | None:
    saved = checkpoint.state["config"]
    return None if saved.keys() == {"model"} else parse_config(saved, source=str(checkpoint.path), folders=folders)
