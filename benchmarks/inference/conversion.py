"""Memory and time of converting a config's shapes to a Hugging Face folder and back, each by the program itself.

    python benchmarks/inference/conversion.py configs/samba_3.8b.yaml --tokenizer tokenizer.model \\
        --documents 'text/*.jsonl' --folder /tmp/conversion --precision bf16

Weights are random, as training would begin with them. Both conversions verify themselves. Their tensors are compared
with the random ones besides. What was written is removed at the end: it takes 4 bytes of disk a parameter for each
checkpoint, and 2 or 4 for the folder. Memory is the largest resident size, which counts pages of mapped files.
"""

import argparse
import hashlib
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from sambalm.model.config import ModelConfig
from sambalm.model.hf.folder import FolderState
from sambalm.model.hf.generate import load_config as load_hf_config
from sambalm.model.samba import Samba
from sambalm.parallel.sharding import canonical_slices
from sambalm.pretrain.checkpointing.format import newest_checkpoint
from sambalm.pretrain.checkpointing.from_hf import write_checkpoint
from sambalm.pretrain.config_file import load_config

PROGRAM = (sys.executable, "-m", "sambalm.pretrain.cli", "convert")


class RandomState:
    """Canonical tensors, drawn anew whenever one is read."""

    def __init__(self, config: ModelConfig) -> None:
        with torch.device("meta"):
            self._pieces = {name: piece for name, _, piece in canonical_slices(Samba(config))}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(piece.shape) for name, piece in self._pieces.items()}

    def read(self, name: str) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
        whole = torch.empty(self._pieces[name].shape)
        with torch.no_grad():
            self._pieces[name].init(whole, torch.Generator().manual_seed(seed))
        return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a run's config, followed by overrides")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--documents", required=True)
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--folder", type=Path, required=True, help="which does not exist, and will not at the end")
    arguments, overrides = parser.parse_known_intermixed_args()
    config = load_config(arguments.config, overrides).model
    arguments.folder.mkdir(parents=True)
    try:
        convert(config, arguments)
    finally:
        shutil.rmtree(arguments.folder)


def convert(config: ModelConfig, arguments: argparse.Namespace) -> None:
    state = RandomState(config)
    made, folder, again = (arguments.folder / name for name in ("made", "hf", "again"))
    write_checkpoint(made, state, config, progress=lambda done, total: None)
    print(f"{sum(map(math.prod, state.shapes().values())):,} parameters\n")
    print("| | peak GiB | wall, s | processor, s |\n| --- | ---: | ---: | ---: |", flush=True)
    texts = ("--tokenizer", arguments.tokenizer, "--documents", arguments.documents)
    timed("to-hf", made, folder, "--precision", arguments.precision, *texts)
    shutil.rmtree(made)
    timed("from-hf", folder, again)
    checkpoint = newest_checkpoint(again, warn=print)
    stored = FolderState(folder, load_hf_config(folder))
    changed = 0
    for name in state.shapes():
        whole, widened = checkpoint.read(name), stored.read(name)
        assert torch.equal(whole, widened), f"{name} is not the folder's"
        changed += not torch.equal(whole, state.read(name))
    print(f"\n{len(state.shapes())} tensors came back as the folder has them, {changed} of them rounded")


def timed(command: str, *arguments: str | Path) -> None:
    began_s = time.perf_counter()
    process = subprocess.Popen([*PROGRAM, command, *map(str, arguments)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} failed")
    cells = (usage.ru_maxrss / 2**20, time.perf_counter() - began_s, usage.ru_utime + usage.ru_stime)
    print(f"| {command} | {cells[0]:.2f} | {cells[1]:,.0f} | {cells[2]:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
