"""What a model is asked to generate, and what is written of it, with a model and a tokenizer that are played."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sambalm.model.hf import HFError
from sambalm.pretrain import generation
from sambalm.pretrain.generation import generate_text


class Letters:
    """A tokenizer of a letter an id; 0 is the end of a text."""

    def __call__(self, text, return_tensors):
        ids = torch.tensor([[ord(letter) for letter in text]], dtype=torch.int64)
        return Inputs(input_ids=ids)

    def decode(self, ids, skip_special_tokens=False, **_):
        return "".join("</s>" if i == 0 else chr(i) for i in ids if i or not skip_special_tokens)


class Inputs(dict):
    def to(self, device):
        return self


@pytest.fixture
def generated(monkeypatch):
    """Generates ' b' after a prompt; returns what was written and what the model was asked for."""

    def run(prompt="a", **options):
        asked, written = {}, []

        def generate(streamer, input_ids, **named):
            asked.update(named, drawn=torch.rand(()).item())
            for ids in (input_ids, torch.tensor([ord(" ")]), torch.tensor([ord("b")]), torch.tensor([0])):
                streamer.put(ids.cpu())
            streamer.end()

        model = SimpleNamespace(generate=generate)
        monkeypatch.setattr(generation, "load_for_generation", lambda folder, device: (model, Letters()))
        settings = {"max_new_tokens": 3, "temperature": 0.0, "top_p": 0.5, "seed": 9} | options
        generate_text(Path("folder"), prompt, write=written.append, **settings)
        return "".join(written), asked

    return run


def test_the_prompt_and_its_continuation_are_written_without_special_tokens(generated):
    text, asked = generated()
    assert text == "a b"
    assert asked.pop("drawn") is not None
    assert asked == {"do_sample": False, "max_new_tokens": 3}


def test_sampling_depends_on_the_seed_alone(generated):
    (_, once), (_, again), (_, other) = (generated(temperature=0.25, seed=seed) for seed in (1, 1, 2))
    assert once == again
    assert once["drawn"] != other["drawn"]
    once.pop("drawn")
    assert once == {"do_sample": True, "temperature": 0.25, "top_p": 0.5, "max_new_tokens": 3}


def test_an_empty_prompt_is_refused(generated):
    with pytest.raises(HFError, match="the prompt is empty"):
        generated("")
