"""Which jobs each experiment has, in the order in which they are worth their time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from sambalm.data_pipeline.shards import check_shard, manifest_path, shard_prefixes

from . import jobs
from .configs import pretraining, tuning, write_config
from .jobs import Job
from .layout import DataFolder, Layout
from .models import ARCHITECTURES, PATTERNS, SAMBA, SHORT_WINDOW, ExperimentError, Variant, fitted_model
from .results import best_rate
from .scales import Scale

ARCHITECTURE_RUNS, PATTERN_RUNS, TUNED = "architectures", "patterns", "passkey"
TABLE, FAR, DOCUMENTS, JOINED, GRID, LONG_GRID = "table", "far", "documents", "joined", "grid", "long-grid"
PHONEBOOK, RETRIEVAL, LONG_RETRIEVAL = "phonebook", "retrieval", "long-retrieval"
RETRIEVED = {"needles": ("single", "multi_key", "multi_value", "multi_query"), "questions": ("one_fact", "two_facts")}
"""The tasks of `retrieval` and their kinds."""
_RECALLING = (SAMBA, SHORT_WINDOW, "llama-swa", "llama")
READING_LABEL = "reading"
_READ_DOCUMENTS = 24  # long documents, at most
SWEEP_SEED = 1


@dataclass(frozen=True)
class Plan:
    """What an experiment is asked for.

    Args:
        models: names of its table, in order.
        seeds: of weights and data order; what goes on with a trained model takes that of the first.
        rates: learning rates; a single one is taken without a sweep.
        vocab_size: of the data's tokenizer.
        tuned_before: label whose tuned runs are tuned further; None for the trained ones.
    """

    layout: Layout
    data: DataFolder
    scale: Scale
    models: Sequence[str]
    seeds: Sequence[int]
    rates: Sequence[float]
    vocab_size: int
    tuned_before: str | None = None


def turn_of_seed(seed: int) -> str:
    return f"seed{seed}"


def turn_of_rate(rate: float) -> str:
    return f"lr{rate:g}"


def sweep(plan: Plan) -> list[Job]:
    """Short runs of every architecture at each learning rate."""
    return [job for name in plan.models for job in _sweep(plan, name)]


def architectures(plan: Plan) -> list[Job]:
    """The paper's comparison: every model at its own learning rate, and its perplexity at the table's lengths."""
    found = sweep(plan)
    for seed in plan.seeds:
        for name in plan.models:
            found += [_architecture(plan, name, seed=seed)]
            found += [_perplexity(plan, _run_name(name, seed), TABLE, plan.scale.lengths, plan.data.held_out)]
    return found


def extrapolation(plan: Plan) -> list[Job]:
    """Perplexity of the trained architectures at lengths far beyond that of training."""
    scale, found = plan.scale, _first_seeds(plan)
    for name in plan.models:
        run = _run_name(name, plan.seeds[0])
        far = [] if ARCHITECTURES[name].grows else list(scale.long_lengths)
        found += [_perplexity(plan, run, FAR, scale.far_lengths, plan.data.long, tokens=2 * scale.text_tokens)]
        found += [_sliding(plan, run, DOCUMENTS, length=scale.document_length, texts=_READ_DOCUMENTS, join=False)]
        if far:
            found += [_sliding(plan, run, JOINED, length=far[-1], texts=1, join=True)]
    return found


def reading(plan: Plan) -> list[Job]:
    """Memory and speed of the trained architectures by length; a GPU should have nothing else to do."""
    scale, found = plan.scale, _first_seeds(plan)
    for name in plan.models:
        far = [] if ARCHITECTURES[name].grows else list(scale.long_lengths)
        found += [_reading(plan, _run_name(name, plan.seeds[0]), [*scale.far_lengths, *far])]
    return found


def passkey(plan: Plan) -> list[Job]:
    """The trained architectures, tuned on short passkey documents and asked for keys in long ones."""
    found = [*_first_seeds(plan), *_passkey_documents(plan)]
    for name in plan.models:
        start = _run_name(name, plan.seeds[0])
        grows = ARCHITECTURES[name].grows
        found += _passkeys(plan, ARCHITECTURES[name], start, lengths=plan.scale.passkey.lengths, is_long=not grows)
    return found


def phonebook(plan: Plan) -> list[Job]:
    """The trained architectures, tuned on short phonebooks and asked for numbers in longer ones."""
    found = [*_first_seeds(plan), *_task_documents(plan, PHONEBOOK, ("phonebook",))]
    for name in plan.models:
        training = _tuned(plan, ARCHITECTURES[name], PHONEBOOK, start=_run_name(name, plan.seeds[0]))
        lengths = plan.scale.phonebook_lengths
        found += [training, _long_texts(plan, training.name, PHONEBOOK, task="phonebook", lengths=lengths)]
    return found


def retrieval(plan: Plan) -> list[Job]:
    """The trained architectures, tuned on short needles and questions and asked for those of long texts."""
    found = [*_first_seeds(plan), *_task_documents(plan, RETRIEVAL, tuple(RETRIEVED))]
    for name in plan.models:
        training = _tuned(plan, ARCHITECTURES[name], RETRIEVAL, start=_run_name(name, plan.seeds[0]))
        found += [training]
        for task in RETRIEVED:
            lengths = plan.scale.retrieval_lengths
            found += [_long_texts(plan, training.name, f"{RETRIEVAL}-{task}", task=task, lengths=lengths)]
        if not ARCHITECTURES[name].grows:
            found += [_long_texts(plan, training.name, LONG_RETRIEVAL, task="needles", lengths=None)]
    return found


def patterns(plan: Plan) -> list[Job]:
    """What the paper leaves open: orders and shares of layers, windows, heads, states; all at Samba's learning rate."""
    found = list(_sweep(plan, SAMBA))
    runs = []
    for seed in plan.seeds:
        for name in plan.models:
            found += [_pretrained(plan, PATTERNS[name], (PATTERN_RUNS, name), seed=seed, rates_of=SAMBA)]
            runs.append((name, found[-1].name))
            found += [_perplexity(plan, found[-1].name, TABLE, plan.scale.pattern_lengths, plan.data.held_out)]
    found += _passkey_documents(plan)
    for name, run in runs:
        found += _passkeys(plan, PATTERNS[name], run, lengths=plan.scale.passkey.pattern_lengths, is_long=False)
    return found


EXPERIMENTS: Mapping[str, tuple[Callable[[Plan], list[Job]], Mapping[str, Variant], Sequence[str]]] = {
    "architectures": (architectures, ARCHITECTURES, tuple(ARCHITECTURES)),
    "extrapolation": (extrapolation, ARCHITECTURES, tuple(ARCHITECTURES)),
    "reading": (reading, ARCHITECTURES, (SAMBA, "llama", "llama-swa", "mamba")),
    "passkey": (passkey, ARCHITECTURES, _RECALLING),
    "phonebook": (phonebook, ARCHITECTURES, _RECALLING),
    "retrieval": (retrieval, ARCHITECTURES, _RECALLING),
    "patterns": (patterns, PATTERNS, tuple(PATTERNS)),
}
"""By name: the jobs, the table of models, and the models that are taken where none are named."""


def _run_name(model: str, seed: int) -> str:
    return f"{ARCHITECTURE_RUNS}/{model}/{turn_of_seed(seed)}"


def _sweep(plan: Plan, model: str) -> Iterator[Job]:
    for rate in plan.rates if len(plan.rates) > 1 else ():
        name = f"{ARCHITECTURE_RUNS}/{model}/{turn_of_rate(rate)}"
        write = partial(_write_pretraining, plan, ARCHITECTURES[model], name, SWEEP_SEED, lambda rate=rate: rate)
        yield _training(plan, name, needs=(), prepare=partial(write, plan.scale.sweep_tokens))


def _first_seeds(plan: Plan) -> list[Job]:
    """Trains the architectures, of which nothing is done again that `architectures` has done in the same folder."""
    return sweep(plan) + [_architecture(plan, name, seed=plan.seeds[0]) for name in plan.models]


def _architecture(plan: Plan, name: str, *, seed: int) -> Job:
    return _pretrained(plan, ARCHITECTURES[name], (ARCHITECTURE_RUNS, name), seed=seed, rates_of=name)


def _pretrained(plan: Plan, variant: Variant, of: tuple[str, str], *, seed: int, rates_of: str) -> Job:
    """Trains a model in full.

    Args:
        of: the experiment and the model's name.
        rates_of: the architecture whose sweep chooses the learning rate.
    """
    name = "/".join((*of, turn_of_seed(seed)))
    swept = [f"{ARCHITECTURE_RUNS}/{rates_of}/{turn_of_rate(rate)}" for rate in plan.rates]
    needs = swept if len(swept) > 1 else ()
    write = partial(_write_pretraining, plan, variant, name, seed, lambda: _rate(plan, rates_of))
    return _training(plan, name, needs=needs, prepare=partial(write, plan.scale.tokens))


def _rate(plan: Plan, model: str) -> float:
    if len(plan.rates) == 1:
        return plan.rates[0]
    runs = {rate: plan.layout.run(ARCHITECTURE_RUNS, model, turn_of_rate(rate)) for rate in plan.rates}
    rate = best_rate(runs)
    if rate is None:
        raise ExperimentError(f"the sweep of {model} has no held-out loss: see the runs {', '.join(map(str, runs))}")
    return rate


def _write_pretraining(
    plan: Plan, variant: Variant, name: str, seed: int, rate: Callable[[], float], tokens: int
) -> None:
    model = fitted_model(variant, plan.scale, vocab_size=plan.vocab_size)
    run = plan.layout.run(name).resolve()
    values = pretraining(model, plan.scale, plan.data, run=run, seed=seed, peak_lr=rate(), tokens=tokens)
    write_config(values, plan.layout.config(name))


def _training(plan: Plan, name: str, *, needs: Sequence[str], prepare: Callable[[], None]) -> Job:
    config = plan.layout.config(name)
    return jobs.training(name, config, plan.layout.run(name), needs=needs, prepare=prepare)


def _passkey_documents(plan: Plan) -> list[Job]:
    made, tokenizer = plan.scale.tuning, plan.data.tokenizer
    return [
        jobs.passkey_documents(
            f"{name}-documents", prefix, tokenizer=tokenizer, documents=made.documents_of(tokens), tokens=tokens
        )
        for tokens, (name, prefix) in _documents(plan, TUNED).items()
    ]


def _task_documents(plan: Plan, experiment: str, tasks: Sequence[str]) -> list[Job]:
    made, tokenizer = plan.scale.tuning, plan.data.tokenizer
    return [
        jobs.task_documents(
            f"{name}-documents",
            prefix,
            tasks=tasks,
            tokenizer=tokenizer,
            documents=made.documents_of(tokens),
            tokens=tokens,
        )
        for tokens, (name, prefix) in _documents(plan, experiment).items()
    ]


def _documents(plan: Plan, experiment: str) -> dict[int, tuple[str, Path]]:
    """Returns by the tokens of a document the name and the prefix of those that an experiment tunes on."""
    tuned, lengths = plan.layout.tuned(experiment), plan.scale.tuning.tokens
    names = {tokens: f"{tuned}-{tokens}" if len(lengths) > 1 else tuned for tokens in lengths}
    return {tokens: (name, plan.layout.folder / "documents" / name) for tokens, name in names.items()}


def _tuned(plan: Plan, variant: Variant, experiment: str, *, start: str) -> Job:
    """Tunes a run on an experiment's documents.

    Args:
        start: name of the run.
    """
    name, documents = f"{plan.layout.tuned(experiment)}/{start}", _documents(plan, experiment)

    def prepare() -> None:
        model = fitted_model(variant, plan.scale, vocab_size=plan.vocab_size)
        prefixes = {tokens: prefix for tokens, (_, prefix) in documents.items()}
        first = plan.layout.run(start)
        if plan.tuned_before is not None:
            first = plan.layout.run(replace(plan.layout, label=plan.tuned_before).tuned(experiment), start)
            if not jobs.is_trained(first):
                raise ExperimentError(f"{first} is not tuned to its end: run it first, with its --label")
        run, seed = plan.layout.run(name).resolve(), plan.seeds[0]
        write_config(tuning(model, plan.scale, prefixes, run=run, start=first, seed=seed), plan.layout.config(name))

    return _training(plan, name, needs=(start, *(f"{one}-documents" for one, _ in documents.values())), prepare=prepare)


def _passkeys(plan: Plan, variant: Variant, start: str, *, lengths: Sequence[int], is_long: bool) -> list[Job]:
    """Tunes a run on passkeys and asks for keys in texts of several lengths.

    Args:
        is_long: whether the first of the scale's long lengths is asked for as well.
    """
    passkey, training = plan.scale.passkey, _tuned(plan, variant, TUNED, start=start)
    grids = [(GRID, lengths, passkey.samples)]
    grids += [(LONG_GRID, plan.scale.long_lengths[:1], passkey.long_samples)] if is_long else []
    found = [training]
    for label, asked, samples in grids:
        keys = [f"lengths={list(asked)}", f"depths={passkey.depths}", f"samples={samples}"]
        found.append(_evaluation(plan, training.name, label, task="passkey", keys=keys, data=()))
    return found


def _long_texts(plan: Plan, run: str, label: str, *, task: str, lengths: Sequence[int] | None) -> Job:
    """Asks a run for what texts hold; `lengths` None for a few of the first of the scale's long lengths."""
    samples = plan.scale.retrieval_samples if lengths else max(1, plan.scale.retrieval_samples // 10)
    keys = [f"lengths={list(lengths or plan.scale.long_lengths[:1])}", f"samples={samples}"]
    return _evaluation(plan, run, label, task=task, keys=keys, data=())


def _perplexity(
    plan: Plan, run: str, label: str, lengths: Sequence[int], data: Path, *, tokens: int | None = None
) -> Job:
    keys = [f"lengths={list(lengths)}", f"tokens={tokens or plan.scale.text_tokens}"]
    prepare = partial(_check_long, plan.data) if data == plan.data.long else None
    return _evaluation(plan, run, label, task="perplexity", keys=keys, data=(data,), prepare=prepare)


def _sliding(plan: Plan, run: str, label: str, *, length: int, texts: int, join: bool) -> Job:
    keys = [f"length={length}", f"documents={texts}", f"join={str(join).lower()}"]
    data = (plan.data.long, plan.data.held_out) if join else (plan.data.long,)
    prepare = partial(_check_long, plan.data, tokens=1 if join else length + 1)
    return _evaluation(plan, run, label, task="sliding", keys=keys, data=data, prepare=prepare)


def _check_long(data: DataFolder, *, tokens: int = 1) -> None:
    """Raises ExperimentError where no long document has a number of tokens."""
    if not manifest_path(data.long).is_file() and not data.long.with_suffix(".idx").is_file():
        raise ExperimentError(f"{data.folder} has no long documents: prepare another one with fewer --long-characters")
    longest = max(int(check_shard(prefix).lengths.max()) for prefix in shard_prefixes(data.long))
    if longest < tokens:
        raise ExperimentError(
            f"no document of {data.long} has the {tokens:,} tokens that are read of each: the longest has {longest:,}"
        )


def _evaluation(
    plan: Plan,
    run: str,
    label: str,
    *,
    task: str,
    keys: Sequence[str],
    data: Sequence[Path],
    prepare: Callable[[], None] | None = None,
) -> Job:
    return jobs.evaluation(
        f"{run}/{label}",
        plan.layout.run(run),
        label,
        task=task,
        keys=[key.replace(" ", "") for key in keys],
        data=data,
        precision=plan.scale.precision,
        batch_tokens=plan.scale.evaluation_tokens,
        needs=(run,),
        prepare=prepare or (lambda: None),
    )


def _reading(plan: Plan, run: str, lengths: Sequence[int]) -> Job:
    place = plan.layout.run(run)
    return jobs.reading(f"{run}/{READING_LABEL}", place, lengths=lengths, precision=plan.scale.precision, needs=(run,))
