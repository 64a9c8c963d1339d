"""Checkpoints that are either whole or absent.

A checkpoint is a folder ``step-00000120`` with the model's and the optimiser's tensors
(safetensors), the record of the run (JSON), and the SHA-256 of each.  It is written under another
name and renamed when it is complete; a run that is killed at any instant leaves the last whole one
behind.  Loading checks the sums and never unpickles.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

FILES = ("model.safetensors", "optimizer.safetensors", "run.json")
_NAME = re.compile(r"step-(\d{8})")


def save_checkpoint(
    folder: str | os.PathLike[str],
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    run: dict[str, Any],
    keep: int = 1,
) -> Path:
    """Write ``folder/step-...`` and remove all but the newest ``keep``.

    Raises
    ------
    OSError
        When the folder cannot be written; checkpoints already there are untouched.
    """
    folder = Path(folder)
    final = folder / f"step-{step:08d}"
    partial = folder / f".partial-{os.getpid()}"
    partial.mkdir(parents=True)
    try:
        save_file(_parameters(model), partial / FILES[0])
        save_file(_optimizer_tensors(optimizer), partial / FILES[1])
        (partial / FILES[2]).write_text(json.dumps({**run, "step": step}))
        sums = {name: _sha256(partial / name) for name in FILES}
        (partial / "sha256.json").write_text(json.dumps(sums))
        for name in (*FILES, "sha256.json"):
            _flush(partial / name)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """Whole checkpoints in a folder, oldest first."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def load_checkpoint(
    path: str | os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Restore a checkpoint in place and return its record (``step`` included).

    Raises
    ------
    ValueError
        When a file is missing, cut short or altered, or does not fit the model.
    """
    path = Path(path)
    _verify(path)
    parameters = load_file(path / FILES[0])
    expected = _parameters(model)
    if parameters.keys() != expected.keys():
        differ = sorted(parameters.keys() ^ expected.keys())[:4]
        raise ValueError(f"checkpoint {path} does not fit the model: it differs in {differ}")
    with torch.no_grad():
        for name, tensor in expected.items():
            if tensor.shape != parameters[name].shape:
                raise ValueError(
                    f"checkpoint {path} does not fit the model: {name} is "
                    f"{tuple(parameters[name].shape)}, the model has {tuple(tensor.shape)}"
                )
            tensor.copy_(parameters[name])
    _restore_optimizer(optimizer, load_file(path / FILES[1]))
    return json.loads((path / FILES[2]).read_text())


def _verify(path: Path) -> None:
    try:
        sums = json.loads((path / "sha256.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a checkpoint: its sha256.json cannot be read") from error
    for name in FILES:
        if not (path / name).is_file():
            raise ValueError(f"checkpoint {path} has no {name}")
        if _sha256(path / name) != sums.get(name):
            raise ValueError(f"checkpoint {path} is damaged: {name} is not what was written")


def _parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters by name; tied ones once."""
    return {name: p.detach() for name, p in model.named_parameters()}


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value)
        for index, entry in state.items()
        for name, value in entry.items()
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Force the file to the disk, so that the rename cannot overtake its contents."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
