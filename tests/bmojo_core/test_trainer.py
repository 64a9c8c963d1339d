"""transformers' own Trainer trains the model: nobody needs our loop."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from bmojo_core import BMojoConfig, BMojoForCausalLM
from bmojo_core.training import adamw

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")


def test_twenty_steps_of_the_trainer(tmp_path):
    torch.manual_seed(0)
    config = BMojoConfig.bmojo(
        vocab_size=16, hidden_size=16, num_layers=1, num_heads=2, window=4, state_size=4,
        num_eidetic_tokens=2,
    )  # fmt: skip
    model = BMojoForCausalLM(config)
    row = torch.arange(24).remainder(5)
    data = [{"input_ids": row, "labels": row} for _ in range(80)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=20, per_device_train_batch_size=4, use_cpu=True, report_to=[],
        logging_steps=1, save_steps=20, disable_tqdm=True, gradient_checkpointing=True,
        lr_scheduler_type="constant", seed=0,
    )  # fmt: skip
    optimizer = adamw(model, 2e-2, 1e-2)
    trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.5
    assert sorted({g["lr"] for g in optimizer.param_groups}) == [1e-2, 2e-2]
    again = BMojoForCausalLM.from_pretrained(tmp_path / "checkpoint-20")
    for (name, a), b in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b), name
