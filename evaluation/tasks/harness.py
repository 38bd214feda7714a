"""Tasks of lm-evaluation-harness, where it is installed and has their data."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from typing import Any, ClassVar

from pydantic import Field

from sambalm.evaluation.errors import EvaluationError
from sambalm.evaluation.plots import Bar, Bars
from sambalm.evaluation.settings import TaskSettings
from sambalm.evaluation.task import Item, Outcome, Score, Surroundings, Task
from sambalm.pretrain.errors import one_sentence

_PACKAGE, _DISTRIBUTION = "lm_eval", "lm_eval"
_ERROR, _NUMBER = "_stderr", "n-samples"


class HarnessSettings(TaskSettings):
    """Keys of `harness`."""

    tasks: list[str] = Field(default=[], description="Names of tasks or groups, as lm-eval lists them.")
    include: str | None = Field(default=None, description="A folder with further tasks of lm-eval's, as YAML.")
    shots: int | None = Field(default=None, ge=0, description="Examples before each question; default: the task's own.")
    questions: int | None = Field(
        default=None, gt=0, description="Questions of each task, the first ones; default: all."
    )
    batch_tokens: int = Field(default=16384, gt=0, description="Tokens that are read together, at most.")


class Harness(Task[HarnessSettings]):
    """What lm-eval finds of the model, with its own prompts, data and metrics.

    A task of lm-eval's is one item: a killed evaluation starts the one again that it was at.
    """

    name: ClassVar[str] = "harness"
    summary: ClassVar[str] = "any task of lm-evaluation-harness, where it is installed"
    schema: ClassVar[type[TaskSettings]] = HarnessSettings

    def __init__(self, settings: HarnessSettings, surroundings: Surroundings) -> None:
        super().__init__(settings, surroundings)
        if not settings.tasks:
            raise EvaluationError(
                "harness.tasks is empty: name tasks of lm-eval's, as in harness.tasks=[lambada_openai]"
            )
        if importlib.util.find_spec(_PACKAGE) is None:
            raise EvaluationError("harness needs lm-evaluation-harness, which is not installed: `pip install lm_eval`")

    def protocol(self) -> dict[str, Any]:
        return {
            "method": f"lm-evaluation-harness {version(_DISTRIBUTION)}",
            "tokenizer": self.model.tokenizer_hash(),
        }

    def items(self) -> list[Item]:
        unknown = [name for name in self.settings.tasks if not self._manager.match_tasks([name])]
        if unknown:
            raise EvaluationError(
                f"lm-eval has no task {unknown[0]!r}; `lm_eval ls tasks` lists them, and harness.include names a "
                "folder with others"
            )
        return [Item(name, 1, content=name) for name in self.settings.tasks]

    @cached_property
    def _manager(self) -> Any:
        """All tasks that there are, which takes seconds to find out."""
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=self.settings.include)

    def measure(self, items: Sequence[Item], tick: Callable[[int], None]) -> list[dict[str, Any]]:
        records = []
        for item in items:
            records.append(self._results(item.content))
            tick(1)
        return records

    def _results(self, name: str) -> dict[str, Any]:
        import lm_eval

        from sambalm.evaluation.harness.model import HarnessModel

        settings, tokens = self.settings, 0

        def tick(count: int) -> None:
            nonlocal tokens
            tokens += count

        try:
            found = lm_eval.simple_evaluate(
                HarnessModel(self.model, batch_tokens=settings.batch_tokens, tick=tick),
                tasks=[name],
                num_fewshot=settings.shots,
                limit=settings.questions,
                task_manager=self._manager,
                bootstrap_iters=1000,
                log_samples=False,
                metadata={"pretrained": self.model.identity.path},
            )
        except EvaluationError:
            raise
        except Exception as error:  # whatever data sets, their downloads and metrics raise
            raise EvaluationError(
                f"lm-eval cannot run {name} ({one_sentence(error)}); see whether its data is on this machine"
            ) from error
        counts = {task: number["effective"] for task, number in found[_NUMBER].items()}
        return {"results": found["results"], "counts": counts, "tokens": tokens}

    def outcome(self, records: Sequence[Mapping[str, Any]]) -> Outcome:
        scores = [
            score
            for record in records
            for task, metrics in record["results"].items()
            for score in _scores(task, metrics, record["counts"].get(task, 0))
        ]
        bars = [
            Bar(f"{score.at['task']}, {score.name}", score.value, score.standard_error, None)
            for score in scores
            if 0 <= score.value <= 1
        ]
        return Outcome(scores, Bars("lm-evaluation-harness", bars, x_name="value"))


def _scores(task: str, metrics: Mapping[str, Any], count: int) -> list[Score]:
    """Makes scores of lm-eval's entries, "METRIC,FILTER" and "METRIC_stderr,FILTER"."""
    found = []
    for key, value in metrics.items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith(_ERROR) or not isinstance(value, int | float):
            continue
        error = metrics.get(f"{metric}{_ERROR},{filtered}")
        at = {"task": task} | ({} if filtered == "none" else {"filter": filtered})
        found.append(Score(metric, at, float(value), error if isinstance(error, float) else None, None, count))
    return found
