"""Where training runs: one process, replicas (data parallel), or shards (FSDP2).

Every rank draws the same batch and takes its own rows; with n_r scored labels of n on rank r,

    L = (1/n) sum_r n_r L_r,      g = (1/R) sum_r (R n_r / n) grad L_r

Replicas and shards take the mean over ranks of what each has, hence the weight R n_r / n: the
gradient is that of one process with the whole batch, however the labels fall.

`launched` reads what accelerate's launcher has set up:

    accelerate launch --num_processes 8 ..                             replicas
    accelerate launch --num_processes 8 --use_fsdp --fsdp_version 2 .. shards (torch's fully_shard)

Symbols: R ranks, r this rank, n and n_r scored labels of the batch and of this rank's rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bmojo_core.batches import IGNORED
from bmojo_core.modeling import BMojoForCausalLM

SHARDING = "ACCELERATE_USE_FSDP"  # set by the launcher


class Share(NamedTuple):
    """This rank's rows of a batch, its n_r, and the weight R n_r / n of its mean loss."""

    input_ids: Int[Tensor, "b l"]
    labels: Int[Tensor, "b l"]
    scored: int
    weight: float


@dataclass(frozen=True)
class Engine:
    """A model that is ready to train, and what the loop has to know of the other ranks.

    Attributes
    ----------
    model
        The model; its parameters are what the optimiser gets (sharded ones are ``DTensor``).
    call
        ``call(f, *arguments)`` is ``f(model, *arguments)``, run inside the wrapper that gathers
        parameters and adds up gradients.
    add_up
        Whether gradients are added up over ranks in the next backward passes.
    rank, world
        r and R.
    """

    model: BMojoForCausalLM
    call: Callable[..., Any]
    add_up: Callable[[bool], None]
    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this rank shows progress and writes files."""
        return self.rank == 0

    def share(self, input_ids: Int[Tensor, "b l"], labels: Int[Tensor, "b l"]) -> Share:
        """This rank's rows, on its device.

        Raises
        ------
        ValueError
            When there is a rank without a scored label.
        """
        scored = [int((labels[r :: self.world] != IGNORED).sum()) for r in range(self.world)]
        if self.world > 1 and min(scored) == 0:
            raise ValueError(
                f"every one of {self.world} ranks must have a scored label, got {scored} of a "
                f"batch of {len(labels)} rows"
            )
        device = self.model.device
        rows = (x[self.rank :: self.world].to(device) for x in (input_ids, labels))
        own = scored[self.rank]
        weight = 1.0 if self.world == 1 else self.world * own / sum(scored)
        return Share(*rows, own, weight)

    def mean(self, value: float) -> float:
        """The mean of a number over ranks."""
        if self.world == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.model.device)
        dist.all_reduce(total)
        return float(total) / self.world

    def any(self, condition: bool) -> bool:
        """Whether a condition holds on any rank."""
        return condition if self.world == 1 else self.mean(float(condition)) > 0

    def whole_weights(self) -> dict[str, Tensor] | None:
        """The model's whole weights on rank 0, None on others; every rank calls it."""
        weights = self.model.state_dict(keep_vars=True)  # tied weights are one object
        whole: dict[int, Tensor] = {}
        for t in weights.values():
            if id(t) not in whole:
                full = t.full_tensor() if isinstance(t, DTensor) else t
                whole[id(t)] = full.detach().cpu() if self.is_main else t
        return {n: whole[id(t)] for n, t in weights.items()} if self.is_main else None

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world > 1:
            dist.barrier()


def single(model: BMojoForCausalLM) -> Engine:
    """One process."""
    return Engine(model, lambda f, *arguments: f(model, *arguments), lambda now: None)


def launched(model: BMojoForCausalLM) -> Engine:
    """As the launcher says: one process, replicas, or shards.

    Raises
    ------
    ModuleNotFoundError
        When accelerate is not installed.
    """
    from accelerate import PartialState

    state = PartialState(cpu=not torch.accelerator.is_available())
    model = model.to(state.device)
    if state.num_processes == 1:
        return single(model)
    sharded = os.environ.get(SHARDING, "false").lower() == "true"
    return (shards if sharded else replicas)(model)


def replicas(model: BMojoForCausalLM) -> Engine:
    """Every rank has the whole model; gradients are averaged while backward still runs."""
    wrapped = nn.parallel.DistributedDataParallel(Applied(model))

    def add_up(now: bool) -> None:
        wrapped.require_backward_grad_sync = now

    return Engine(model, wrapped, add_up, dist.get_rank(), dist.get_world_size())


def shards(model: BMojoForCausalLM) -> Engine:
    """Every rank has a part of each parameter, gathered block by block when it is needed.

    Gradients are always added up at once: keeping them whole would undo the saving.
    """
    from torch.distributed.fsdp import fully_shard

    for parameter in model.parameters():  # replicas do this by themselves
        dist.broadcast(parameter.detach(), src=0)
    wrapped = Applied(model)
    for layer in model.model.layers:
        fully_shard(layer, reshard_after_forward=True)
    fully_shard(wrapped, reshard_after_forward=True)
    return Engine(model, wrapped, lambda now: None, dist.get_rank(), dist.get_world_size())


class Applied(nn.Module):
    """forward(f, *arguments) = f(model, *arguments): any loss runs inside the wrappers' hooks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """f(model, *arguments)."""
        return function(self.model, *arguments)
