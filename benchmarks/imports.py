"""CPU seconds that a rank's start takes for imports, by what is imported.

    python benchmarks/imports.py

Fresh processes import, in this order, PyTorch, megatron-core, DeepSpeed, what `sambalm train` has besides, and
PyTorch's compiler, which `torch.optim` imports in the first step of any optimizer. What one imports is there for the
next.
"""

import argparse
import statistics
import subprocess
import sys

STAGES = {
    "PyTorch": "torch.distributed",
    "megatron-core": "sambalm.parallel.compat.megatron_core",
    "DeepSpeed": "sambalm.parallel.zero.deepspeed_adapter",
    "sambalm, pydantic, typer and others": "sambalm.pretrain.cli, sambalm.pretrain.trainer",
    "PyTorch's compiler": "torch._dynamo",
}


def measure() -> list[float]:
    """CPU seconds of each stage, in a fresh process."""
    lines = ["import time"]
    for modules in STAGES.values():
        lines += ["start_s = time.process_time()", f"import {modules}", "print(time.process_time() - start_s)"]
    command = [sys.executable, "-W", "ignore", "-c", "\n".join(lines)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [float(line) for line in output.splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=5, help="of which the medians are printed")
    options = parser.parse_args()
    medians = [statistics.median(times) for times in zip(*(measure() for _ in range(options.processes)), strict=True)]
    print("| imported | CPU seconds |")
    print("| --- | ---: |")
    for name, seconds in [*zip(STAGES, medians, strict=True), ("all", sum(medians))]:
        print(f"| {name} | {seconds:.2f} |")


if __name__ == "__main__":
    main()
