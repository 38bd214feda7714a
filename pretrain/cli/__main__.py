"""`python -m sambalm.pretrain.cli`, as torchrun starts it."""

from sambalm.pretrain.cli import main

main()
