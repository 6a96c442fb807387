"""The optimizers in transformers' Trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from dreamlora.optimizers import ScaledAdamW, lora_param_groups
from tests.optimizers.language_models import CLASSES, RATES, VOCABULARY, assert_same, gpt2, optimizer_of


class Sentences(torch.utils.data.Dataset):
    """The same 16 sentences, every time."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(VOCABULARY, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def trainer_of(model, folder: Path, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    return transformers.Trainer(model, arguments, train_dataset=Sentences(), **options)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_the_trainer_takes_an_optimizer_and_resumes_to_the_bit(cls, tmp_path):
    models = [gpt2(layers=1) for _ in range(3)]
    trainers = [trainer_of(model, tmp_path, optimizers=(optimizer_of(cls, model), None)) for model in models[:2]]
    trainers[0].train()
    rates = [row["learning_rate"] for row in trainers[0].state.log_history if "loss" in row]
    rate = RATES.get(cls.__name__, 1e-2)
    assert rates == pytest.approx([rate, rate * 3 / 4, rate / 2, rate / 4])
    trainers[1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(*models[:2])
    settings = {"params": lora_param_groups(models[2], fallback_lr=1e-2), "lr": rate}
    trainer_of(models[2], tmp_path / "other", optimizer_cls_and_kwargs=(cls, settings)).train()
    assert_same(models[0], models[2])


def test_groups_of_the_trainers_own_say_nothing_of_pairs(tmp_path):
    trainer = trainer_of(gpt2(layers=1), tmp_path, optimizer_cls_and_kwargs=(ScaledAdamW, {"lr": 1e-2}))
    with pytest.raises(ValueError, match=r"pass lora_param_groups\(model\)"):
        trainer.train()
