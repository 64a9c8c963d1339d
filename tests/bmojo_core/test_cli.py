"""The command: what it writes, what it says, and the exit code when it cannot."""

import errno
import json
import os
import re
import signal
import threading
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from bmojo_core import BMojoConfig, BMojoForCausalLM, cli
from bmojo_core.config import PRESETS
from bmojo_core.evaluation.positions import perplexity_by_position
from bmojo_core.training import loop
from bmojo_core.training.checkpoint import checkpoints
from bmojo_core.training.memory import training_memory
from bmojo_core.training.settings import read_settings

TEXT = "to be or not to be, that is the question " * 20
SIZES = dict(hidden_size=16, num_layers=1, num_heads=2, window=8, state_size=4,
             num_eidetic_tokens=4)  # fmt: skip
SETTINGS = {
    "model": {"kind": "bmojo", **SIZES},
    "data": {"path": "text.txt", "length": 16, "batch_size": 2, "validation": "text.txt",
             "validation_batches": 1},
    "training": {"steps": 3, "lr_ssm": 0.01, "lr_attention": 0.01, "checkpoint_every": 2},
}  # fmt: skip


def run(*arguments: object):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def write(folder: Path, changes: dict | None = None) -> Path:
    (folder / "text.txt").write_text(TEXT)
    tree = {part: {**keys, **(changes or {}).get(part, {})} for part, keys in SETTINGS.items()}
    tree |= {k: v for k, v in (changes or {}).items() if k not in tree}
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return folder / "run.yaml"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A saved model that reads bytes."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    BMojoForCausalLM(BMojoConfig.bmojo(vocab_size=256, **SIZES)).save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------- training


def test_train_writes_checkpoints_a_record_and_a_model(tmp_path):
    output = tmp_path / "run"
    result = run("train", write(tmp_path), "--output", output, "--no-progress")
    assert result.exit_code == 0, result.output
    assert [p.name for p in checkpoints(output / "checkpoints")] == ["step-00000003"]
    record = json.loads((output / "record.json").read_text())
    assert len(record["losses"]) == 3 and record["evaluations"][0]["step"] == 3
    assert record["recipe"]["lr_ssm"] == 0.01
    model = BMojoForCausalLM.from_pretrained(output / "model")
    assert model.config.num_eidetic_tokens == 4
    assert model.lm_head.weight is model.model.embed_tokens.weight
    again = run("train", tmp_path / "run.yaml", "--output", output, "--no-progress")
    assert again.exit_code == 0
    assert json.loads((output / "record.json").read_text())["losses"] == record["losses"]


def test_settings_are_changed_on_the_command_line(tmp_path):
    settings = write(tmp_path)
    found = read_settings(settings, ("training.steps=7", "model.window=4", "training.clip=2"))
    assert (found.training.steps, found.model.window, found.training.clip) == (7, 4, 2)
    assert found.data.path == str(tmp_path / "text.txt")
    preset = read_settings(write(tmp_path, {"model": {"preset": "tiny", "kind": "hybrid"}}))
    assert preset.model.kind == "hybrid"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_a_checkpoint_that_resumes(tmp_path, monkeypatch, number):
    settings = write(tmp_path, {"training": {"steps": 6, "checkpoint_every": 100}})
    arguments = ("train", settings, "--no-progress", "--output")
    assert run(*arguments, tmp_path / "whole").exit_code == 0
    step = loop._step

    def interrupted(*given):
        if given[-1] == 3:
            os.kill(os.getpid(), number)
        return step(*given)

    monkeypatch.setattr(loop, "_step", interrupted)
    before = signal.getsignal(number)
    result = run(*arguments, tmp_path / "cut")
    assert result.exit_code == 130
    assert "stopped after step 3 of 6" in result.stderr
    assert signal.getsignal(number) is before
    assert [p.name for p in checkpoints(tmp_path / "cut" / "checkpoints")] == ["step-00000003"]
    monkeypatch.setattr(loop, "_step", step)
    assert run(*arguments, tmp_path / "cut").exit_code == 0
    whole, cut = (
        json.loads((tmp_path / name / "record.json").read_text()) for name in ("whole", "cut")
    )
    assert cut["losses"] == pytest.approx(whole["losses"], rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": {"windows": 3}}, "model: unknown configuration key 'windows'; did you mean"),
        (
            {"model": {"prest": "tiny"}},
            "model: unknown configuration key 'prest'; did you mean 'preset'?",
        ),
        ({"model": {"kimd": "mamba"}}, "unknown configuration key 'kimd'; did you mean 'kind'?"),
        ({"model": {"kind": "lstm"}}, "model.kind must be one of"),
        ({"training": {"lr": 1}}, "unknown key 'lr' in training"),
        ({"training": {"step": 1}}, "unknown key 'step' in training; did you mean 'steps'?"),
        ({"training": {"steps": "many"}}, "training.steps must be a whole number, got 'many'"),
        ({"training": {"steps": 1.5}}, "training.steps must be a whole number, got 1.5"),
        ({"training": {"steps": 0}}, "training: steps must be at least 1"),
        ({"data": {"pth": "x"}}, "unknown key 'pth' in data; did you mean 'path'?"),
        ({"data": {"length": 10**6}}, "length must be below the"),
        ({"data": {"path": "absent.txt"}}, "absent.txt"),
        ({"optimizer": {}}, "unknown key 'optimizer'"),
        ({"model": {"vocab_size": 50}}, "holds token 117, but model.vocab_size is 50"),
    ],
)
def test_wrong_settings_are_refused_by_name(tmp_path, changes, says):
    result = run("train", write(tmp_path, changes), "--output", tmp_path / "run")
    assert result.exit_code == 2
    assert says in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_settings_that_are_no_mapping_are_refused(tmp_path):
    for text in ("[1, 2]", "a: [", "model: 3"):
        (tmp_path / "run.yaml").write_text(text)
        result = run("train", tmp_path / "run.yaml", "--output", tmp_path / "run")
        assert result.exit_code == 2 and result.stderr.startswith("error: ")
    (tmp_path / "run.yaml").write_text("data: {}\n")
    result = run("train", tmp_path / "run.yaml", "--output", tmp_path / "run")
    assert "data.path is missing" in result.stderr
    result = run("train", write(tmp_path), "--output", tmp_path / "run", "--set", "steps=3")
    assert result.exit_code == 2 and "got 'steps=3'" in result.stderr


def test_a_disk_that_fails_is_exit_code_1(tmp_path):
    (tmp_path / "run").write_text("a file where the folder should be")
    result = run("train", write(tmp_path), "--output", tmp_path / "run", "--no-progress")
    assert result.exit_code == 1 and "error: " in result.stderr


# ---------------------------------------------------------------------------- the other commands


def test_eval_is_perplexity_by_position(model_folder, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    found = tmp_path / "found.json"
    result = run("eval", model_folder, "--text", tmp_path / "text.txt", "--length", 300,
                 "--chunk", 64, "--output", found)  # fmt: skip
    assert result.exit_code == 0, result.output
    content = json.loads(found.read_text())
    ids = torch.tensor([list(TEXT.encode())[:300]])
    model = BMojoForCausalLM.from_pretrained(model_folder)
    expected = perplexity_by_position(model, [ids], (0, 128, 256, 300))
    assert content["to"] == [128, 256, 300]
    assert content["perplexity"] == pytest.approx(expected.perplexity.tolist(), rel=1e-5)
    assert run("eval", model_folder).exit_code == 2


@pytest.mark.parametrize("text", ["", "a"])
def test_a_text_that_predicts_nothing_is_refused(model_folder, tmp_path, text):
    """Perplexity of no token would be NaN, which is not JSON either."""
    (tmp_path / "text.txt").write_text(text)
    result = run("eval", model_folder, "--text", tmp_path / "text.txt")
    assert result.exit_code == 2 and f"holds {len(text)}" in result.stderr
    (tmp_path / "text.txt").write_text(TEXT)
    nowhere = tmp_path / "absent" / "found.json"
    result = run("eval", model_folder, "--text", tmp_path / "text.txt", "--output", nowhere)
    assert result.exit_code == 2 and "output must be in a folder that exists" in result.stderr


def test_generate_goes_on_from_the_prompt(model_folder):
    greedy = [run("generate", model_folder, "to be", "--tokens", 5) for _ in range(2)]
    assert greedy[0].exit_code == 0 and greedy[0].stdout == greedy[1].stdout
    assert greedy[0].stdout.startswith("to be")
    drawn = [
        run("generate", model_folder, "to be", "--tokens", 20, "--temperature", 1, "--seed", s)
        for s in (1, 1, 2)
    ]
    assert drawn[0].stdout == drawn[1].stdout != drawn[2].stdout
    assert run("generate", model_folder, "").exit_code == 2


def test_convert_keeps_the_logits(tmp_path):
    from transformers import MistralConfig, MistralForCausalLM

    sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                 num_attention_heads=2, num_key_value_heads=1, sliding_window=4)  # fmt: skip
    theirs = MistralForCausalLM(MistralConfig(**sizes)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    result = run("convert", tmp_path / "theirs", tmp_path / "ours")
    assert result.exit_code == 0, result.output
    ours, ids = BMojoForCausalLM.from_pretrained(tmp_path / "ours"), torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)
    assert run("convert", tmp_path / "theirs", tmp_path / "ours").exit_code == 2


def test_inspect_lists_what_was_remembered(model_folder):
    result = run("inspect", model_folder, TEXT[:40])
    assert result.exit_code == 0, result.output
    layer, *tokens = result.stdout.splitlines()
    assert re.match(r"layer 0: attention to window 0\.\d\d, fading 0\.\d\d, eidetic 0\.\d\d", layer)
    assert len(tokens) == 4
    empty = run("inspect", model_folder, "")
    assert empty.exit_code == 2 and "prompt must hold at least one token" in empty.stderr
    for line in tokens:
        place, _, text = line.split(maxsplit=2)
        assert text == repr(TEXT[int(place)])


def test_info_counts(model_folder):
    result = run("info", model_folder)
    model = BMojoForCausalLM.from_pretrained(model_folder)
    count = sum(p.numel() for p in model.parameters())
    assert result.exit_code == 0 and f"bmojo, {count:,} parameters" in result.output
    preset = run("info", "1.4b", "--ranks", 8, "--batch", 4)
    assert preset.exit_code == 0 and "training on 8 GPUs, 4 x 2048 tokens each" in preset.output
    total = training_memory(BMojoConfig.preset("1.4b"), 8, 4, 2048).total
    assert f"{total / 2**30:.2f} GiB" in preset.output.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments",
    [("generate", "tiny", "hi"), ("inspect", "tiny", "hi"), ("eval", "tiny", "--tasks", "x"),
     ("eval", "tiny", "--text", "x")],
)  # fmt: skip
def test_a_preset_is_no_folder_of_weights(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2 and "got 'tiny', a preset, which has sizes but no weights" in (
        result.stderr
    )
    (tmp_path / "other").mkdir()
    result = run(arguments[0], "other", *arguments[2:])
    assert result.exit_code == 2 and "folder must be one that save_pretrained" in result.stderr
    assert "preset" not in result.stderr


def test_info_lists_the_presets():
    result = run("info", "2b")
    assert result.exit_code == 2 and "got '2b'" in result.stderr
    assert f"a preset ({', '.join(PRESETS)}) or a folder" in result.stderr


def test_a_reader_that_has_seen_enough_is_no_error(monkeypatch):
    """As in ``bmojo inspect .. | head``: quietly, and not as if all had been written."""

    def closed(*arguments, **options):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(cli, "_summary", closed)
    result = run("info", "tiny")
    assert result.exit_code == 1 and result.output == ""


@pytest.mark.parametrize("command", ["train", "eval", "generate", "convert", "inspect", "info"])
def test_help_has_an_example_and_bad_folders_a_message(command, tmp_path):
    shown = run(command, "--help")
    assert shown.exit_code == 0 and re.search(rf"Examples?:\s+bmojo {command} ", shown.output)
    arguments = {"train": ["--output", tmp_path / "run"], "convert": [tmp_path / "out"],
                 "generate": ["text"], "inspect": ["text"], "eval": ["--text", "x"]}  # fmt: skip
    result = run(command, tmp_path / "absent", *arguments.get(command, []))
    assert result.exit_code == 2 and "absent" in result.stderr
    assert run(command, "--no-such-option").exit_code == 2


def test_the_entry_point_is_the_app():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"bmojo": "bmojo_core.cli:app"}


def test_signals_go_to_the_main_thread_only():
    from bmojo_core.training.interruption import interruption

    seen = []

    def elsewhere():
        try:
            with interruption():
                pass
        except ValueError as error:
            seen.append(str(error))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen and "main thread" in seen[0]


def test_a_torch_built_for_an_accelerator_that_is_not_there_runs_on_the_cpu(monkeypatch):
    """As pip installs torch on a Linux laptop: it names "cuda", and there is no driver."""
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator",
        lambda check_available=False: None if check_available else torch.device("cuda"),
    )  # fmt: skip
    assert cli._device() == torch.device("cpu")
