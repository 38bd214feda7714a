"""Any model of this package as a model of lm-eval's."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from sambalm.evaluation.errors import EvaluationError
from sambalm.evaluation.models.base import LanguageModel
from sambalm.evaluation.tasks.continuations import continuation_scores
from sambalm.evaluation.tasks.generation import Context, continued_texts

_MAX_NEW_TOKENS = 256  # lm-eval's own default


class HarnessModel(TemplateLM):
    """What lm-eval asks of a model, by the interface that our tasks use."""

    def __init__(
        self, model: LanguageModel, *, batch_tokens: int, tick: Callable[[int], None] = lambda _: None
    ) -> None:
        super().__init__()
        self.model, self._batch_tokens, self._tick = model, batch_tokens, tick

    @property
    def eot_token_id(self) -> int:
        return self.model.end_id if self.model.end_id is not None else 0

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.model.begin_id is None else self.model.begin_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.model.encode(string) if add_special_tokens is False else self.model.encode_first(string)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        """Scores (names, context, continuation) in batches from the longest on."""
        pairs = [(list(context), list(continuation)) for _, context, continuation in requests]
        order = sorted(range(len(pairs)), key=lambda number: -sum(map(len, pairs[number])))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        while order:
            rows = max(1, self._batch_tokens // sum(map(len, pairs[order[0]])))
            batch, order = order[:rows], order[rows:]
            scores = continuation_scores(self.model, [pairs[number] for number in batch])
            for number, score in zip(batch, scores, strict=True):
                found[number] = (score.log_likelihood, score.is_greedy)
            self._tick(sum(len(part) for number in batch for part in pairs[number]))
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Scores whole texts after the token that begins one, however long, with the state carried."""
        found = []
        for (text,) in (request.args for request in requests):
            ids = torch.tensor([[self.prefix_token_id, *self.model.encode(text)]])
            scores = self.model.new_reader(1).score(ids, progress=self._tick)
            found.append(float(scores.log_likelihoods[:, 1:].double().sum()))
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues texts with the likeliest token each time, up to a string of `until`, from the longest on."""
        contexts = [self._context(*request.args) for request in requests]
        order = sorted(range(len(contexts)), key=lambda number: -len(contexts[number].ids))
        found = [""] * len(contexts)
        while order:
            rows = max(1, self._batch_tokens // len(contexts[order[0]].ids))
            batch, order = order[:rows], order[rows:]
            texts = continued_texts(self.model, [contexts[number] for number in batch], tick=self._tick)
            for number, text in zip(batch, texts, strict=True):
                found[number] = text
        return found

    def _context(self, text: str, settings: dict[str, Any]) -> Context:
        if settings.get("do_sample") and settings.get("temperature", 1.0) > 0:
            raise EvaluationError("a task of lm-eval asks for samples, and here texts are greedy; leave it out")
        until = settings.get("until") or []
        return Context(
            self.model.encode_first(text) or [self.prefix_token_id],
            stops=[until] if isinstance(until, str) else list(until),
            max_new_tokens=settings.get("max_gen_toks", _MAX_NEW_TOKENS),
        )
