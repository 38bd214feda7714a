"""What comparing the weights that several ranks hold costs training (`checks.replicas_every_steps`).

    python benchmarks/replicas.py configs/demo.yaml --ranks 2 parallel='{zero_stage: 1}'
    python benchmarks/replicas.py configs/samba_421m.yaml --gpus 2 train.global_batch_tokens=65536 \
        train.micro_batch_size=4

Steps take random tokens. `alone` is a comparison, or on a single rank, which has nobody to compare with, the hashes of
its weights, with nothing beside it. `in a step` is by how much steps with a comparison take longer than those
without, which are taken in turn. The share is that of the slower of both in as many steps as the config has
between comparisons.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from checkpoint import TIMEOUT_S, WARM_UP_STEPS, Steps

from sambalm.model.registry import weight_copies
from sambalm.parallel.groups import World, start_world
from sambalm.parallel.replicas import CHUNK, Replicas, position_factors, weights_hash
from sambalm.pretrain.config_file import load_config
from sambalm.pretrain.local_ranks import run_ranks
from sambalm.pretrain.training import Training, build_training

ALONE = 10  # comparisons that are timed together


def measure(path: str, overrides: list[str], steps: int) -> dict[str, float]:
    """One rank's medians of seconds."""
    config = load_config(Path(path), [*overrides, "run.dir=unused", "data.train=unused"])
    copies = weight_copies(config.model, tensor_ranks=config.parallel.tensor)
    with start_world(config.parallel, copies=copies) as world:
        training = build_training(config, world=world, checkpoint=None)
        compare, elements = comparison(training, world=world)
        timed, now = Steps(config, training, world=world), [False]
        training.executor.guard.before_update.append(lambda: compare() if now[0] else None)
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for number in range(WARM_UP_STEPS + 2 * steps):
            now[0] = number % 2 == 1
            taken_s = timed.take()
            if number >= WARM_UP_STEPS:
                seconds[now[0]].append(taken_s)
        without_s, with_s = (statistics.median(seconds[key]) for key in (False, True))
        alone_s = time_alone(compare, world=world)
        training.executor.close()
    return {"step": without_s, "added": with_s - without_s, "alone": alone_s, "elements": elements}


def comparison(training: Training, *, world: World) -> tuple[Callable[[], object], int]:
    """Returns what a check does on the device, and how many numbers of this rank it reads."""
    replicas = Replicas(training.chunks, world=world)
    if replicas.any:
        return replicas.compare, replicas.elements
    weights = [parameter.detach() for chunk in training.chunks for parameter in chunk.parameters()]
    factors = position_factors(CHUNK[world.device.type], device=world.device)
    return lambda: [weights_hash(weight, factors) for weight in weights], sum(weight.numel() for weight in weights)


def time_alone(compare: Callable[[], object], *, world: World) -> float:
    def wait() -> None:
        world.barrier()
        if world.device.type == "cuda":
            torch.cuda.synchronize()

    compare()
    wait()
    start_s = time.perf_counter()
    for _ in range(ALONE):
        compare()
    wait()
    return (time.perf_counter() - start_s) / ALONE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--ranks", type=int, default=1, help="on the CPU")
    parser.add_argument("--gpus", type=int, default=0, help="a rank each, instead")
    parser.add_argument("--steps", type=int, default=20, help="of each kind, in turn")
    arguments, overrides = parser.parse_known_args()
    ranks, on_gpus = arguments.gpus or arguments.ranks, bool(arguments.gpus)
    config = load_config(Path(arguments.config), [*overrides, "run.dir=unused", "data.train=unused"])
    if config.checks.replicas_every_steps is None:
        parser.error("checks.replicas_every_steps is null: give the steps between comparisons")
    values = (arguments.config, overrides, arguments.steps)
    results = run_ranks(measure, *values, ranks=ranks, timeout_s=TIMEOUT_S, on_gpus=on_gpus)
    print_table(results, every_steps=config.checks.replicas_every_steps)


def print_table(results: list[dict[str, float]], *, every_steps: int) -> None:
    """Prints the slowest rank's times."""
    step_s, added_s, alone_s, elements = (
        max(result[key] for result in results) for key in ("step", "added", "alone", "elements")
    )
    share = max(added_s, alone_s) / (every_steps * step_s)
    print(f"{elements / 1e6:.1f}M numbers a rank, {len(results)} ranks, a step takes {1e3 * step_s:.1f} ms")
    print(f"| alone (ms) | in a step (ms) | of a step | of training, every {every_steps} steps |")
    print("| ---: | ---: | ---: | ---: |")
    print(f"| {1e3 * alone_s:.2f} | {1e3 * added_s:.2f} | {max(added_s, alone_s) / step_s:.2%} | {share:.4%} |")


if __name__ == "__main__":
    main()
