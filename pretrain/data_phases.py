"""The keys of `data.phases`: a run whose mix, sequence length, batch and learning rate change on the way."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sambalm.data_pipeline.config import DataConfig, WeightedSource, check_list
from sambalm.pretrain.optimizer import OptimizerConfig

Share = Annotated[float, Field(ge=0, le=1)]


class PhaseLearningRate(BaseModel):
    """A learning-rate curve over one phase alone; what it leaves out is that of `optimizer`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    peak_lr: float | None = Field(None, gt=0, description="As optimizer.peak_lr")
    final_lr_ratio: Share | None = Field(None, description="As optimizer.final_lr_ratio, at the phase's end")
    schedule: Literal["cosine", "wsd"] | None = Field(None, description="As optimizer.schedule")
    warmup_fraction: Share | None = Field(None, description="As optimizer.warmup_fraction, of the phase's tokens")
    decay_fraction: float | None = Field(
        None, gt=0, le=1, description="As optimizer.decay_fraction, of the phase's tokens"
    )

    def over(self, optimizer: OptimizerConfig) -> OptimizerConfig:
        """Returns the optimizer's section with the curve's keys replaced."""
        return optimizer.model_copy(update=self.model_dump(exclude_none=True))


class DataPhase(BaseModel):
    """A stretch of a run. What a phase leaves out is that of `data`, `train` and `optimizer`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int = Field(gt=0, description="Training tokens of the phase, a multiple of its global batch")
    train: str | list[str | WeightedSource] | None = Field(None, description="Its sources, as data.train")
    sequence_length: int | None = Field(None, gt=0, description="Tokens of its samples")
    global_batch_tokens: int | None = Field(None, gt=0, description="Tokens of one of its optimizer steps")
    micro_batch_size: int | None = Field(None, gt=0, description="Sequences of one of its forward and backward passes")
    learning_rate: PhaseLearningRate | None = Field(
        None,
        description="A curve over this phase alone; null: the curve of `optimizer`, over the tokens of all phases that "
        "have none of their own",
    )
    stop_at_end: bool = Field(
        False,
        description="Whether the run saves and leaves where the phase ends, with exit code 78, so that the next start "
        "goes on on another layout",
    )


class DataSection(DataConfig):
    """Which tokens a run trains on, in samples of which length, and which part is held out."""

    phases: list[DataPhase] | None = Field(
        default=None,
        min_length=1,
        description="The run as phases, one after the other, in place of train.steps; null: one phase of train.steps "
        "steps. Validation stays on the held-out parts of data.train, at data.sequence_length",
    )

    def of_phase(self, phase: DataPhase) -> "DataSection":
        """Returns the section of a run that is this phase alone, with the index where the whole run has it."""
        update = {"phases": None, "cache_dir": str(self.cache_path)}
        update |= {key: value for key in ("train", "sequence_length") if (value := getattr(phase, key)) is not None}
        return self.model_copy(update=update)

    @model_validator(mode="after")
    def _check_phases(self) -> "DataSection":
        fractions = dict(zip(self.prefixes, self.validation_fractions, strict=True))
        separate = set(self.separate_validation.prefixes) if self.separate_validation else set()
        for number, phase in enumerate(self.phases or ()):
            if phase.train is None:
                continue
            key = f"data.phases.{number}.train"
            check_list(phase.train, key)
            data = self.of_phase(phase)
            for prefix, fraction in zip(data.prefixes, data.validation_fractions, strict=True):
                if prefix in separate:
                    raise ValueError(f"data.validation names {prefix}, which {key} trains on: give other data")
                if fractions.setdefault(prefix, fraction) != fraction:
                    raise ValueError(
                        f"{key} holds out {fraction:g} of {prefix}, and the run elsewhere {fractions[prefix]:g}, so "
                        "that it would train on what it holds out: give both the same validation_fraction"
                    )
        return self
