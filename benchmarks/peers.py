"""Training steps side by side on this machine: this project's Samba, two others of the same sizes, and a Llama.

    python benchmarks/peers.py configs/samba_421m.yaml --output peers.jsonl
    python benchmarks/peers.py configs/samba_1.3b.yaml --output peers.jsonl --models samba plain --lengths 4096 16384
    python benchmarks/peers.py --output peers.jsonl --table
    python benchmarks/peers.py --output peers.jsonl --plot peers.svg

`python benchmarks/peer_steps/step.py --help` says what each model is and how a step is timed. Each cell of the table, a
model at a length, is a process of its own and adds a line to --output when it ends; cells that are there are not run
again. A model that runs out of memory is tried with recomputation, if that is among --recompute. Where a shorter length
has shown what memory a token takes, no attempt is made that would need more than the device has by a tenth.
"""

import argparse
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

MODELS = {"samba": "Samba, this project", "fla": "Samba, fla", "plain": "Samba, mamba-ssm", "llama": "Llama"}
LEVELS = ("none", "full")
CELL = ("config", "settings", "model", "length", "step_tokens", "micro_batch_tokens", "recompute")
TABLE = ("device", "torch", "config", "settings", "micro_batch_tokens")  # what the cells of a table have in common
MEASURED, OUT_OF_MEMORY, TIME_LIMIT = "measured", "out of memory", "time limit"
FINAL = (MEASURED, OUT_OF_MEMORY, TIME_LIMIT)  # outcomes that another run would not change
# In a folder of its own: transformers would take kernels.py, beside this file, for the package of that name.
STEP = Path(__file__).parent / "peer_steps" / "step.py"
CORES_TO_LOAD_AHEAD = 8  # with fewer, the timed steps would notice
GIB = 2**30


class StepProcesses:
    """Processes of step.py, one at work. Where there are cores to spare, the next one loads its packages meanwhile."""

    def __init__(self) -> None:
        self.next: subprocess.Popen | None = None

    def run(self, arguments: Sequence[str], *, limit_s: float) -> tuple[int, str, str]:
        """Exit code, output and errors. Raises subprocess.TimeoutExpired."""
        process = self.next or self._start()
        self.next = self._start() if os.cpu_count() >= CORES_TO_LOAD_AHEAD else None
        try:
            output, errors = process.communicate(json.dumps(arguments), timeout=limit_s)
        finally:
            self._end(process)
        return process.returncode, output, errors

    def close(self) -> None:
        if self.next:
            self._end(self.next)

    @staticmethod
    def _start() -> subprocess.Popen:
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        # A session of its own, so that compiler processes end with it.
        return subprocess.Popen([sys.executable, str(STEP), "--wait"], text=True, start_new_session=True, **pipes)

    @staticmethod
    def _end(process: subprocess.Popen) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", help="a run's config, followed by overrides; not needed to read results")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--lengths", nargs="*", type=int, default=[4096, 16384, 65536, 262144])
    parser.add_argument("--step-tokens", type=int, default=65536, help="of a step; one sequence where that is longer")
    parser.add_argument("--micro-batch-tokens", type=int, default=32768, help="or one sequence where that is longer")
    parser.add_argument("--recompute", nargs="*", default=list(LEVELS), choices=LEVELS, help="to try, in this order")
    parser.add_argument("--seconds", type=float, default=8.0, help="of steps that a cell may take after its second one")
    parser.add_argument("--limit-s", type=float, default=120.0, help="of a whole cell; one that takes longer is ended")
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="only draw tokens/s over length, into an .svg or .png"
    )
    arguments, overrides = parser.parse_known_intermixed_args()
    if arguments.plot:
        return plot(read(arguments.output), arguments)
    if not arguments.table:
        if not arguments.config:
            parser.error("a config is needed, or --table, or --plot")
        if bad := [length for length in arguments.lengths if max(arguments.step_tokens, length) % length]:
            parser.error(f"--step-tokens {arguments.step_tokens} is not a multiple of --lengths {bad[0]}")
        run(arguments, overrides)
    print_tables(read(arguments.output), arguments)


def read(path: Path) -> list[dict]:
    """The newest record of each cell; a line that was cut off is left out."""
    records = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            records[key_of(record)] = record
    return list(records.values())


def key_of(record: dict) -> str:
    return json.dumps([record[name] for name in CELL])


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Runs the cells that --output lacks, short lengths first."""
    with contextlib.closing(StepProcesses()) as processes:
        for length, model in itertools.product(sorted(arguments.lengths), arguments.models):
            for level in arguments.recompute:
                cell = {
                    "config": Path(arguments.config).stem,
                    "settings": list(overrides),
                    "model": model,
                    "length": length,
                    "step_tokens": max(arguments.step_tokens, length),
                    "micro_batch_tokens": arguments.micro_batch_tokens,
                    "recompute": level,
                }
                if result_of(cell, processes, arguments)["outcome"] != OUT_OF_MEMORY:
                    break


def result_of(cell: dict, processes: StepProcesses, arguments: argparse.Namespace) -> dict:
    """The result of an earlier run, or of one now, or foreseen; added to --output and printed."""
    records = read(arguments.output)
    for record in records:
        if key_of(record) == key_of(cell) and record["outcome"] in FINAL:
            return record
    record = cell | (foreseen(cell, records) or run_cell(cell, processes, arguments))
    with arguments.output.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(f"{cell['model']}, {cell['length']:,}, recompute {cell['recompute']}: {described(record)}", file=sys.stderr)
    return record


def foreseen(cell: dict, records: Sequence[dict]) -> dict | None:
    """Out of memory, where the memory of the tokens of a shorter length says so; else None."""
    for other in records:
        same = all(
            other[name] == cell[name] for name in ("config", "settings", "model", "micro_batch_tokens", "recompute")
        )
        times = micro_batch_tokens(cell) / micro_batch_tokens(other)
        if not same or other["length"] >= cell["length"] or times < 1:
            continue
        if other["outcome"] == OUT_OF_MEMORY:
            return {"outcome": OUT_OF_MEMORY, "foreseen_from_length": other["length"]}
        if other["outcome"] == MEASURED and other["device_bytes"]:
            needed = other["kept_bytes"] + times * (other["peak_bytes"] - other["kept_bytes"])
            if needed > 1.1 * other["device_bytes"]:
                return {"outcome": OUT_OF_MEMORY, "foreseen_from_length": other["length"], "foreseen_bytes": needed}
    return None


def micro_batch_tokens(cell: dict) -> int:
    """The tokens of a micro-batch, which holds whole sequences."""
    return max(1, cell["micro_batch_tokens"] // cell["length"]) * cell["length"]


def run_cell(cell: dict, processes: StepProcesses, arguments: argparse.Namespace) -> dict:
    """What a process of its own finds."""
    options = {f"--{name.replace('_', '-')}": cell[name] for name in CELL[2:]} | {"--seconds": arguments.seconds}
    command = [arguments.config, *cell["settings"], *(str(part) for option in options.items() for part in option)]
    try:
        exit_code, output, errors = processes.run(command, limit_s=arguments.limit_s)
    except subprocess.TimeoutExpired:
        return {"outcome": TIME_LIMIT, "limit_s": arguments.limit_s}
    lines = errors.strip().splitlines() or ["no message"]
    if exit_code == 2:  # of the config or an option: every cell's
        print(lines[-1], file=sys.stderr)
        sys.exit(2)
    if exit_code:
        print("\n".join(lines[-30:]), file=sys.stderr)
        return {"outcome": "failed", "reason": lines[-1], "exit_code": exit_code}
    return json.loads(output.strip().splitlines()[-1])


def described(record: dict) -> str:
    """A record as a cell of the table."""
    if record["outcome"] == TIME_LIMIT:
        return f"over {record['limit_s']:.0f} s"
    if record["outcome"] != MEASURED:
        return f"{record['outcome']}: {record['reason']}" if "reason" in record else record["outcome"]
    remarks = [f"{record['peak_bytes'] / GIB:.1f} GiB"] if record["peak_bytes"] else []
    remarks += ["recomputed"] if record["recompute"] != "none" else []
    return f"{record['tokens_per_s']:,.0f}" + (f" ({', '.join(remarks)})" if remarks else "")


def tables_of(records: Sequence[dict], arguments: argparse.Namespace) -> list[dict[str, dict[int, dict]]]:
    """Records of the models, lengths and levels asked for, by model and length, of each device and configuration apart.

    Of several levels the fastest is taken. What was not measured belongs to every table of its configuration.
    """
    chosen = [
        record
        for record in records
        if record["model"] in arguments.models
        and record["length"] in arguments.lengths
        and record["recompute"] in arguments.recompute
    ]
    measured = [record for record in chosen if record["outcome"] == MEASURED]
    tables = []
    for common in {json.dumps([record[name] for name in TABLE]): record for record in measured}.values():
        cells: dict[str, dict[int, dict]] = {}
        for record in sorted(chosen, key=lambda record: record.get("tokens_per_s", 0.0)):
            if all(record.get(name, common[name]) == common[name] for name in TABLE):
                cells.setdefault(record["model"], {})[record["length"]] = record
        tables.append({model: cells[model] for model in MODELS if model in cells})
    return tables


def measured_in(table: dict[str, dict[int, dict]]) -> list[dict]:
    return [record for row in table.values() for record in row.values() if record["outcome"] == MEASURED]


def print_tables(records: Sequence[dict], arguments: argparse.Namespace) -> None:
    tables = tables_of(records, arguments)
    if not tables:
        sys.exit(f"{arguments.output} holds nothing measured of {', '.join(arguments.models)}")
    for table in tables:
        lengths = sorted({length for row in table.values() for length in row})
        columns = ["tokens/s (peak memory)", "parameters", *(f"{length:,}" for length in lengths)]
        columns += [f"{lengths[-1]:,} / {lengths[0]:,}"] if len(lengths) > 1 else []
        common = measured_in(table)[0]
        settings = " ".join([common["config"], *common["settings"]])
        print(f"\n{settings}, {common['device']}, torch {common['torch']}\n")
        print(f"| {' | '.join(columns)} |\n| --- |" + " ---: |" * (len(columns) - 1))
        for model, row in table.items():
            parameters = {f"{record['parameters']:,}" for record in row.values() if "parameters" in record}
            cells = [described(row[length]) if length in row else "" for length in lengths]
            if len(lengths) > 1:
                first, last = (row.get(length, {}).get("tokens_per_s") for length in (lengths[0], lengths[-1]))
                cells.append(f"{last / first:.2f}" if first and last else "")
            print(f"| {MODELS[model]} | {', '.join(parameters)} | {' | '.join(cells)} |")
        packages = {item for record in measured_in(table) for item in record["packages"].items()}
        print(f"\n{', '.join(' '.join(item) for item in sorted(packages))}")


def plot(records: Sequence[dict], arguments: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tables = tables_of(records, arguments)
    if len(tables) != 1:
        sys.exit(
            f"{arguments.output} holds results of {len(tables)} devices or configurations: a plot is of one; move the "
            "others to another file"
        )
    matplotlib.rcParams["svg.hashsalt"] = "peers"  # the same file from the same results
    common = measured_in(tables[0])[0]
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    lengths = set()
    for model, row in tables[0].items():
        measured = sorted((r for r in row.values() if r["outcome"] == MEASURED), key=lambda r: r["length"])
        points = [(r["length"], r["tokens_per_s"]) for r in measured]
        if not points:
            continue
        lengths |= {length for length, _ in points}
        (line,) = axes.plot(*zip(*points, strict=True), label=MODELS[model])
        for point, record in zip(points, measured, strict=True):
            face = line.get_color() if record["recompute"] == "none" else "white"
            axes.plot(*point, "o", color=line.get_color(), markerfacecolor=face)
    if any(record["recompute"] != "none" for record in measured_in(tables[0])):
        axes.plot([], [], "o", color="gray", markerfacecolor="white", label="activations recomputed")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(lengths), [f"{length:,}" for length in sorted(lengths)], minor=False)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))
    axes.set(
        xlabel="tokens of a sequence", ylabel="tokens/s in training", title=f"{common['config']}, {common['device']}"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(arguments.plot, metadata={"Date": None} if arguments.plot.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
