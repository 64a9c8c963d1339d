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

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

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
        Of the new weights; None keeps the source's, which must then be one.

    Returns
    -------
    BMojoForCausalLM
        In evaluation mode, on the CPU for a folder and on the model's device otherwise.

    Raises
    ------
    ValueError
        For a family or a feature that B'MOJO does not have, a weight without a place, missing,
        repeated or of another shape, a pickled checkpoint, or a folder that is not there.
    """
    if isinstance(model, (str, Path)):
        return _from_folder(Path(model), dtype)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"model must be a transformers model or a checkpoint folder, got {type(model).__name__}"
        )
    family = family_of(model.config.model_type)
    config = family.configuration(model.config)
    weights = model.state_dict()
    converted = _fill(family, config, weights.items(), dtype or _common_dtype(weights.items()))
    if model.can_generate():
        converted.generation_config = GenerationConfig.from_dict(model.generation_config.to_dict())
    return converted.to(model.device)


def _from_folder(folder: Path, dtype: torch.dtype | None) -> BMojoForCausalLM:
    if not (folder / "config.json").is_file():
        raise ValueError(f"model must be a folder with a config.json, got {str(folder)!r}")
    described = json.loads((folder / "config.json").read_text())
    family = family_of(str(described.get("model_type")))
    config = family.configuration(_theirs(family, folder))
    if dtype is None:
        dtype = _common_dtype(stream_folder(folder))
    converted = _fill(family, config, stream_folder(folder), dtype)
    if (folder / "generation_config.json").is_file():
        converted.generation_config = GenerationConfig.from_pretrained(folder)
    return converted


def _theirs(family: Family, folder: Path):
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[family.model_type].from_pretrained(folder, local_files_only=True)


# -- reading -----------------------------------------------------------------------------------


def stream_folder(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every (name, tensor) of a checkpoint folder, one tensor at a time.

    Raises
    ------
    ValueError
        When there is no safetensors file, or the index and its shards do not agree.
    """
    for shard, expected in _shards(folder).items():
        path = folder / shard
        if not path.is_file():
            raise ValueError(f"{_INDEX} names the shard {shard!r}, which is not in {str(folder)!r}")
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if expected is not None and names != expected:
                odd = sorted(names ^ expected)
                raise ValueError(f"shard {shard!r} and {_INDEX} do not agree on {odd[:5]}")
            for name in sorted(names):
                yield name, file.get_tensor(name)


def _shards(folder: Path) -> dict[str, set[str] | None]:
    """File names of the shards, each with the weights that the index expects in it."""
    if (folder / _SINGLE).is_file():  # as transformers: one file hides an index
        return {_SINGLE: None}
    if (folder / _INDEX).is_file():
        shards: dict[str, set[str]] = {}
        for name, shard in json.loads((folder / _INDEX).read_text())["weight_map"].items():
            if Path(shard).name != shard:
                raise ValueError(f"{_INDEX}: a shard must lie in the folder, got {shard!r}")
            shards.setdefault(shard, set()).add(name)
        return shards
    pickled = sorted(p.name for p in folder.glob("*.bin"))
    hint = f"; {pickled[0]!r} is a pickle and is not read" if pickled else ""
    raise ValueError(f"{str(folder)!r} has neither {_SINGLE} nor {_INDEX}{hint}")


def _common_dtype(weights: Iterable[tuple[str, Tensor]]) -> torch.dtype:
    found = {tensor.dtype for _, tensor in weights}
    if len(found) == 1 and found <= set(DTYPES):
        return found.pop()
    names = sorted(str(t) for t in found)
    raise ValueError(f"the weights have dtypes {names}: give dtype, one of {DTYPES}")


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
        for ending, split in family.split.items():
            if name.endswith(ending):
                prefix = name[: -len(ending)] + "experts"
                yield from ((prefix + rest, piece) for rest, piece in split(tensor))
                break
        else:
            yield name, tensor


def _is_tied_twin(config: BMojoConfig, name: str, other: str) -> bool:
    return config.tie_word_embeddings and "lm_head.weight" in (name, other)
