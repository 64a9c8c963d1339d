"""Weights from a transformers model or checkpoint folder into a B'MOJO, each exactly once.

A source is a stream of (name, tensor); every tensor is renamed by its family's table and copied
into the one parameter that it belongs to.  At the end every parameter must have been written and
no tensor may be left over, so that nothing is invented and nothing is lost.

A folder is read shard by shard through safetensors, tensor by tensor: beside the new model only
one tensor is in memory.  Pickled checkpoints (``*.bin``) can run code and are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CONFIG_MAPPING, GenerationConfig, PretrainedConfig, PreTrainedModel

from bmojo_core.config import BMojoConfig
from bmojo_core.convert.families import Family, family_of
from bmojo_core.layers.rotary import Rotary
from bmojo_core.modeling import BMojoForCausalLM

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


def from_hf(
    model: PreTrainedModel | str | Path, dtype: torch.dtype | None = None
) -> BMojoForCausalLM:
    """A transformers causal language model as a B'MOJO that computes the same logits.

    Parameters
    ----------
    model
        A model with its head, whose weights are copied, or a folder written by
        ``save_pretrained`` with safetensors.  Covered are Mistral, Llama, Mamba, FalconMamba and
        Jamba.
    dtype
        Of the new weights, one of ``DTYPES``; None keeps the source's, which must then be one.

    Returns
    -------
    BMojoForCausalLM
        In evaluation mode, on the CPU for a folder and on the model's device otherwise.

    Raises
    ------
    ValueError
        For a family or a feature that B'MOJO does not have; for a weight without a place, missing,
        repeated, of another shape, quantized or without data; for a pickled checkpoint, a file that
        is cut short or cannot be read, or a folder that is not there.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be None or one of {DTYPES}, got {dtype!r}")
    if isinstance(model, (str, Path)):
        return _from_folder(Path(model), dtype)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"model must be a transformers model or a checkpoint folder, got {type(model).__name__}"
        )
    family = family_of(model.config.model_type)
    config = family.configuration(model.config)
    weights = model.state_dict()
    for name, weight in weights.items():
        _check_weight(name, weight)
    dtype = dtype or _common_dtype(family, ((n, w.dtype) for n, w in weights.items()))
    converted = _fill(family, config, weights.items(), dtype)
    if getattr(model, "generation_config", None) is not None:
        converted.generation_config = GenerationConfig.from_dict(model.generation_config.to_dict())
    return converted.to(model.device)


def _from_folder(folder: Path, dtype: torch.dtype | None) -> BMojoForCausalLM:
    if not (folder / "config.json").is_file():
        raise ValueError(f"model must be a folder with a config.json, got {str(folder)!r}")
    family = family_of(str(_read_json(folder / "config.json").get("model_type")))
    config = family.configuration(_theirs(family, folder))
    dtype = dtype or _common_dtype(family, _stored_dtypes(folder))
    converted = _fill(family, config, stream_folder(folder), dtype)
    if (folder / "generation_config.json").is_file():
        settings = _read_json(folder / "generation_config.json")
        converted.generation_config = GenerationConfig.from_dict(settings)
    return converted


def _theirs(family: Family, folder: Path) -> PretrainedConfig:
    """Their configuration; their classes check some values themselves, each in its own way."""
    config_class = CONFIG_MAPPING[family.model_type]
    try:
        return config_class.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        message = f"transformers refuses config.json in {str(folder)!r}: {error}"
        raise ValueError(message) from error


# -- reading -----------------------------------------------------------------------------------


def stream_folder(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every (name, tensor) of a checkpoint folder, one tensor at a time.

    Raises
    ------
    ValueError
        When there is no safetensors file, or the index and its shards do not agree.
    """
    for file in _open_shards(folder):
        for name in sorted(file.keys()):
            yield name, file.get_tensor(name)


def _open_shards(folder: Path) -> Iterator[Any]:
    """The open shards of a folder, one after the other, checked against the index."""
    for shard, expected in _shards(folder).items():
        path = folder / shard
        if not path.is_file():
            raise ValueError(f"{_INDEX} names the shard {shard!r}, which is not in {str(folder)!r}")
        try:
            opened = safe_open(path, framework="pt")
        except SafetensorError as error:
            message = f"{shard!r} in {str(folder)!r} is damaged or cut short: {error}"
            raise ValueError(message) from error
        with opened as file:
            if expected is not None and set(file.keys()) != expected:
                odd = sorted(set(file.keys()) ^ expected)
                raise ValueError(f"shard {shard!r} and {_INDEX} do not agree on {odd[:5]}")
            yield file


def _shards(folder: Path) -> dict[str, set[str] | None]:
    """File names of the shards, each with the weights that the index expects in it."""
    if (folder / _SINGLE).is_file():  # as transformers: one file hides an index
        return {_SINGLE: None}
    if (folder / _INDEX).is_file():
        places = _read_json(folder / _INDEX).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise ValueError(f"{_INDEX} in {str(folder)!r} must have a weight_map, got {places!r}")
        shards: dict[str, set[str]] = {}
        for name, shard in places.items():
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise ValueError(f"{_INDEX}: a shard must lie in the folder, got {shard!r}")
            shards.setdefault(shard, set()).add(name)
        return shards
    pickled = sorted(p.name for p in folder.glob("*.bin"))
    hint = f"; {pickled[0]!r} is a pickle and is not read" if pickled else ""
    raise ValueError(f"{str(folder)!r} has neither {_SINGLE} nor {_INDEX}{hint}")


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} in {str(path.parent)!r} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} in {str(path.parent)!r} must hold an object, got {found!r}")
    return found


def _stored_dtypes(folder: Path) -> Iterator[tuple[str, torch.dtype]]:
    """(name, dtype) of every weight, without reading more of any than an empty slice."""
    for file in _open_shards(folder):
        names = file.keys()
        for name in names:
            stored = file.get_slice(name)
            yield name, (stored[:0] if stored.get_shape() else file.get_tensor(name)).dtype


def _common_dtype(family: Family, dtypes: Iterable[tuple[str, torch.dtype]]) -> torch.dtype:
    found = {dtype for name, dtype in dtypes if not name.endswith(family.computed)}
    if len(found) == 1 and found <= set(DTYPES):
        return found.pop()
    names = sorted(str(t) for t in found)
    raise ValueError(f"the weights have dtypes {names}: give dtype, one of {DTYPES}")


def _check_weight(name: str, weight: Any) -> None:
    """A weight must be a plain tensor of real numbers whose data is there."""
    if not isinstance(weight, Tensor):
        kind = type(weight).__name__
        raise ValueError(
            f"weight {name!r} is not a tensor but a {kind}: quantized models have none"
        )
    if weight.dtype not in DTYPES:
        raise ValueError(
            f"weight {name!r} has dtype {weight.dtype}, must be one of {DTYPES}: convert the "
            "checkpoint before it is quantized"
        )
    if weight.is_meta:
        raise ValueError(f"weight {name!r} is on the meta device and has no data: load it first")


# -- writing -----------------------------------------------------------------------------------


@torch.no_grad()
def _fill(
    family: Family, config: BMojoConfig, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> BMojoForCausalLM:
    """A model of this configuration whose parameters are the given weights."""
    model = _empty_model(config, dtype)
    parameters = dict(model.named_parameters())
    starts = _block_starts(family, config)
    written: dict[str, str] = {}
    for name, tensor in _pieces(family, weights):
        destination = family.destination(name, starts)
        if config.tie_word_embeddings and destination == "lm_head.weight":
            destination = "model.embed_tokens.weight"
        if destination not in parameters:
            raise ValueError(f"{family.model_type}: weight {name!r} has no place in a B'MOJO")
        target = parameters[destination]
        if target.shape != tensor.shape:
            raise ValueError(
                f"{family.model_type}: weight {name!r} must have shape {tuple(target.shape)}, "
                f"got {tuple(tensor.shape)}"
            )
        if destination not in written:
            target.copy_(tensor)
        elif not _is_tied_twin(config, name, written[destination]) or not torch.equal(
            target, tensor.to(target)
        ):
            raise ValueError(
                f"{family.model_type}: weights {written[destination]!r} and {name!r} both belong "
                f"in {destination!r}"
            )
        written.setdefault(destination, name)
    missing = sorted(set(parameters) - set(written))
    if missing:
        raise ValueError(f"{family.model_type}: the source has no weights for {missing}")
    return model.eval()


def _empty_model(config: BMojoConfig, dtype: torch.dtype) -> BMojoForCausalLM:
    """Parameters allocated but not initialised; rotary frequencies in full precision."""
    with torch.device("meta"):
        model = BMojoForCausalLM(config).to(dtype)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    for module in model.modules():
        if isinstance(module, Rotary):
            module.reset_parameters()
    return model


def _block_starts(family: Family, config: BMojoConfig) -> list[int]:
    """Place of every block's first sublayer in the flat stack; blocks are equally long."""
    return list(range(0, len(config.layer_types), len(config.layer_types) // config.num_layers))


def _pieces(family: Family, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The stream with stacked weights taken apart and what is computed left out."""
    for name, tensor in weights:
        if name.endswith(family.computed):
            continue
        _check_weight(name, tensor)
        for ending, split in family.split.items():
            if name.endswith(ending):
                prefix = name[: -len(ending)] + "experts"
                yield from ((prefix + rest, piece) for rest, piece in split(tensor))
                break
        else:
            yield name, tensor


def _is_tied_twin(config: BMojoConfig, name: str, other: str) -> bool:
    return config.tie_word_embeddings and "lm_head.weight" in (name, other)
