"""Every command that the help and the documents print: parsed as printed, and run where one can."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
import yaml
from typer.testing import CliRunner

from bmojo_core import cli
from bmojo_core.training.settings import read_settings

ROOT = Path(__file__).parents[2]
COMMANDS = typer.main.get_command(cli.app).commands
LAUNCH = ["accelerate", "launch"]


def printed_by_help() -> list[str]:
    """The examples under each command's options."""
    lines = []
    for command in COMMANDS.values():
        examples = re.sub(r"^Examples?:\s+", "", command.epilog)
        lines += re.sub(r"\s+\([^)]*\)$", "", examples).split("  |  ")
    return lines


def printed_by_documents() -> list[str]:
    """Lines of shell blocks, and code in running text, that call the command."""
    lines = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text()
        blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
        lines += re.findall(r"^(?:bmojo|accelerate launch) .*$", blocks, re.MULTILINE)
        lines += re.findall(r"`(bmojo [a-z]+ [^`]+)`", text)
    return lines


EXAMPLES = printed_by_help() + printed_by_documents()


def words_of(line: str) -> list[str]:
    """What the program behind the launcher, if there is one, gets to read."""
    words = shlex.split(line)
    if words[:2] != LAUNCH:
        assert words[0] == "bmojo"
        return words[1:]
    launch = pytest.importorskip("accelerate.commands.launch")
    known = launch.launch_command_parser().parse_args(words[2:])
    assert known.module and known.training_script == "bmojo_core.cli"
    return known.training_script_args


def test_examples_are_found():
    assert {line.split()[1] for line in printed_by_help() if line.startswith("bmojo")} == set(
        COMMANDS
    )
    assert sum(line.startswith("accelerate") for line in printed_by_documents()) >= 3


@pytest.mark.parametrize("line", EXAMPLES)
def test_the_parser_knows_every_example(line):
    name, *words = words_of(line)
    assert COMMANDS[name].make_context(name, words).params


def test_the_settings_of_the_documents_are_read(tmp_path):
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/scaling.md").read_text(), re.DOTALL)
    for name in ("tokens.npy", "heldout.npy"):
        np.save(tmp_path / name, np.arange(9))
    (tmp_path / "run.yaml").write_text(block)
    plan = read_settings(tmp_path / "run.yaml", ())
    assert plan.model.kind == "bmojo" and plan.model.hidden_size == 2048 and plan.training.recompute


def test_examples_run_as_printed(tmp_path, monkeypatch):
    """In the order of the help; those of a model too large for here, or of the network, do not."""
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("The key of Ann is 7. " * 40)
    Path("run.yaml").write_text(yaml.safe_dump({
        "model": {"preset": "tiny", "kind": "bmojo", "vocab_size": 256},
        "data": {"path": "book.txt", "length": 16, "batch_size": 2},
        "training": {"steps": 2, "lr_ssm": 1e-3, "lr_attention": 1e-3},
    }))  # fmt: skip
    torch.manual_seed(0)
    run = 0
    for line in printed_by_help():
        words = shlex.split(line)
        elsewhere = words[:2] == LAUNCH or words[1] == "convert" or "--tasks" in words
        if elsewhere:
            continue
        line = line.replace("training.steps=200", "training.steps=2")  # the same, shorter
        result = CliRunner().invoke(cli.app, shlex.split(line)[1:])
        assert result.exit_code == 0, f"{line}\n{result.output}"
        run += 1
    assert run >= 8
