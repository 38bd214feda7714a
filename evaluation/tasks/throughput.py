"""How fast a model reads a prompt and then generates, by length and batch."""

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from sambalm.evaluation.plots import Line, Lines
from sambalm.evaluation.settings import Lengths, TaskSettings
from sambalm.evaluation.task import Item, Outcome, Score, Task, mean_score

_FEWEST_TOKENS = 64  # that are read to warm up


class ThroughputSettings(TaskSettings):
    """Keys of `throughput`."""

    lengths: Lengths = Field(default=[1024, 4096, 16384, 65536], description="Tokens of each prompt.")
    batches: Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=1)] = Field(
        default=[1], description="Prompts that are read and continued together."
    )
    new_tokens: int = Field(default=32, gt=1, description="Tokens generated after each prompt.")
    repeats: int = Field(
        default=3, gt=0, description="Measurements of each length and batch, after one that does not count."
    )
    seed: int = Field(default=0, ge=0, description="What the prompts are drawn from.")


class Throughput(Task[ThroughputSettings]):
    """Tokens a second of random prompts, and of single steps after them.

    A prompt is read in pieces as elsewhere, with logits of its last token alone. A step reads one token of each row;
    its time includes the choice of the next token on the device.
    """

    name: ClassVar[str] = "throughput"
    summary: ClassVar[str] = "tokens a second of reading a prompt and of generating, by length and batch"
    schema: ClassVar[type[TaskSettings]] = ThroughputSettings

    def protocol(self) -> dict[str, Any]:
        device = self.model.device
        name = (
            torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
        )
        return {"method": "random prompts; medians of steps", "device": name}

    def items(self) -> list[Item]:
        settings = self.settings
        return [
            Item(f"{length}/{batch}/{repeat}", length * batch, rows=batch, content=(length, batch, repeat))
            for batch in settings.batches
            for length in settings.lengths
            for repeat in range(settings.repeats)
        ]

    def measure(self, items: Sequence[Item], tick: Callable[[int], None]) -> list[dict[str, Any]]:
        return [self._measured(item, tick) for item in items]

    def _measured(self, item: Item, tick: Callable[[int], None]) -> dict[str, Any]:
        length, batch, repeat = item.content
        generator = torch.Generator().manual_seed(self.settings.seed + repeat)
        ids = torch.randint(self.model.vocab_size, (batch, length), generator=generator).to(self.model.device)
        if repeat == 0:  # on a GPU as long a prompt, for whose shape kernels are compiled
            on_gpu = self.model.device.type == "cuda"
            self._times(ids if on_gpu else ids[:, : max(_FEWEST_TOKENS, length // 8)], lambda _: None)
        prefill_s, step_s = self._times(ids, tick)
        return {"prefill_s": prefill_s, "step_s": step_s}

    def _times(self, ids: torch.Tensor, tick: Callable[[int], None]) -> tuple[float, float]:
        """Returns the seconds of reading the prompts, and the median of a step after them."""
        reader = self.model.new_reader(len(ids))
        self._wait()
        began_s = time.perf_counter()
        logits = reader.read(ids, progress=tick)
        self._wait()
        moments = [time.perf_counter()]
        for _ in range(self.settings.new_tokens):
            logits = reader.step(logits.argmax(dim=-1))
            self._wait()
            moments.append(time.perf_counter())
        steps = sorted(stop - start for start, stop in pairwise(moments))
        return moments[0] - began_s, steps[len(steps) // 2]

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)

    def outcome(self, records: Sequence[Mapping[str, Any]]) -> Outcome:
        settings, scores, rest = self.settings, [], list(records)
        for batch in settings.batches:
            for length in settings.lengths:
                own, rest = rest[: settings.repeats], rest[settings.repeats :]
                at = {"batch": batch, "length": length}
                read = [batch * length / record["prefill_s"] for record in own]
                generated = [batch / record["step_s"] for record in own]
                scores.append(mean_score("prefill tokens/s", read, at=at, chance=None))
                scores.append(mean_score("decode tokens/s", generated, at=at, chance=None))
        lines = [_line(scores, name, batch) for batch in settings.batches for name in ("prefill", "decode")]
        plot = Lines("Throughput by length of the prompt", lines, y_name="tokens a second", log_y=True)
        return Outcome(scores, plot)


def _line(scores: Sequence[Score], name: str, batch: int) -> Line:
    own = [score for score in scores if score.name.startswith(name) and score.at["batch"] == batch]
    points = [(float(score.at["length"]), score.value) for score in own]
    return Line(f"{name}, batch {batch}", points, [score.standard_error for score in own])
