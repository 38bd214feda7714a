"""Fine-tuning an exported folder with other projects' real packages, in the environment of `make test-finetuning`."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from sambalm.model.hf import SambaForCausalLM, load_for_generation
from tests.hf.test_modeling import largest_difference

REASON = "`make test-finetuning` makes an environment that has it"
accelerate, datasets, peft, trl = (
    pytest.importorskip(name, reason=REASON) for name in ("accelerate", "datasets", "peft", "trl")
)
pytestmark = pytest.mark.filterwarnings("ignore")
COMMON = {
    **{"report_to": [], "use_cpu": True, "seed": 3, "learning_rate": 1e-2, "per_device_train_batch_size": 2},
    **{"save_steps": 2, "logging_steps": 1, "disable_tqdm": True},
}


@pytest.fixture
def loaded(exported):
    """(folder, model, tokenizer)"""
    folder, *_ = exported
    return folder, *load_for_generation(folder)


def logits(model, tokenizer) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tokenizer("import os, sys", return_tensors="pt").input_ids).logits


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_trains_evaluates_and_resumes_to_the_same_bits(loaded, documents, tmp_path):
    _, first, tokenizer = loaded
    rows = [{"input_ids": tokenizer.encode(text[: 200 + 40 * number])} for number, text in enumerate(documents[:12])]
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=4, **COMMON)

    def trainer(model):
        collate = DataCollatorWithFlattening()
        return Trainer(model, arguments, collate, train_dataset=rows, eval_dataset=rows[:4], processing_class=tokenizer)

    whole = trainer(copy.deepcopy(first))
    before = whole.evaluate()["eval_loss"]
    whole.train()
    assert whole.evaluate()["eval_loss"] < before - 0.3
    resumed = trainer(first)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    wanted, found = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    again, _ = load_for_generation(tmp_path / "checkpoint-4")
    assert torch.equal(logits(again, tokenizer), logits(whole.model, tokenizer))


def sft(model, tokenizer, documents, folder, **options):
    texts = datasets.Dataset.from_list(
        [{"text": text[: 100 + 30 * number]} for number, text in enumerate(documents[:16])]
    )
    # TRL's own default is bf16, in which a trained model goes on computing.
    arguments = trl.SFTConfig(output_dir=str(folder), max_steps=8, max_length=256, packing=True, bf16=False, **COMMON)
    return trl.SFTTrainer(model, arguments, train_dataset=texts, processing_class=tokenizer, **options)


def test_sft_packs_documents_that_do_not_see_each_other(loaded, documents, tmp_path):
    _, model, tokenizer = loaded
    trainer = sft(model, tokenizer, documents, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) > 2
    sums, count = 0.0, 0
    with torch.no_grad():
        packed = model.eval()(**batch).loss
        for start, end in zip(starts, [*starts[1:], batch["input_ids"].shape[1]], strict=True):
            alone = batch["input_ids"][:, start:end]
            sums += F.cross_entropy(model(alone).logits[0, :-1], alone[0, 1:], reduction="sum").item()
            count += end - start - 1
        together = model(batch["input_ids"], labels=batch["labels"]).loss
    assert packed.item() == pytest.approx(sums / count, abs=1e-5)
    assert together.item() != pytest.approx(sums / count, abs=1e-3)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.3


def test_lora_on_all_linear_layers_is_kept_merged_and_generates(loaded, documents, tmp_path):
    folder, model, tokenizer = loaded
    base = logits(model, tokenizer)
    trainer = sft(
        model, tokenizer, documents, tmp_path / "run", peft_config=peft.LoraConfig(r=8, target_modules="all-linear")
    )
    trainer.train()
    trained = {
        name.split(".lora_")[0].rsplit(".", 1)[-1] for name, p in trainer.model.named_parameters() if p.requires_grad
    }
    assert trained == {
        *("in_proj", "x_proj", "dt_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    trainer.save_model(tmp_path / "adapter")
    tuned = logits(trainer.model, tokenizer)
    assert largest_difference(tuned, base) > 1e-2
    again = peft.PeftModel.from_pretrained(load_for_generation(folder)[0], tmp_path / "adapter")
    assert largest_difference(logits(again, tokenizer), tuned) == 0
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    model, own = load_for_generation(tmp_path / "merged")
    assert largest_difference(logits(model, own), tuned) < 1e-4


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_accelerate_offloads_a_model_that_generates(loaded, tmp_path, place):
    folder, model, tokenizer = loaded
    ids = tokenizer("import os, sys", return_tensors="pt").input_ids
    wanted = model.generate(ids, max_new_tokens=8, do_sample=False)
    if place == "cpu":
        offloaded = accelerate.cpu_offload(
            SambaForCausalLM.from_pretrained(folder), execution_device=torch.device("cpu")
        )
    else:
        offloaded = SambaForCausalLM.from_pretrained(
            folder, device_map="auto", max_memory={"cpu": 400_000}, offload_folder=str(tmp_path)
        )
        assert {str(where) for where in offloaded.hf_device_map.values()} == {"cpu", "disk"}
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    assert torch.equal(offloaded.generate(ids, max_new_tokens=8, do_sample=False), wanted)
