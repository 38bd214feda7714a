"""The dtypes of `train.precision`, apart from the config so that reading one needs no torch."""

import torch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
