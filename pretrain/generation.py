"""Text from a converted model."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer
from transformers.utils.logging import disable_progress_bar

from sambalm.model.hf import HFError, load_for_generation


def generate_text(
    folder: Path,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    write: Callable[[str], None],
) -> None:
    """Writes the prompt and its continuation, in pieces as they are generated, on the GPU where there is one.

    Args:
        temperature: of the sampling; 0 takes the likeliest token each time.

    Raises:
        HFError: the folder holds no usable model, or the prompt no token.
    """
    disable_progress_bar()  # transformers' own, for loading a few files
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_for_generation(folder, device=device)
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    if not inputs["input_ids"].numel():
        raise HFError("the prompt is empty: give at least one character to go on from")
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    torch.manual_seed(seed)
    model.generate(**inputs, **sampling, max_new_tokens=max_new_tokens, streamer=_Writer(tokenizer, write))


class _Writer(TextStreamer):
    """Hands finished text on instead of printing it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._write(text)
