"""The configuration of a run, typed; `config_file.py` reads it."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from sambalm.model.config import ModelConfig
from sambalm.model.mixers.base import Ability
from sambalm.model.ops.config import KernelConfig
from sambalm.parallel.config import ParallelConfig, check_world_size
from sambalm.parallel.shard import Position, equal_shard
from sambalm.pretrain.batch_schedule import BatchRamp, BatchSchedule
from sambalm.pretrain.data_phases import DataPhase, DataSection
from sambalm.pretrain.errors import ConfigError
from sambalm.pretrain.optimizer import OptimizerConfig
from sambalm.pretrain.pipeline_parts import check_parts
from sambalm.pretrain.run_phases import RunSchedule, steps_of_phases

FORMAT_VERSION = 1
PRECISION_BYTES = {"bf16": 2, "fp32": 4}  # of train.precision


class RunSection(BaseModel):
    """Where the run lives and what its randomness starts from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dir: str = Field(description="The run's folder: checkpoints, metrics.jsonl, TensorBoard logs, the loss plot")
    seed: int = Field(1234, ge=0, description="Seed of the initial weights and of the data order")
    max_attempts_without_progress: int = Field(
        3, gt=0, description="Attempts in a row that may begin at the same step; the next one refuses to start"
    )
    start_over: bool = Field(
        False,
        description="Whether a run that had saved, and whose checkpoints are gone, begins at step 0; false: it refuses",
    )


class TrainSection(BaseModel):
    """How long and in what portions to train."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(
        0,  # not given: RunConfig has those of data.phases, or refuses
        gt=0,
        description="Optimizer steps of the whole run; with data.phases left out, since their tokens say how many",
        json_schema_extra={"shown_default": "required without data.phases"},
    )
    global_batch_tokens: int = Field(gt=0, description="Tokens of one optimizer step over all ranks")
    batch_ramp: BatchRamp | None = Field(
        None, description="Smaller global batches at first; null: train.global_batch_tokens from the first step on"
    )
    micro_batch_size: int = Field(gt=0, description="Sequences of one forward and backward pass on one rank")
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="Of activations and matrix products; weights, gradients, optimizer and losses are fp32"
    )
    matmul_precision: Literal["fp8"] | None = Field(
        None,
        description="Of the large products of mixers and MLPs, forward and backward; fp8 takes a GPU of compute "
        "capability 8.9 or later; null: train.precision",
    )
    init_from: str | None = Field(
        None,
        description="What a new run takes its weights from, with a fresh optimizer, schedule and data order: a run "
        "folder (its newest good checkpoint), a checkpoint, a Hugging Face folder, or a .pth file of microsoft/Samba; "
        "null: it draws them. Read once: a run that has saved goes on from its own checkpoints",
    )
    grow_vocabulary: bool = Field(
        False,
        description="Whether model.vocab_size may be more than the weights of train.init_from have, for a tokenizer "
        "that adds tokens to theirs; the new rows are drawn as a new model's",
    )
    max_skipped_steps: int = Field(
        10,
        ge=0,
        description="Steps in a row that the optimizer may skip; one more rolls the run back",
    )
    max_skipped_in_window: int = Field(
        16,
        ge=0,
        description="Steps that the optimizer may skip among the last checks.window_steps; one more rolls the run back",
    )
    max_rollbacks: int = Field(
        2,
        ge=0,
        description="How often a run may go back to its last good checkpoint and leave out the samples of what was "
        "skipped; then it ends",
    )
    cuda_graphs: bool = Field(
        True,
        description="Whether a GPU launches each micro-batch as a CUDA graph; pipelines in FP8 never do, "
        "nor packed documents whose attention is a flash kernel",
    )

    profile_steps: list[Annotated[int, Field(gt=0)]] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="First and last step to record with torch's profiler, as [20, 22]: a trace in the run folder's "
        "`profile`; null: none",
    )

    @field_validator("profile_steps")
    @classmethod
    def _check_profile(cls, steps: list[int] | None) -> list[int] | None:
        if steps and steps[0] > steps[1]:
            raise ValueError("give the first step before the last")
        return steps

    @model_validator(mode="after")
    def _check_profile_is_reached(self) -> "TrainSection":
        if self.profile_steps and self.steps and self.profile_steps[0] > self.steps:
            raise ValueError(
                f"train.profile_steps begins at step {self.profile_steps[0]}, after the last one, train.steps "
                f"{self.steps}: give earlier steps"
            )
        return self

    @model_validator(mode="after")
    def _check_growth(self) -> "TrainSection":
        if self.grow_vocabulary and self.init_from is None:
            raise ValueError(
                "train.grow_vocabulary is true without train.init_from, whose vocabulary it is about: give that, or "
                "leave it out"
            )
        return self


class ValidationSection(BaseModel):
    """When and on how much to validate."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    every_steps: int = Field(1000, gt=0, description="Steps between validations; one more follows the last step")
    tokens: int = Field(1_048_576, gt=0, description="Held-out tokens of one validation at each length, at most")
    length_multiples: list[Annotated[int, Field(gt=0)]] = Field(
        [1, 2, 4], min_length=1, description="Sequence lengths to validate at, in units of data.sequence_length"
    )


class EvaluationSection(BaseModel):
    """Tasks of `sambalm evaluate`, which also lists them (`--list-tasks`), that measure the model while it trains."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tasks: dict[str, dict[str, Any]] = Field(
        {},
        description="By name, each with its keys, as in `{passkey: {lengths: [1K, 4K]}, sliding: {}}`",
    )
    every_steps: int | None = Field(
        None,
        gt=0,
        description="Steps between evaluations; one more follows the last step; null: evaluation.every_tokens",
    )
    every_tokens: int | None = Field(
        None, gt=0, description="Training tokens between evaluations, in place of evaluation.every_steps"
    )
    batch_tokens: int = Field(16384, gt=0, description="Tokens that a rank reads together, at most")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="Of the whole model that every rank holds beside what it trains while it measures: --dtype of "
        "`sambalm evaluate`",
    )

    @model_validator(mode="after")
    def _check_turns(self) -> "EvaluationSection":
        turns = [value for value in (self.every_steps, self.every_tokens) if value is not None]
        if self.tasks and len(turns) != 1:
            raise ValueError(
                f"evaluation.tasks is set with {'both' if turns else 'none'} of evaluation.every_steps and "
                "evaluation.every_tokens: give one of them"
            )
        return self


class CheckpointSection(BaseModel):
    """When to save and what to keep."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    every_steps: int = Field(1000, gt=0, description="Steps between checkpoints; one more follows the last step")
    keep: int = Field(
        2,
        gt=0,
        description="Newest checkpoints to keep, damaged ones not counted; older ones are removed after a save",
    )
    keep_every_steps: int | None = Field(
        None, gt=0, description="Checkpoints of multiples of this step stay for ever; null: of none"
    )
    when_busy: Literal["wait", "skip"] = Field(
        "wait",
        description="What a save does that is due while the one before is still being written: wait for it, or leave "
        "its turn out; a save that is asked for waits",
    )
    max_failed_saves: int = Field(
        3, gt=0, description="Saves in a row that fail, as on a full disk, before the run ends; it goes on after fewer"
    )


class ChecksSection(BaseModel):
    """What a run watches for while it trains."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    window_steps: int = Field(
        128, gt=1, description="Last steps that were taken, whose medians say what is usual; no limits before so many"
    )
    norm_spike_factor: float | None = Field(
        10.0,
        gt=1,
        description="A step whose gradient norm is more than so many medians, and more than optimizer.clip_norm, is "
        "skipped; null: whatever is finite is taken",
    )
    loss_spike_nats: float | None = Field(
        1.0,
        gt=0,
        description="A step whose loss is more than so many nats per token, and 10 robust standard deviations, above "
        "the median is skipped; null: whatever is finite is taken",
    )
    replicas_every_steps: int | None = Field(
        100,
        gt=0,
        description="Steps between comparisons of weights that several ranks hold, also before saves; null: none",
    )
    on_difference: Literal["stop", "restore"] = Field(
        "stop",
        description="When they differ: stop, or go back to the last checkpoint before it (train.max_rollbacks)",
    )


class ReportingSection(BaseModel):
    """Where the metrics go besides metrics.jsonl."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    writers: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(
        ["tensorboard"],
        description="Each takes every step's metrics, in a thread of its own; wandb and mlflow are optional packages, "
        "which read their own environment variables",
    )


Limit = Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["auto"] | None


class WatchdogSection(BaseModel):
    """How long each phase of a run may last on a rank, in seconds; past that, the run ends with exit code 81.

    `auto` is a share of parallel.timeout_s: a half of it for a fetch, a step and leaving, nine tenths for the others.
    0 and null are no limit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    start_up_s: Limit = Field(
        "auto", description="Longest time from the start of a rank to its first step, loading included"
    )
    fetch_s: Limit = Field("auto", description="Longest wait for a micro-batch")
    first_step_s: Limit = Field(
        "auto",
        description="Longest step that may compile or capture: the first three, and the first after a validation",
    )
    step_s: Limit = Field("auto", description="Longest of all other steps")
    validation_s: Limit = Field("auto", description="Longest validation, and longest evaluation")
    save_s: Limit = Field(
        "auto", description="Longest save, and the longest time that it is written while training goes on"
    )
    leave_s: Limit = Field("auto", description="Longest time from the last step to the end of the rank")

    def limits(self, *, timeout_s: float) -> dict[str, float]:
        """Seconds by name of a phase; a phase without a limit is missing.

        Args:
            timeout_s: how long messages wait for other ranks, which a limit should come before.
        """
        found = {}
        for key in type(self).model_fields:
            phase, value = key.removesuffix("_s"), getattr(self, key)
            if value == "auto":
                value = timeout_s * (0.5 if phase in ("fetch", "step", "leave") else 0.9)
            if value:
                found[phase] = value
        return found


class StragglerSection(BaseModel):
    """How ranks that slow the others down are found."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    every_steps: int = Field(100, ge=0, description="Steps between comparisons of the ranks' own times; 0: none")
    factor: float = Field(
        1.5, gt=1, description="A rank that takes so many times the median of its pipeline stage is named as slow"
    )


def _check_version(version: int) -> int:
    if version != FORMAT_VERSION:
        raise ValueError(
            f"this program reads format {FORMAT_VERSION}: use the release that wrote it, or update the file"
        )
    return version


class RunConfig(BaseModel):
    """Everything that a run is made of; each section builds what it configures."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Annotated[int, AfterValidator(_check_version)] = Field(description="Format of this file; 1")
    run: RunSection
    model: ModelConfig
    data: DataSection
    train: TrainSection
    optimizer: OptimizerConfig
    validation: ValidationSection = ValidationSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    checks: ChecksSection = ChecksSection()
    reporting: ReportingSection = ReportingSection()
    watchdog: WatchdogSection = WatchdogSection()
    stragglers: StragglerSection = StragglerSection()
    parallel: ParallelConfig = ParallelConfig()
    kernels: KernelConfig = KernelConfig()

    @property
    def global_batch_samples(self) -> int:
        return self.train.global_batch_tokens // self.data.sequence_length

    @property
    def batch_schedule(self) -> BatchSchedule:
        final, length, ramp = self.global_batch_samples, self.data.sequence_length, self.train.batch_ramp
        if ramp is None:
            return BatchSchedule(final=final, start=final, increment=final, ramp_samples=0)
        return BatchSchedule(
            final=final,
            start=ramp.start_tokens // length,
            increment=ramp.increment_tokens // length,
            ramp_samples=-(-ramp.ramp_tokens // length),
        )

    @property
    def schedule(self) -> RunSchedule:
        """The run's phases; one where data.phases is null."""
        return RunSchedule(self)

    @property
    def run_tokens(self) -> int:
        """Training tokens of the whole run."""
        return self.schedule.tokens(self.schedule.consumed_samples(self.train.steps))

    def of_phase(self, phase: DataPhase) -> "RunConfig":
        """Returns the configuration of a run that is this phase alone."""
        optimizer = phase.learning_rate.over(self.optimizer) if phase.learning_rate else self.optimizer
        keys = ("global_batch_tokens", "micro_batch_size")
        update = {key: value for key in keys if (value := getattr(phase, key)) is not None}
        batch_tokens = phase.global_batch_tokens or self.train.global_batch_tokens
        train = self.train.model_copy(update=update | {"steps": phase.tokens // batch_tokens})
        return self.model_copy(update={"data": self.data.of_phase(phase), "train": train, "optimizer": optimizer})

    def check_world(self, world_size: int) -> None:
        """Raises ConfigError or ParallelError unless a number of processes fits the run, or a stretch of its phases."""
        if self.data.phases is not None:
            self.schedule.fitting(world_size)
            return
        check_world_size(self.parallel, world_size=world_size)
        if self.train.matmul_precision == "fp8" and self.parallel.partitions_weights(world_size):
            raise ConfigError(
                "train.matmul_precision is 'fp8', which parallel.zero_stage 3 does not take: its weights in 8 bits "
                "stay whole on each rank, so set parallel.zero_stage to 1 or 2, or train.matmul_precision=null"
            )
        data_size = world_size // self.parallel.model_ranks
        for batch_samples in reversed(self.batch_schedule.sizes()):
            micro_batches = self.accumulation_steps(data_size=data_size, batch_samples=batch_samples)
            if self.parallel.virtual_pipeline > 1 and micro_batches % self.parallel.pipeline:
                raise ConfigError(
                    f"parallel.virtual_pipeline is {self.parallel.virtual_pipeline}, which takes micro-batches in "
                    f"rounds of parallel.pipeline {self.parallel.pipeline}, and a step has {micro_batches} on each "
                    f"rank: change {self._batch_key(batch_samples)} or train.micro_batch_size so that it is a multiple"
                )

    def accumulation_steps(self, *, data_size: int, batch_samples: int | None = None) -> int:
        """Micro-batches of one rank in a step of `batch_samples`, by default of the whole global batch.

        Raises ConfigError when the batch cannot be cut so.
        """
        batch_samples = batch_samples or self.global_batch_samples
        samples, length = self.train.micro_batch_size * data_size, self.data.sequence_length
        if batch_samples % samples:
            raise ConfigError(
                f"{self._batch_key(batch_samples)} is {batch_samples * length}, which is not a multiple of "
                f"train.micro_batch_size {self.train.micro_batch_size} x data.sequence_length "
                f"{length} x {data_size} data-parallel ranks = {samples * length}: change one of them"
            )
        return batch_samples // samples

    def _batch_key(self, batch_samples: int) -> str:
        """What a message calls a global batch: the key, and of a batch within the ramp how that leads to it."""
        final = batch_samples == self.global_batch_samples
        return "train.global_batch_tokens" if final else "a global batch of train.batch_ramp"

    @model_validator(mode="after")
    def _check_together(self) -> "RunConfig":
        self.check_shapes()
        self._check_batch_ramp()
        self._settle_steps()
        self._check_muon()
        self._check_tensor_parallelism()
        self._check_abilities()
        check_parts(self.model, self.parallel, sequence_length=self.data.sequence_length)
        return self

    def _settle_steps(self) -> None:
        """Sets train.steps to the steps of data.phases, where there are any."""
        if self.data.phases is not None:
            self.__dict__["train"] = self.train.model_copy(update={"steps": steps_of_phases(self)})
        elif not self.train.steps:
            raise ValueError("train.steps is missing; docs/config.md says what it holds")

    def check_shapes(self) -> None:
        """Raises ValueError unless whole sequences make the global batch, and ranks can cut them."""
        if self.train.global_batch_tokens % self.data.sequence_length:
            raise ValueError(
                f"train.global_batch_tokens is {self.train.global_batch_tokens}, which is not a multiple of "
                f"data.sequence_length {self.data.sequence_length}: change one of them"
            )
        parts = self.parallel.context * (self.parallel.tensor if self.parallel.sequence else 1)
        if self.data.sequence_length % parts:
            raise ValueError(
                f"data.sequence_length is {self.data.sequence_length}, which cannot be cut into {parts} parts "
                "(parallel.context, times parallel.tensor with parallel.sequence): make it a multiple"
            )

    def _check_batch_ramp(self) -> None:
        ramp, length = self.train.batch_ramp, self.data.sequence_length
        if ramp is None:
            return
        for key in ("start_tokens", "increment_tokens"):
            if getattr(ramp, key) % length:
                raise ValueError(
                    f"train.batch_ramp.{key} is {getattr(ramp, key)}, which is not a multiple of data.sequence_length "
                    f"{length}"
                )
        growth_tokens = self.train.global_batch_tokens - ramp.start_tokens
        if growth_tokens <= 0 or growth_tokens % ramp.increment_tokens:
            raise ValueError(
                f"train.batch_ramp.increment_tokens is {ramp.increment_tokens}, which does not lead from "
                f"train.batch_ramp.start_tokens {ramp.start_tokens} to train.global_batch_tokens "
                f"{self.train.global_batch_tokens}: their difference must be a multiple of it"
            )

    def _check_muon(self) -> None:
        if self.optimizer.kind != "muon":
            return
        if self.parallel.tensor > 1:
            raise ValueError(
                f"optimizer.kind is muon, which steps whole matrices, and parallel.tensor {self.parallel.tensor} cuts "
                "them: set it to 1, or take adamw"
            )
        if self.model.scaling is not None:
            raise ValueError(
                f"optimizer.kind is muon and model.scaling is {self.model.scaling}, whose learning rates are made for "
                "AdamW's steps: set it to null, or take adamw"
            )

    def _check_tensor_parallelism(self) -> None:
        ranks, model = self.parallel.tensor, self.model
        try:
            equal_shard(model.vocab_size, Position(ranks))
        except ValueError:
            raise ValueError(
                f"model.vocab_size is {model.vocab_size}, too few for each of parallel.tensor {ranks} ranks to have "
                "tokens: lower parallel.tensor"
            ) from None
        for one in model.kinds:
            one.check(model, tensor_ranks=ranks)

    def _check_abilities(self) -> None:
        parallel = self.parallel
        needed = {
            Ability.TENSOR_PARALLEL: ("parallel.tensor", parallel.tensor, parallel.tensor > 1),
            Ability.SEQUENCE_PARALLEL: ("parallel.sequence", parallel.sequence, parallel.sequence),
            Ability.CONTEXT_PARALLEL: ("parallel.context", parallel.context, parallel.context > 1),
            Ability.PACKED_DOCUMENTS: (
                "data.reset_at_document",
                self.data.reset_at_document,
                self.data.reset_at_document,
            ),
        }
        for ability, (key, value, is_needed) in needed.items():
            for one in self.model.kinds if is_needed else ():
                if ability not in one.abilities:
                    raise ValueError(
                        f"{key} is {str(value).lower()}, and the mixer {one.name} ({one.letter} in model.pattern) has "
                        f"no {ability}: turn it off, or take another mixer"
                    )
