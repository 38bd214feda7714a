"""Text from a converted model."""

from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import torch
from transformers import TextIteratorStreamer
from transformers.utils.logging import disable_progress_bar

from sambalm.model.hf import load_for_generation


def generate_text(
    folder: Path, prompt: str, *, max_new_tokens: int, temperature: float, top_p: float, seed: int
) -> Iterator[str]:
    """The prompt and its continuation, in pieces as they are generated, on the GPU where there is one.

    Raises:
        HFError: the folder holds no usable model.
    """
    disable_progress_bar()  # one of its own for loading a few files
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_for_generation(folder, device=device)
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    torch.manual_seed(seed)
    arguments = {**inputs, **sampling, "max_new_tokens": max_new_tokens, "streamer": streamer}
    Thread(target=model.generate, kwargs=arguments, daemon=True).start()
    yield from streamer
