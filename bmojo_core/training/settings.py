"""One YAML file for a run: the model, its data, and the recipe; nothing in it is guessed.

    model:     {preset: tiny, kind: bmojo, num_eidetic_tokens: 32}    BMojoConfig, or its preset
    data:      {path: corpus.txt, length: 256, batch_size: 8}         `Data`
    training:  {steps: 1000, lr_ssm: 2.0e-3, checkpoint_every: 100}   `Recipe`

A key that is not known is refused with the nearest known one.
"""

from __future__ import annotations

import difflib
import inspect
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml

from bmojo_core.config import KINDS, BMojoConfig
from bmojo_core.training.loop import Recipe

Part = TypeVar("Part")
PARTS = ("model", "data", "training")
ABOVE_THE_FIELDS = ("preset", "kind")  # keys of the part model that choose BMojoConfig's fields


@dataclass(frozen=True)
class Data:
    """What to train on.

    Attributes
    ----------
    path
        A file of text (its bytes are the tokens) or a ``.npy`` of token ids; a relative path is
        taken from the settings' folder.
    length, batch_size
        Tokens a sequence, sequences a batch.
    validation
        A file of the same kind for the evaluations, or none.
    validation_batches
        Batches of an evaluation.
    """

    path: str
    length: int = 512
    batch_size: int = 8
    validation: str | None = None
    validation_batches: int = 8

    def __post_init__(self) -> None:
        for name in ("length", "batch_size", "validation_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Settings:
    """A run: configuration of the model, data, recipe."""

    model: BMojoConfig
    data: Data
    training: Recipe


def read_settings(path: str | Path, changes: tuple[str, ...] = ()) -> Settings:
    """The settings in a YAML file, after ``changes`` such as ``"training.steps=10"``.

    Raises
    ------
    ValueError
        For an unknown or missing key, a value of the wrong type or out of range, or a file that is
        not YAML; the message names the key.
    OSError
        When the file cannot be read.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    tree = {} if tree is None else tree
    _check_parts(tree, str(path))
    for change in changes:
        _apply(tree, change)
    model = _model(tree.get("model") or {})
    data = _part(Data, tree.get("data") or {}, "data")
    data = _part(Data, {**vars(data), **_resolved(data, path.parent)}, "data")
    return Settings(model, data, _part(Recipe, tree.get("training") or {}, "training"))


def _check_parts(tree: Any, where: str) -> None:
    if not isinstance(tree, dict):
        raise ValueError(f"{where} must be a mapping with the keys {PARTS}, got {tree!r}")
    for key, value in tree.items():
        if key not in PARTS:
            raise ValueError(f"unknown key {key!r} in {where}{_nearest(key, PARTS)}")
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{key} must be a mapping, got {value!r}")


def _apply(tree: dict[str, Any], change: str) -> None:
    """One change ``part.key=value``, the value in YAML."""
    name, equals, value = change.partition("=")
    part, dot, key = name.partition(".")
    if not (equals and dot and key) or part not in PARTS:
        raise ValueError(f"a change must be model., data. or training. KEY=VALUE, got {change!r}")
    tree[part] = {**(tree.get(part) or {}), key: yaml.safe_load(value)}


def _model(keys: dict[str, Any]) -> BMojoConfig:
    """A preset of a kind with changes, or a kind with sizes of its own."""
    sizes = dict(keys)
    kind, preset = sizes.pop("kind", "bmojo"), sizes.pop("preset", None)
    if kind not in KINDS:
        raise ValueError(f"model.kind must be one of {KINDS}, got {kind!r}")
    _refuse_misspelt(sizes)
    try:
        if preset is not None:
            return BMojoConfig.preset(preset, kind, **sizes)
        return getattr(BMojoConfig, kind)(**sizes)
    except (TypeError, ValueError) as error:
        raise ValueError(f"model: {error}") from error


def _refuse_misspelt(sizes: dict[str, Any]) -> None:
    """A key that was to be ``preset`` or ``kind``: the configuration knows neither to suggest."""
    fields_of_config = set(inspect.signature(BMojoConfig.__init__).parameters)
    for key in sizes.keys() - fields_of_config:
        near = difflib.get_close_matches(str(key), {*fields_of_config, *ABOVE_THE_FIELDS}, 1)
        if near and near[0] in ABOVE_THE_FIELDS:
            raise ValueError(f"model: unknown configuration key {key!r}; did you mean {near[0]!r}?")


def _part(kind: type[Part], keys: dict[str, Any], where: str) -> Part:
    known = {field.name: field for field in fields(kind)}
    types = get_type_hints(kind)
    for key, value in keys.items():
        if key not in known:
            raise ValueError(f"unknown key {key!r} in {where}{_nearest(key, tuple(known))}")
        if not _fits(value, types[key]):
            raise ValueError(f"{where}.{key} must be {_named(types[key])}, got {value!r}")
    for name, field in known.items():
        if field.default is MISSING and name not in keys:
            raise ValueError(f"{where}.{name} is missing")
    try:
        return kind(**keys)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _fits(value: Any, wanted: Any) -> bool:
    """Whether a value is of a type; whole numbers are numbers, true and false are not."""
    allowed = getattr(wanted, "__args__", (wanted,))
    if isinstance(value, bool):
        return bool in allowed
    return isinstance(value, allowed) or (isinstance(value, int) and float in allowed)


def _named(wanted: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", type(None): "empty"}
    parts = getattr(wanted, "__args__", (wanted,))
    return " or ".join(names.get(part, str(part)) for part in parts)


def _resolved(data: Data, folder: Path) -> dict[str, str]:
    paths = {"path": data.path, "validation": data.validation}
    return {name: str(folder / path) for name, path in paths.items() if path is not None}


def _nearest(key: Any, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(str(key), known, 1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"
