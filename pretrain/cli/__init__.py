"""The program `sambalm`. This file imports next to nothing, so that Ctrl-C finds it ready from the start."""

from sambalm.pretrain.cli.interrupts import heeding_ctrl_c


def main() -> None:
    """Runs the program to its end, or to Ctrl-C."""
    with heeding_ctrl_c() as interrupts:
        from sambalm.pretrain.cli.app import run

        run(interrupts)
