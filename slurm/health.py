"""Whether the nodes of a job are fit to train, asked before each attempt by slurm/common.sh.

    srun --ntasks-per-node=1 ... python -m sambalm.slurm.health node FOLDER RUN_DIR     each node on its own
    python -m sambalm.slurm.agent ... sambalm.slurm.health links FOLDER                all ranks together
    python -m sambalm.slurm.health pick ATTEMPT_DIR NEEDED NODE...                     prints the good nodes

Limits come from the cluster's file (configs/clusters/*.env): RANKS_PER_NODE, MIN_GPU_FREE_GIB, MIN_DISK_FREE_GIB,
MIN_NODE_GB_PER_S, MIN_PAIR_GB_PER_S. A node that says nothing counts as bad.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

GIB = 2**30
FREE_SHARE = 0.9  # of a GPU's memory, which a stray process would take
LINK_TIMEOUT_S = 120
WARM_UPS, ROUNDS = 2, 5


def check_node(run_dir: Path) -> str | None:
    """What is wrong with this node on its own; None when nothing is."""
    minimum_gib = _limit("MIN_DISK_FREE_GIB")
    for folder in (run_dir, Path(os.environ.get("TMPDIR", "/tmp"))):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".health.{os.environ['SLURMD_NODENAME']}.{os.getpid()}"
            with probe.open("wb") as file:
                file.write(os.urandom(1 << 20))
                os.fsync(file.fileno())
            probe.unlink()
        except OSError as error:
            return f"{folder} cannot be written: {error.strerror}"
        free_gib = shutil.disk_usage(folder).free / GIB
        if free_gib < minimum_gib:
            return f"{folder} has {free_gib:.1f} GiB free, of MIN_DISK_FREE_GIB={minimum_gib:g}"
    return _check_gpus() if os.environ.get("SLURM_GPUS_ON_NODE") and _gpu_limit() != 0 else None


def _check_gpus() -> str | None:
    import torch

    wanted, limit_gib = int(os.environ["RANKS_PER_NODE"]), _gpu_limit()
    if torch.cuda.device_count() < wanted:
        return f"{torch.cuda.device_count()} GPUs are visible, of RANKS_PER_NODE={wanted}"
    for device in range(wanted):
        free_gib, total_gib = (size / GIB for size in torch.cuda.mem_get_info(device))
        if limit_gib is None and free_gib < FREE_SHARE * total_gib:
            return f"GPU {device} has {free_gib:.1f} GiB free, less than nine tenths of its {total_gib:.1f}"
        if limit_gib is not None and free_gib < limit_gib:
            return f"GPU {device} has {free_gib:.1f} GiB free, of MIN_GPU_FREE_GIB={limit_gib:g}"
    return None


def check_links(folder: Path) -> None:
    """All-reduces within each node, and between each node and both its neighbours; a node is as good as its better one.

    Collective over the ranks of a torchrun world. Writes a file for each node.
    """
    import torch
    import torch.distributed as dist

    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(seconds=LINK_TIMEOUT_S))
    per_node, node = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["GROUP_RANK"])
    nodes = dist.get_world_size() // per_node
    tensor = torch.ones((64 if gpu else 1) * 2**20, device="cuda" if gpu else "cpu")
    within = _bandwidths([[node] for node in range(nodes)], tensor, per_node).get(node)
    between = [_bandwidths(pairs, tensor, per_node).get(node) for pairs in (_pairs(nodes, 0), _pairs(nodes, 1))]
    problem = _too_slow("MIN_NODE_GB_PER_S", within) or _too_slow(
        "MIN_PAIR_GB_PER_S", max(filter(None, between), default=None)
    )
    if os.environ["LOCAL_RANK"] == "0":
        write_result(folder, problem, node_gb_per_s=within, pair_gb_per_s=between)
    dist.barrier()
    dist.destroy_process_group()


def _pairs(nodes: int, first: int) -> list[list[int]]:
    """Neighbours, from node `first` on; the last is paired with the one before the start where one is left over."""
    ring = [*range(first, nodes), *range(first)]
    return [ring[n : n + 2] for n in range(0, nodes - 1, 2)]


def _bandwidths(groups: Sequence[Sequence[int]], tensor: "torch.Tensor", per_node: int) -> dict[int, float]:
    """GB/s that each rank sends in an all-reduce within its group of nodes, by node; groups run at the same time."""
    import torch
    import torch.distributed as dist

    members = [[node * per_node + local for node in group for local in range(per_node)] for group in groups]
    made = [dist.new_group(ranks) for ranks in members]
    mine = [number for number, ranks in enumerate(members) if dist.get_rank() in ranks]
    if not mine or len(members[mine[0]]) == 1:
        return {}
    group, ranks = made[mine[0]], len(members[mine[0]])
    for repeat in range(WARM_UPS + ROUNDS):
        if repeat == WARM_UPS:
            _wait(tensor)
            start_s = time.perf_counter()
        dist.all_reduce(tensor, group=group, op=dist.ReduceOp.MAX)
    _wait(tensor)
    seconds = (time.perf_counter() - start_s) / ROUNDS
    sent_bytes = 2 * (ranks - 1) / ranks * tensor.nbytes
    assert torch.all(tensor[:8] == 1)
    return {node: sent_bytes / seconds / 1e9 for node in groups[mine[0]]}


def _wait(tensor: "torch.Tensor") -> None:
    if tensor.is_cuda:
        import torch

        torch.cuda.synchronize()


def _too_slow(limit: str, gb_per_s: float | None) -> str | None:
    if gb_per_s is None or gb_per_s >= _limit(limit):
        return None
    return f"an all-reduce reached {gb_per_s:.2f} GB/s, of {limit}={_limit(limit):g}"


def _gpu_limit() -> float | None:
    """The free memory in GiB that each GPU must have; None: FREE_SHARE of its own."""
    given = os.environ.get("MIN_GPU_FREE_GIB")
    return float(given) if given else None


def _limit(name: str) -> float:
    return float(os.environ.get(name) or 0)


def write_result(folder: Path, problem: str | None, **measured: object) -> None:
    """This node's answer."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{os.environ['SLURMD_NODENAME']}.json"
    draft = path.with_suffix(".partial")
    draft.write_text(json.dumps({"problem": problem, **measured}))
    os.replace(draft, path)


def find_problems(attempt: Path, nodes: Sequence[str]) -> dict[str, str]:
    """Nodes and what is wrong with each."""
    found = {}
    for node in nodes:
        answers = [attempt / check / f"{node}.json" for check in ("health", "links")]
        problems = [json.loads(path.read_text())["problem"] for path in answers if path.exists()]
        if problem := next(filter(None, problems), None if problems else "no answer"):
            found[node] = problem
    return found


def pick(attempt: Path, needed: int, nodes: Sequence[str]) -> list[str]:
    """The good nodes, in order; bad ones are reported, and added to attempt/bad_nodes. Exits with 1 for too few."""
    bad = find_problems(attempt, nodes)
    for node, problem in bad.items():
        print(f"node {node} is left out: {problem}", file=sys.stderr)
    if bad:
        with (attempt / "bad_nodes").open("a") as file:
            file.writelines(f"{node}\n" for node in bad)
    good = [node for node in nodes if node not in bad]
    if len(good) < needed:
        print(f"{len(good)} of {len(nodes)} nodes are fit to train, and {needed} are needed", file=sys.stderr)
        sys.exit(1)
    return good


def main() -> None:
    what, folder, *arguments = sys.argv[1:]
    if what == "node":
        write_result(Path(folder), check_node(Path(arguments[0])))
    elif what == "links":
        check_links(Path(folder))
    else:
        needed, *nodes = arguments
        print(",".join(pick(Path(folder), int(needed), nodes)))


if __name__ == "__main__":
    main()
