"""The shift in plain PyTorch, which training and the Hugging Face layer run."""

import torch


def token_before(value_BSC, start_B1C):
    """Of each token the one before it, which of the first is `start`."""
    return torch.cat((start_B1C, value_BSC[:, :-1]), dim=1)
