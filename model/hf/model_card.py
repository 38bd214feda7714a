"""The README.md of an exported model: what is known of it and how to load it, and nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass

from sambalm.model.registry import mixers_of

from .configuration_samba import SambaConfig
from .mixers import fp32_tensors
from .names import hf_side


@dataclass(frozen=True)
class TrainingFacts:
    """What the exporter knows of the training; None and empty are left out of the card."""

    tokens_seen: int | None = None
    step: int | None = None
    loss: float | None = None
    sequence_tokens: int | None = None  # length of the training sequences
    settings: Sequence[str] = ()  # lines of the training configuration to show, such as "peak learning rate: 4e-4"


def model_card(config: SambaConfig, facts: TrainingFacts, *, parameters: int, dtype: str) -> str:
    """The card's Markdown. parameters counts a tied embedding once."""
    sections = [_HEADER, *_architecture(config, parameters=parameters, dtype=dtype), "", *_training(facts)]
    return "\n".join([*sections, "", _USE, _fla(config), "", _LICENSE, ""])


def _architecture(config: SambaConfig, *, parameters: int, dtype: str) -> list[str]:
    tied = "tied" if config.tie_word_embeddings else "untied"
    mixers = mixers_of(config.pattern or "")  # which is never empty once the config is made
    fp32 = [f"{one.name}'s {name}" for one in mixers for name in fp32_tensors(one.letter)]
    exceptions = f" ({', '.join(fp32)} in float32)" if fp32 else ""
    return [
        "## Architecture",
        "",
        f"- layer pattern: `{config.pattern}`",
        *(f"- `{one.letter}`: {hf_side(one.letter).describe(config) or one.name}" for one in mixers),
        f"- parameters: {parameters:,}, stored in {dtype}{exceptions}",
        f"- hidden size {config.hidden_size}, vocabulary {config.vocab_size} ({tied} embeddings)",
    ]


def _training(facts: TrainingFacts) -> list[str]:
    known = {
        "optimizer steps": None if facts.step is None else f"{facts.step:,}",
        "tokens seen": None if facts.tokens_seen is None else f"{facts.tokens_seen:,}",
        "training loss at that step": None if facts.loss is None else f"{facts.loss:.4f}",
        "tokens in a training sequence": None if facts.sequence_tokens is None else f"{facts.sequence_tokens:,}",
    }
    lines = [f"- {name}: {value}" for name, value in known.items() if value is not None]
    lines += [f"- {setting}" for setting in facts.settings]
    return ["## Training", "", *(lines or ["Not recorded."])]


def _fla(config: SambaConfig) -> str:
    if config.fla_compatible:
        return "Names and configuration are those of flash-linear-attention's `samba`."
    return f"flash-linear-attention's `samba` cannot load this folder. {config.fla_obstacle}"


_HEADER = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- samba
- mamba
---

# Samba language model

A language model of the Samba family ([arXiv 2406.07522](https://arxiv.org/abs/2406.07522)), whose layers come in the
pattern below.
"""

_USE = """## Use

With the code that lies in this folder (read it first; it needs PyTorch and transformers 5.10 or newer):

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0], skip_special_tokens=True))
```

With the package `sambalm` installed, no code of the folder is executed:

```python
from sambalm.model.hf import load_for_generation

model, tokenizer = load_for_generation("FOLDER")
```

The tokenizer adds neither BOS nor EOS, and a literal `</s>` in a text stays text
(`tokenizer.split_special_tokens = False` changes the latter).
"""

_LICENSE = """## License

See the training data."""
