"""Tasks in the training loop: a hook of `sambalm train` that measures the model as it trains, on all ranks together.

Every rank gathers the whole model beside what it trains, in the form that `sambalm evaluate` loads, and the ranks share
the items. No checkpoint is written for it. Results lie where those of `sambalm evaluate RUN` lie, under the same names.
"""

import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from sambalm.data_pipeline.errors import DataError
from sambalm.evaluation.command import CACHE, FOLDER
from sambalm.evaluation.errors import EvaluationError
from sambalm.evaluation.models.samba import SambaModel
from sambalm.evaluation.ranks import main_first
from sambalm.evaluation.results import Result
from sambalm.evaluation.runner import Plan, evaluate, prepare, silent
from sambalm.evaluation.task import Surroundings
from sambalm.evaluation.tasks.registry import task_settings
from sambalm.model.hf.generate import model_of_state
from sambalm.model.hf.names import check_mixers, hf_config
from sambalm.parallel.groups import World
from sambalm.pretrain.checkpointing.gathered import GatheredState
from sambalm.pretrain.config import PRECISION_BYTES, RunConfig
from sambalm.pretrain.errors import print_warning
from sambalm.pretrain.generation.source import source_of_model
from sambalm.pretrain.lifecycle.hooks import FinishedStep, Hook
from sambalm.pretrain.lifecycle.phases import Phase
from sambalm.pretrain.precision import DTYPES
from sambalm.pretrain.reporting.metrics_file import EVALUATION
from sambalm.pretrain.training import Training

T = TypeVar("T")
_GIB = 2**30


def check_tasks(config: RunConfig) -> None:
    """Finds what is wrong with the tasks of a run before anything of it starts.

    Raises:
        EvaluationError: a task or a key is unknown, or a value not allowed.
        HFError: a mixer cannot be measured.
    """
    section = config.evaluation
    if not section.tasks:
        return
    try:
        task_settings(list(section.tasks), _overrides(config), data=[])
    except EvaluationError as error:
        raise EvaluationError(f"evaluation.tasks: {error}") from None
    check_mixers(hf_config(config.model, dtype=DTYPES[section.precision]))


class InLoopEvaluation(Hook):
    """Measures a run after some of its steps, and adds the scores to the step's metrics.

    All is prepared once before the first step, so that what cannot be measured ends the run there.
    """

    phase = Phase.VALIDATION

    def __init__(self, config: RunConfig, world: World) -> None:
        check_tasks(config)
        self._config, self._world = config, world
        self._folder = Path(config.run.dir) / FOLDER
        section = config.evaluation
        self._plan = Plan(list(section.tasks), _overrides(config), [], self._folder, section.batch_tokens)

    def on_start(self, training: Training) -> None:
        self._training = training
        self._with_model(0, lambda surroundings: len(prepare(self._plan, surroundings, ranks=self._world)))

    def acts_on(self, step: int) -> bool:
        section, schedule = self._config.evaluation, self._config.schedule
        if step == self._config.train.steps:
            return True
        if section.every_tokens is None:
            return section.every_steps is not None and step % section.every_steps == 0
        before, after = (schedule.tokens(schedule.consumed_samples(s)) for s in (step - 1, step))
        return before // section.every_tokens < after // section.every_tokens

    def after_step(self, step: FinishedStep) -> None:
        if not self.acts_on(step.number):
            return
        try:
            step.metrics.update(self._with_model(step.number, self._scores))
        except (EvaluationError, DataError) as error:  # the same on every rank; a full disk should not end a run
            if self._world.is_main:
                print_warning(f"the run goes on, but the evaluation after step {step.number} is not complete: {error}")

    def _scores(self, surroundings: Surroundings) -> dict[str, float]:
        results = evaluate(self._plan, surroundings, bar=silent, ranks=self._world)
        return {name: value for result in results for name, value in metrics(result).items()}

    def _with_model(self, step: int, action: Callable[[Surroundings], T]) -> T:
        """Gathers the model as it is, and gives its memory back once an action has used it. Collective."""
        self._training.executor.close()  # captured graphs, whose memory the model may need
        try:
            return action(Surroundings(self._gathered(step), self._config, cache_dir=self._folder / CACHE))
        finally:
            gc.collect()
            if self._world.device.type == "cuda":
                torch.cuda.empty_cache()

    def _gathered(self, step: int) -> SambaModel:
        state = GatheredState(self._training.chunks, world=self._world)
        self._check_memory(sum(torch.Size(shape).numel() for shape in state.shapes().values()))
        model = model_of_state(state, self._config.model, dtype=DTYPES[self._config.evaluation.precision])
        model = model.to(self._world.device)

        def with_tokenizer() -> SambaModel:
            source = source_of_model(model, tokenizer=self._tokenizer(), data=self._config.data)
            return SambaModel(source, path=Path(self._config.run.dir), step=step)

        return main_first(self._world, with_tokenizer)

    def _tokenizer(self) -> Path:
        file = self._config.data.tokenizer_path()
        if file is None:
            raise EvaluationError(
                f"evaluation.tasks is set, but {self._config.data.prefixes[0]} names no tokenizer: preprocess the data "
                "anew, or leave the section out"
            )
        return file

    def _check_memory(self, parameters: int) -> None:
        """
        Raises:
            EvaluationError: on every rank, when a whole model does not fit beside what one of them trains.
        """
        precision = self._config.evaluation.precision
        needed = parameters * PRECISION_BYTES[precision]
        free = min(self._world.all_gather_object(free_bytes(self._world.device)))
        if needed > free:
            raise EvaluationError(
                f"evaluation.tasks needs the whole model on every rank, {needed / _GIB:.1f} GiB in "
                f"evaluation.precision={precision}, and a rank has {free / _GIB:.1f} GiB left: take "
                "bf16, more ranks, or `sambalm evaluate` beside the run"
            )


def free_bytes(device: torch.device) -> int:
    """Returns what this rank may still take of its device's memory, of a host shared by its ranks an equal part."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def metrics(result: Result) -> dict[str, float]:
    """Names the scores of a result for metrics.jsonl: `evaluation/passkey/accuracy/1024`."""
    return {
        "/".join([f"{EVALUATION}{result.task}", score.name, *map(str, score.at.values())]): score.value
        for score in result.scores
    }


def _overrides(config: RunConfig) -> list[str]:
    tasks = config.evaluation.tasks.items()
    return [f"{task}.{key}={json.dumps(value, default=str)}" for task, keys in tasks for key, value in keys.items()]
