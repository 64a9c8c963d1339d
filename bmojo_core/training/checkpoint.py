"""Checkpoints that are either whole or absent.

A checkpoint is a folder ``step-00000120`` with the model's and the optimiser's tensors
(safetensors), the record of the run (JSON), and the SHA-256 of each.  It is written under another
name and renamed when it is complete, and an old one is renamed before it is removed; a run that is
killed at any instant leaves the last whole one behind.  Loading checks the sums and never
unpickles.

Sharded parameters (``DTensor``) are gathered one by one and rank 0 writes them whole: a checkpoint
is the same whatever engine wrote it, and any engine goes on from it.
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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

FILES = ("model.safetensors", "optimizer.safetensors", "run.json")
_SUMS = "sha256.json"
_PARTIAL = ".partial-"
_NAME = re.compile(r"step-(\d{8})")


def save_checkpoint(
    folder: str | os.PathLike[str],
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    run: dict[str, Any],
    keep: int = 1,
    write: bool = True,
) -> Path:
    """Write ``folder/step-...`` and remove all but the newest ``keep``.

    A folder belongs to one run.  Every rank of a sharded run calls this, and one of them writes.

    Raises
    ------
    OSError
        When the folder cannot be written; checkpoints already there are untouched.
    """
    folder = Path(folder)
    final = folder / f"step-{step:08d}"
    tensors = {
        FILES[0]: _gathered(_parameters(model), write),
        FILES[1]: _gathered(_optimizer_tensors(optimizer), write),
    }
    if not write:
        return final
    partial = folder / f"{_PARTIAL}{os.getpid()}"
    _remove_partial(folder)  # what a killed run has left
    partial.mkdir(parents=True)
    try:
        _write(partial, tensors, {**run, "step": step})
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _flush(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old.rename(folder / f"{_PARTIAL}old"))
    return final


def _write(folder: Path, tensors: dict[str, dict[str, torch.Tensor]], run: dict[str, Any]) -> None:
    for name, content in tensors.items():
        try:
            save_file(content, folder / name)
        except SafetensorError as error:  # it hides the system's error
            raise OSError(f"cannot write {folder / name}: {error}") from error
    (folder / FILES[2]).write_text(json.dumps(run))
    sums = {name: _sha256(folder / name) for name in FILES}
    (folder / _SUMS).write_text(json.dumps(sums))
    for name in (*FILES, _SUMS):
        _flush(folder / name)
    _flush(folder)


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
            tensor.copy_(_placed(parameters[name], tensor))
    _restore_optimizer(optimizer, load_file(path / FILES[1]))
    return json.loads((path / FILES[2]).read_text())


def _verify(path: Path) -> None:
    try:
        sums = json.loads((path / _SUMS).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a checkpoint: its {_SUMS} cannot be read") from error
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
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        like = parameters[int(index)]
        placed = _placed(tensor, like) if tensor.shape == like.shape else tensor
        state.setdefault(int(index), {})[name] = placed
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor: all of it, unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _gathered(tensors: dict[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
    """Whole tensors; sharded ones are put together on the CPU, on the rank that keeps them."""
    whole = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor
        if keep:
            whole[name] = full
    return whole


def _placed(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor, sharded as ``like`` is: every rank cuts out its own part."""
    if not isinstance(like, DTensor):
        return whole
    mesh, placements = like.device_mesh, like.placements
    return distribute_tensor(whole.to(like.device), mesh, placements, src_data_rank=None)


def _remove_partial(folder: Path) -> None:
    for path in folder.glob(f"{_PARTIAL}*"):
        shutil.rmtree(path)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Force a file, or a folder's list of names, to the disk: no rename overtakes contents."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
