"""Options of the commands that load a model: where it computes, in what, and which of a run's checkpoints it is."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Dtype(StrEnum):
    """Dtype of the weights while they are used."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"

    @property
    def given(self) -> str | None:
        """The name of the dtype; None: the source's own."""
        return None if self is Dtype.auto else self.value


DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: the GPU if there is one.")]
DtypeOption = Annotated[
    Dtype, typer.Option(help="Precision of the weights; auto: as stored, or on a GPU as the run trained.")
]
TokenizerOption = Annotated[Path | None, typer.Option(help="A tokenizer's file; default: the source's.")]
StepOption = Annotated[
    int | None, typer.Option(min=0, help="The step of a run's checkpoint; default: the newest good one's.")
]
