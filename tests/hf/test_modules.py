"""Weights are reached through their modules, so that offloading hooks and adapters work; with the real packages too."""

import copy

import pytest
import torch
from torch import nn

from sambalm.model.hf.modeling_samba import SambaForCausalLM
from tests.hf.test_modeling import largest_difference, model_of
from tests.support.hf import random_tokens


def offload(model: nn.Module) -> None:
    """Leaves each module's own weights on the meta device but while its forward runs, as accelerate does."""
    for module in list(model.modules()):
        own = {name: parameter.detach() for name, parameter in module.named_parameters(recurse=False)}
        if not own:
            continue

        def bring(module, _, own=own):
            for name, weight in own.items():
                module._parameters[name] = nn.Parameter(weight, requires_grad=False)

        def send_away(module, *_, own=own):
            for name, weight in own.items():
                module._parameters[name] = nn.Parameter(weight.to("meta"), requires_grad=False)

        send_away(module)
        module.register_forward_pre_hook(bring)
        module.register_forward_hook(send_away)


def test_no_layer_reads_the_weights_of_a_module_that_it_does_not_call():
    model, tokens = model_of(tie_embeddings=False), random_tokens(2, 20)
    with torch.no_grad():
        expected = model(tokens).logits
        offload(model)
        assert {p.device.type for p in model.parameters()} == {"meta"}
        assert torch.equal(model(tokens).logits, expected)
        generated = model.generate(tokens, max_new_tokens=4, do_sample=False)
    assert generated.shape == (2, 24)


class Adapted(nn.Module):
    """A projection and what an adapter adds to it."""

    def __init__(self, base: nn.Module, factor: nn.Module) -> None:
        super().__init__()
        self.base, self.factor = base, factor

    def forward(self, x, **options):
        return self.base(x, **options) + self.factor(x)


def test_adapters_of_convolution_and_step_projection_learn():
    model, tokens = model_of(), random_tokens(2, 20)
    expected = model(tokens).logits
    mixer = model.backbone.layers[0].mixer
    mixer.conv1d = Adapted(mixer.conv1d, nn.Conv1d(64, 64, 4, bias=False))
    mixer.dt_proj = Adapted(mixer.dt_proj, nn.Linear(2, 64, bias=False))
    logits = model(tokens).logits
    assert largest_difference(logits, expected) > 1e-3
    logits.sum().backward()
    for factor in (mixer.conv1d.factor, mixer.dt_proj.factor):
        assert factor.weight.grad.abs().max() > 0


@pytest.mark.parametrize("places", ["cpu", "disk"])
def test_accelerate_offloads(places, tmp_path):
    pytest.importorskip("accelerate")
    model, tokens = model_of(tie_embeddings=False), random_tokens(2, 20)
    model.save_pretrained(tmp_path / "model")
    names = ["backbone.embeddings", *(f"backbone.layers.{i}" for i in range(4)), "backbone.norm_f", "lm_head"]
    device_map = dict.fromkeys(names, "cpu") | {"backbone.layers.0": places, "backbone.layers.2": places}
    again = SambaForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=str(tmp_path / "offloaded")
    )
    if places == "cpu":
        from accelerate import cpu_offload

        cpu_offload(again, execution_device=torch.device("cpu"))
        assert again.backbone.layers[0].mixer.conv1d.weight.device.type == "meta"
    with torch.no_grad():
        assert largest_difference(again(tokens).logits, model(tokens).logits) < 1e-6


def test_lora_learns_on_dt_proj_and_conv1d():
    peft = pytest.importorskip("peft")
    model, tokens = copy.deepcopy(model_of("M-")), random_tokens(2, 20)
    config = peft.LoraConfig(r=64, target_modules=["dt_proj", "conv1d", "in_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    expected = adapted(tokens).logits
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # the second factors are zero at first
        optimizer.zero_grad()
        adapted(tokens, labels=tokens).loss.backward()
        optimizer.step()
    for name, parameter in adapted.named_parameters():
        assert not parameter.requires_grad or parameter.grad.abs().max() > 0, name
    assert largest_difference(adapted(tokens).logits, expected) > 1e-4


def test_trainer_trains_evaluates_and_predicts(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

    model = model_of("M-*-")
    rows = [{"input_ids": random_tokens(1, length, seed=length)[0].tolist()} for length in (20, 7, 13, 9)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True
    )
    trainer = Trainer(model, arguments, DataCollatorWithFlattening(), train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
