"""Runs an experiment, or shows what is there of it.

    python -m benchmarks.experiments prepare --train train.jsonl --held-out valid.jsonl --data data/prose
    python -m benchmarks.experiments architectures --data data/prose --folder runs/paper --minutes 9
    python -m benchmarks.experiments architectures --folder runs/paper --table --plot architectures.png

Experiments: architectures, extrapolation, reading, passkey, phonebook, retrieval, patterns. The same command goes on
where it was stopped, by a signal or by --minutes. Exit codes: 0 when all jobs are done, 75 when time was up and 1 when
a job failed.
"""

import argparse
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch

from sambalm.data_pipeline.errors import DataError
from sambalm.data_pipeline.tokenizer_formats import load_tokenizer

from .experiments import EXPERIMENTS, Plan, architectures, sweep
from .layout import DataFolder, Layout
from .models import ExperimentError
from .plots import draw
from .prepare import prepare
from .runner import Ending, run_jobs
from .scales import SCALES
from .tables import TABLES

EXIT_CODES = {Ending.DONE: 0, Ending.FAILED: 1, Ending.LEFT: 75}


def main() -> int:
    arguments = _arguments()
    if arguments.experiment == "prepare":
        prepare(
            arguments.train,
            arguments.held_out,
            arguments.data,
            long_characters=arguments.long_characters,
            vocab_size=arguments.vocab_size,
            text_key=arguments.text_key,
        )
        return 0
    layout = Layout(arguments.folder, arguments.label)
    if arguments.table or arguments.plot:
        if arguments.table:
            print(TABLES[arguments.experiment](layout))
        if arguments.plot:
            draw(arguments.experiment, layout, arguments.plot)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the jobs are stopped on the way out
    make_jobs = sweep if arguments.sweep else EXPERIMENTS[arguments.experiment][0]
    places = [gpu for gpu in _gpus(arguments.gpus) for _ in range(arguments.per_gpu)]
    return EXIT_CODES[run_jobs(make_jobs(_plan(arguments, layout)), layout, places=places, minutes=arguments.minutes)]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.experiments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="experiment", required=True)
    preparing = commands.add_parser("prepare", help="text to the data of all experiments")
    preparing.add_argument("--train", type=Path, required=True, help="JSONL with the key of --text-key")
    preparing.add_argument("--held-out", type=Path, required=True, help="JSONL that no model is trained on")
    preparing.add_argument("--data", type=Path, required=True, help="folder for tokenizer and shards")
    preparing.add_argument("--long-characters", type=int, default=260_000, help="longer documents are held out")
    preparing.add_argument("--vocab-size", type=int, default=16_384, help="pieces of the tokenizer")
    preparing.add_argument("--text-key", default="text", help="key of the text in each line")
    for name, (make_jobs, models, _) in EXPERIMENTS.items():
        one = commands.add_parser(name, help=str(make_jobs.__doc__).splitlines()[0])
        one.add_argument("--folder", type=Path, required=True, help="runs and results of a comparison")
        one.add_argument("--data", type=Path, help="what prepare wrote")
        one.add_argument("--scale", choices=SCALES, default="small", help="sizes; tiny is for trying")
        one.add_argument("--models", nargs="+", choices=models, metavar="NAME", help=f"of {', '.join(models)}")
        one.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="of weights and data order")
        one.add_argument("--rates", type=float, nargs="+", help="learning rates of the sweep; one alone is taken")
        one.add_argument("--tokens", type=float, help="of each run, other than the scale's")
        one.add_argument("--sweep-tokens", type=float, help="of each run of the sweep, other than the scale's")
        one.add_argument("--tuning-steps", type=int, help="of each tuned run, other than the scale's")
        one.add_argument(
            "--tuning-tokens", type=int, nargs="+", help="of each document that it is tuned on; several: one by one"
        )
        one.add_argument("--tuned-before", metavar="LABEL", help="tune a label's runs further; '' is the usual one")
        one.add_argument("--label", default="", help="sets runs that are tuned otherwise apart")
        one.add_argument("--minutes", type=float, help="after which all jobs have stopped")
        one.add_argument("--gpus", nargs="+", help="numbers of GPUs; default: all that there are")
        one.add_argument("--per-gpu", type=int, default=1, help="jobs on a GPU at a time, which slow each other")
        if make_jobs is architectures:
            one.add_argument("--sweep", action="store_true", help="run the sweep of learning rates alone")
        one.set_defaults(sweep=False)
        one.add_argument("--table", action="store_true", help="print what is there, and run nothing")
        one.add_argument("--plot", type=Path, help="draw what is there as a PNG, and run nothing")
    arguments = parser.parse_args()
    if arguments.experiment != "prepare" and arguments.tuned_before == arguments.label:
        parser.error("--tuned-before names the label of the runs themselves: give another --label")
    if arguments.experiment != "prepare" and not (arguments.data or arguments.table or arguments.plot):
        parser.error("--data is needed to run: the folder that prepare wrote")
    return arguments


def _plan(arguments: argparse.Namespace, layout: Layout) -> Plan:
    scale = SCALES[arguments.scale]
    scale = replace(
        scale,
        tuning=scale.tuning.changed(steps=arguments.tuning_steps, tokens=arguments.tuning_tokens),
        tokens=int(arguments.tokens or scale.tokens),
        sweep_tokens=int(arguments.sweep_tokens or scale.sweep_tokens),
    )
    _, _, defaults = EXPERIMENTS[arguments.experiment]
    return Plan(
        layout=layout,
        data=DataFolder(arguments.data),
        scale=scale,
        models=arguments.models or defaults,
        seeds=arguments.seeds,
        rates=arguments.rates or scale.learning_rates,
        vocab_size=load_tokenizer(DataFolder(arguments.data).tokenizer).vocab_size,
        tuned_before=arguments.tuned_before,
    )


def _gpus(named: list[str] | None) -> list[str] | list[None]:
    return named or [str(number) for number in range(torch.cuda.device_count())] or [None]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ExperimentError, DataError) as error:
        sys.exit(f"error: {error}")
