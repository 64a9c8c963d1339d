"""lm-evaluation-harness reads a saved folder through its own model class, offline."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bmojo_core import BMojoConfig, BMojoForCausalLM
from bmojo_core.evaluation.harness import run_tasks

TASK = """
task: three_animals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1}}
"""
QUESTIONS = [
    {"question": "a cow says", "choices": [" moo", " bark", " miau"], "answer": 0},
    {"question": "a dog says", "choices": [" moo", " bark", " miau"], "answer": 1},
    {"question": "a cat says", "choices": [" moo", " bark", " miau"], "answer": 2},
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A small model with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("saved")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=alphabet[0])
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = BMojoConfig.bmojo(
        vocab_size=256, hidden_size=16, num_layers=1, num_heads=2, window=8, eos_token_id=0,
        initializer_range=0.5,
    )  # fmt: skip
    BMojoForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_task_gives_what_the_log_likelihoods_say(saved, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "animals.jsonl"
    data.write_text("\n".join(json.dumps(q) for q in QUESTIONS))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "animals.yaml").write_text(TASK.format(data=data))
    found = run_tasks(saved, ["three_animals"], tmp_path / "tasks", device="cpu")
    model = BMojoForCausalLM.from_pretrained(saved).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(saved)
    right = [
        max(range(3), key=lambda i: likelihood(model, tokenizer, q, q["choices"][i])) == q["answer"]
        for q in QUESTIONS
    ]
    assert math.isclose(found["three_animals"]["acc,none"], sum(right) / 3, rel_tol=1e-9)


@torch.no_grad()
def likelihood(model, tokenizer, question, choice: str) -> float:
    """log p(choice | question), by one forward."""
    context, told = (tokenizer.encode(x) for x in (question["question"], choice))
    log_p = model(torch.tensor([context + told])).logits[0].log_softmax(-1)
    return sum(float(log_p[len(context) + i - 1, t]) for i, t in enumerate(told))


def test_a_folder_without_a_model_or_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"folder must hold a model, '{tmp_path}'"):
        run_tasks(tmp_path, ["any"])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="folder must hold a tokenizer"):
        run_tasks(tmp_path, ["any"])
    assert os.listdir(tmp_path) == ["config.json"]
