"""The shift in plain PyTorch, which training and the Hugging Face layer run."""

import torch


def token_before(value_BSC, start_B1C):
    """The token before each token; before the first it is `start`."""
    return torch.cat((start_B1C, value_BSC[:, :-1]), dim=1)
