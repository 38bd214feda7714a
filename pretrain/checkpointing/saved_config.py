"""What a checkpoint says of the run that saved it."""

from sambalm.model.config import ModelConfig
from sambalm.pretrain.checkpointing.format import Checkpoint
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.config_file import parse_config


def saved_run(checkpoint: Checkpoint) -> RunConfig | None:
    """Returns the run's configuration; None for a converted model, which no run has saved.

    Raises:
        ConfigError: this version does not know a key or a value of it.
    """
    saved = checkpoint.state["config"]
    return None if saved.keys() == {"model"} else parse_config(saved, source=str(checkpoint.path))


def saved_model(checkpoint: Checkpoint) -> ModelConfig:
    """Returns what the checkpoint's model is. Raises as `saved_run`."""
    run = saved_run(checkpoint)
    return run.model if run else ModelConfig.model_validate(checkpoint.state["config"]["model"])
