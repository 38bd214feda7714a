"""Trains the same tiny runs with two commits, or with a commit and the working tree, and compares results bit by bit.

    python benchmarks/compare.py v0.1.0
    python benchmarks/compare.py v0.1.0 main --layouts CP2,ZeRO-3 --precisions fp32
    make compare BASE=v0.1.0 LAYOUTS=CP2,ZeRO-3

Each run is the public program (`sambalm train`, under torchrun where it has several ranks) on a CPU, over the same data
and config. The script compares every number that training computes in metrics.jsonl (losses, gradient norms, learning
rates, validation losses; not times and memory) and every tensor of the last checkpoint: weights and both of AdamW's
moments, assembled from their slices, so that files may be cut differently. `resumed` lets the newer one go on from a
checkpoint that the older one wrote. Exit code 1 says that something differs or that a run failed.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = "sambalm.pretrain.cli"
STEPS, SAVED_STEP = 5, 3  # steps of a run, and the step of the checkpoint from which `resumed` goes on
TIMEOUT_S = 900.0  # of one run, on a machine that does other work too
VOCAB_SIZE = 384

SP2 = ("parallel.tensor=2", "parallel.sequence=true")
DOCUMENTS = "data.reset_at_document=true"
# Ranks and overrides of each layout. Two data-parallel ranks are ZeRO's smallest world.
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one-process": (1, ()),
    "TP2+SP": (2, SP2),
    "PP2xVPP2": (2, ("parallel.pipeline=2", "parallel.virtual_pipeline=2")),
    "CP2": (2, ("parallel.context=2",)),
    "ZeRO-1": (2, ("parallel.zero_stage=1",)),
    "ZeRO-2": (2, ("parallel.zero_stage=2",)),
    "ZeRO-3": (2, ("parallel.zero_stage=3",)),
    "CP2+documents": (2, ("parallel.context=2", DOCUMENTS)),
    "resumed": (2, ("parallel.zero_stage=1",)),
}
PRECISIONS = ("fp32", "bf16")

# Uneven heads and widths, four micro-batches a rank at most, and gradients long enough to be clipped.
CONFIG = f"""
format_version: 1
run: {{dir: unset, seed: 7}}
model:
  pattern: M-*-M
  hidden_size: 48
  num_query_heads: 12
  num_kv_heads: 2
  mlp_size: 82
  window: 11
  vocab_size: {VOCAB_SIZE}
data: {{train: tokens, sequence_length: 32, validation_fraction: 0.2}}
train: {{steps: {STEPS}, global_batch_tokens: 256, micro_batch_size: 2}}
optimizer: {{peak_lr: 3e-3, warmup_fraction: 0.2, clip_norm: 0.5}}
validation: {{every_steps: {STEPS}, tokens: 1100, length_multiples: [1, 2]}}
checkpoint: {{every_steps: {SAVED_STEP}, keep: 2}}
"""


class CompareError(Exception):
    """The comparison could not be made; the message is for the maintainer."""


@dataclass(frozen=True)
class Case:
    """A layout in a precision."""

    layout: str
    precision: str

    @property
    def goes_on(self) -> bool:
        """Whether the newer side starts from the older one's checkpoint of SAVED_STEP."""
        return self.layout == "resumed"

    @property
    def uninterrupted(self) -> "Case":
        """What the older side trains: of `resumed` the run that the newer one goes on with."""
        return Case("ZeRO-1", self.precision) if self.goes_on else self


@dataclass(frozen=True)
class Side:
    """One of the two trees, as an importable package, with a folder for its runs."""

    name: str
    package: Path  # a folder for PYTHONPATH
    folder: Path
    running: list[subprocess.Popen] = field(default_factory=list)

    def environment(self) -> dict[str, str]:
        # Runs on CUDA need not repeat their own bits, and one thread a rank is enough for so small a model. Without
        # dynamo, which would compile functions of megatron-core in every process.
        fixed = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
        return os.environ | fixed | {"PYTHONPATH": str(self.package)}

    def run_dir(self, case: Case) -> Path:
        return self.folder / f"{case.layout}-{case.precision}"

    def train(self, case: Case, *, data: Path) -> None:
        """Runs the program. Raises CompareError with the end of its output when it fails."""
        ranks, overrides = LAYOUTS[case.layout]
        launcher = ("torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m") if ranks > 1 else ()
        values = {
            "run.dir": self.run_dir(case),
            "data.train": data / "tokens",
            "data.cache_dir": self.folder / "index",  # each commit may write its own format
            "train.precision": case.precision,
        }
        settings = [f"{key}={value}" for key, value in values.items()]
        self.call("-m", *launcher, PROGRAM, "train", str(data / "config.yaml"), *settings, *overrides)

    def call(self, *arguments: str) -> str:
        """Runs Python on this tree in a session of its own, so that no rank outlives it; returns what it printed."""
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self.folder,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.running.append(process)
        try:
            output, _ = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise CompareError(f"{self.name}: no end after {TIMEOUT_S:.0f} s: {' '.join(arguments)}") from None
        finally:
            _kill(process)
            self.running.remove(process)
        if process.returncode:
            end = "\n    ".join(output.splitlines()[-12:])
            raise CompareError(f"{self.name}: exit code {process.returncode}: {' '.join(arguments)}\n    {end}")
        return output


def _kill(process: subprocess.Popen) -> None:
    """Ends a process with its session, unless it has ended."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def make_side(name: str, tree: Path, folder: Path) -> Side:
    """Links a tree's top folders as `sambalm.<folder>` and checks that Python takes every one of them from there.

    Raises CompareError when it does not, or when the tree has no program.
    """
    package = folder / "package" / "sambalm"
    package.mkdir(parents=True)
    # Makes `sambalm` a regular package: folders that an installed sambalm has and this tree lacks stay out of reach.
    (package / "__init__.py").touch()
    packages = sorted(file.parent for file in tree.glob("*/__init__.py") if file.parent.name != "tests")
    for source in packages:
        (package / source.name).symlink_to(source)
    side = Side(name, package.parent, folder)
    names = [f"sambalm.{source.name}" for source in packages] + [PROGRAM]
    script = "import importlib, sys\nfor name in sys.argv[1:]: print(importlib.import_module(name).__file__)"
    for name, file in zip(names, side.call("-c", script, *names).splitlines(), strict=True):
        if not Path(file).resolve().is_relative_to(tree.resolve()):
            raise CompareError(f"{side.name}: {name} comes from {file} and not from {tree}")
    return side


@contextlib.contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Path]:
    """A git worktree of a commit for the time of the comparison. Raises CompareError for an unknown commit."""
    added = subprocess.run(
        ["git", "worktree", "add", "--quiet", "--detach", folder, commit], cwd=ROOT, capture_output=True, text=True
    )
    if added.returncode:
        raise CompareError(f"cannot check out {commit}: {added.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", folder], cwd=ROOT, check=False)


def make_data(side: Side, data: Path) -> None:
    """Writes config, text, tokenizer and tokens: some sources of the standard library."""
    data.mkdir()
    (data / "config.yaml").write_text(CONFIG, encoding="utf-8")
    sources = sorted(Path(os.__file__).parent.glob("[a-d]*.py"))
    texts = [source.read_text(encoding="utf-8")[:4000] for source in sources]
    (data / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    text, tokenizer = ("--input", str(data / "text.jsonl")), str(data / "tokenizer.model")
    program = ("-m", PROGRAM, "data")
    side.call(*program, "tokenizer", *text, "--vocab-size", str(VOCAB_SIZE), "--output", tokenizer)
    side.call(*program, "preprocess", *text, "--tokenizer", tokenizer, "--output", str(data / "tokens"))


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """What training computed in each step; times, speeds, memory and outcomes of saves are left out."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    measured = ("_s", "_per_second", "_bytes", "mfu")
    return [
        {
            key: value
            for key, value in json.loads(line).items()
            if not key.endswith(measured) and not key.startswith("checkpoint_")
        }
        for line in lines
    ]


def metric_differences(base: list[dict[str, Any]], head: list[dict[str, Any]]) -> list[str]:
    """The first differing step of each number, as sentences. A number that the older commit lacks is no difference."""
    if not base or not {"loss", "grad_norm"} <= base[0].keys():
        return ["the older one logged no losses and gradient norms: nothing was compared"]
    steps = [[record["step"] for record in records] for records in (base, head)]
    if steps[0] != steps[1]:
        return [f"logged steps are {steps[0]} and {steps[1]}"]
    found: dict[str, str] = {}
    for old, new in zip(base, head, strict=True):
        for key, value in old.items():
            if key not in new:
                found.setdefault(key, f"{key} of step {old['step']} is no longer logged")
            elif value != new[key]:
                found.setdefault(key, f"{key} of step {old['step']} is {value} and {new[key]}")
    return list(found.values())


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Whole fp32 tensors of a checkpoint by name, from slices in any number of files.

    Raises CompareError when slices do not fill a tensor, or when two copies of an element differ.
    """
    slices: dict[str, list[tuple[tuple[int, ...], np.ndarray]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            placement = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            for name in file.keys():  # noqa: SIM118 - not a mapping
                slices.setdefault(name, []).append((tuple(placement[name]["saved_offsets"]), file.get_tensor(name)))
    return {name: _assembled(f"{folder}: {name}", pieces) for name, pieces in slices.items()}


def _assembled(name: str, pieces: list[tuple[tuple[int, ...], np.ndarray]]) -> np.ndarray:
    ends = [[o + n for o, n in zip(offsets, piece.shape, strict=True)] for offsets, piece in pieces]
    whole = np.empty([max(dim) for dim in zip(*ends, strict=True)], dtype=pieces[0][1].dtype)
    filled = np.zeros(whole.shape, dtype=bool)
    for offsets, piece in pieces:
        region = tuple(slice(o, o + n) for o, n in zip(offsets, piece.shape, strict=True))
        known = filled[region]
        if whole[region][known].tobytes() != piece[known].tobytes():
            raise CompareError(f"{name}: two stored copies differ")
        whole[region], filled[region] = piece, True
    if not filled.all():
        raise CompareError(f"{name}: no slice holds a part of it")
    return whole


def tensor_differences(base: Mapping[str, np.ndarray], head: Mapping[str, np.ndarray]) -> list[str]:
    """Tensors that are missing, or whose shapes, types or bits differ, as sentences: the largest difference first."""
    if not base:
        return ["the older one holds no tensors: nothing was compared"]
    found = [f"{name} is only in the {'older' if name in base else 'newer'} one" for name in base.keys() ^ head.keys()]
    changed: list[tuple[float, str]] = []
    for name in sorted(base.keys() & head.keys()):
        old, new = base[name], head[name]
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            found.append(f"{name} is {old.dtype} {old.shape} and {new.dtype} {new.shape}")
        elif old.tobytes() != new.tobytes():
            difference = np.linalg.norm((new - old).astype(np.float64)) / max(np.linalg.norm(old), 1e-30)
            changed.append((float(np.nan_to_num(difference, nan=np.inf)), name))
    return sorted(found) + [f"{name} differs by {size:.1e}" for size, name in sorted(changed, reverse=True)]


@dataclass(frozen=True)
class Comparison:
    """What came of a case."""

    case: Case
    steps: int
    tensors: int
    metrics: list[str]  # differences, as sentences
    checkpoint: list[str]

    @property
    def same(self) -> bool:
        return not self.metrics and not self.checkpoint

    def lines(self) -> Iterator[str]:
        words = ["same" if not found else f"{len(found)} differ" for found in (self.metrics, self.checkpoint)]
        counts = (f"{self.steps} steps", f"{self.tensors} tensors")
        yield _row(self.case.layout, self.case.precision, counts[0], words[0], counts[1], words[1])
        yield from (f"    {sentence}" for sentence in (self.metrics + self.checkpoint)[:6])


def _row(*cells: str) -> str:
    return "".join(f"{cell:<{width}}" for cell, width in zip(cells, (16, 11, 9, 12, 13, 12), strict=True)).rstrip()


def compare(case: Case, base: Side, head: Side) -> Comparison:
    """Compares the finished runs of both trees."""
    run_dirs = (base.run_dir(case.uninterrupted), head.run_dir(case))
    records = [read_metrics(run_dir) for run_dir in run_dirs]
    if case.goes_on:
        records[0] = [record for record in records[0] if record["step"] > SAVED_STEP]
    tensors = [read_tensors(_checkpoint(run_dir, STEPS)) for run_dir in run_dirs]
    return Comparison(
        case=case,
        steps=len(records[0]),
        tensors=len(tensors[0]),
        metrics=metric_differences(*records),
        checkpoint=tensor_differences(*tensors),
    )


def _checkpoint(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def run_both(case: Case, base: Side, head: Side, *, data: Path, pool: ThreadPoolExecutor) -> None:
    """Trains with both trees, at the same time unless one goes on from the other. Raises CompareError."""
    if case.goes_on:
        if not base.run_dir(case.uninterrupted).exists():
            base.train(case.uninterrupted, data=data)
        kept = _checkpoint(base.run_dir(case.uninterrupted), SAVED_STEP)
        shutil.copytree(kept, _checkpoint(head.run_dir(case), SAVED_STEP))
        head.train(case, data=data)
        return
    runs = [pool.submit(side.train, case, data=data) for side in (base, head)]
    try:
        for run in runs:
            run.result()
    finally:  # where one failed or the comparison is interrupted, the other need not go on
        for process in (*base.running, *head.running):
            _kill(process)


def compare_all(cases: list[Case], base: Side, head: Side, *, data: Path) -> bool:
    """Prints a table, a line a case as it is done; returns whether nothing differs."""
    print(_row("layout", "precision", "", "metrics", "", "checkpoint"), flush=True)
    same = True
    with ThreadPoolExecutor(max_workers=2) as pool:
        for case in cases:
            try:
                run_both(case, base, head, data=data, pool=pool)
                comparison = compare(case, base, head)
            except CompareError as error:
                print(_row(case.layout, case.precision, "", "failed", "", ""), f"    {error}", sep="\n", flush=True)
                same = False
                continue
            print(*comparison.lines(), sep="\n", flush=True)
            same &= comparison.same
    return same


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", help="the older commit")
    parser.add_argument("head", nargs="?", help="the newer commit; default: the working tree as it is")
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help=f"of {','.join(LAYOUTS)}")
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help=f"of {','.join(PRECISIONS)}")
    options = parser.parse_args()
    for key, allowed in (("layouts", LAYOUTS), ("precisions", PRECISIONS)):
        chosen = getattr(options, key).split(",")
        if unknown := [name for name in chosen if name not in allowed]:
            parser.error(f"--{key} has {', '.join(unknown)}: known are {', '.join(allowed)}")
        setattr(options, key, chosen)
    return options


def _described(tree: Path) -> str:
    """A tree's commit, and how many of its files differ from it."""
    outputs = [
        subprocess.run(["git", *arguments], cwd=tree, capture_output=True, text=True, check=True).stdout.strip()
        for arguments in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain"))
    ]
    changes = len(outputs[1].splitlines())
    return f"{outputs[0]} with {changes} uncommitted changes" if changes else outputs[0]


def main() -> int:
    options, start_s = parse_arguments(), time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that runs and worktrees are ended then, too
    cases = [Case(layout, precision) for layout in options.layouts for precision in options.precisions]
    try:
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            trees = [
                stack.enter_context(checked_out(commit, folder / f"tree{number}")) if commit else ROOT
                for number, commit in enumerate((options.base, options.head))
            ]
            print(f"{_described(trees[0])} against {_described(trees[1])}", flush=True)
            base, head = (make_side(n, tree, folder / n) for n, tree in zip(("base", "head"), trees, strict=True))
            make_data(head, folder / "data")
            same = compare_all(cases, base, head, data=folder / "data")
    except CompareError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{'the same bits' if same else 'DIFFERENT'} in {time.monotonic() - start_s:.0f} s")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
