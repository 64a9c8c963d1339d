"""What two processes of the launcher do in the tests: train, save, say what they saw.

accelerate launch --use_fsdp --fsdp_version 2 --num_processes 2 distributed_run.py FOLDER
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from bmojo_core import BMojoConfig, BMojoForCausalLM
from bmojo_core.training import Recipe, scored_loss, train

RECIPE = Recipe(steps=20, lr_ssm=1e-2, lr_attention=3e-3, checkpoint_every=20, evaluate_every=10)
CHUNKED = dict(chunk=5, horizon=2, accumulate=2, steps=6, recompute=True)
RUNS = {"replicas": {}, "shards": {}, "chunked": CHUNKED}


def small_model(seed: int = 0) -> BMojoForCausalLM:
    torch.manual_seed(seed)
    sizes = dict(vocab_size=16, hidden_size=16, num_layers=2, num_heads=2, window=4, state_size=4)
    return BMojoForCausalLM(BMojoConfig.bmojo(**sizes, num_eidetic_tokens=2))


def batch(step: int):
    """Four rows with unequal numbers of labels, so that ranks differ in how many they have."""
    g = torch.Generator().manual_seed(step)
    ids = torch.randint(16, (4, 13), generator=g)
    labels = ids[:, 1:].clone()
    labels[1, 3:] = -100
    return ids[:, :-1], labels


def evaluate(model) -> dict[str, float]:
    """The loss of one batch by a forward of the model as a whole."""
    ids, labels = batch(1000)
    loss = torch.nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten())
    return {"loss": float(loss)}


def recipe(name: str) -> Recipe:
    changes = RUNS[name]
    return replace(RECIPE, **changes, checkpoint_every=changes.get("steps", RECIPE.steps))


def moves(engine) -> dict[str, float]:
    """How far one step of AdamW at its first rate moves each parameter: its learning rate."""
    before = {n: whole(p).clone() for n, p in engine.model.named_parameters()}
    rates = Recipe(steps=1, lr_ssm=1e-2, lr_attention=3e-3, warmup=0.0, weight_decay=0.0,
                   floor=1e-2, clip=1e15)  # fmt: skip
    train(engine.model, batch, rates, loss=steep, engine=engine, progress=False)
    after = {n: whole(p) for n, p in engine.model.named_parameters()}
    return {n: float((after[n] - before[n]).abs().max()) for n in before}


def steep(model, ids, labels) -> torch.Tensor:
    """A loss whose smallest gradients are far above AdamW's epsilon."""
    return 1e10 * scored_loss(model, ids, labels)


def whole(p: torch.Tensor) -> torch.Tensor:
    return (p.full_tensor() if isinstance(p, DTensor) else p).detach()


def main(folder: Path) -> None:
    from bmojo_core.training.engine import SHARDING, launched

    os.environ[SHARDING] = "true"
    engine = launched(small_model())
    (folder / "shards-rates.json").write_text(json.dumps(moves(engine)))
    for name in RUNS:
        os.environ[SHARDING] = str(name != "replicas")
        engine = launched(small_model(seed=0 if os.environ["RANK"] == "0" else 1))
        run = train(
            engine.model, batch, recipe(name), engine=engine, evaluate=evaluate,
            folder=folder / name, progress=False,
        )  # fmt: skip
        sharded = [isinstance(p, DTensor) for p in engine.model.parameters()]
        own = sum(
            (p.to_local() if isinstance(p, DTensor) else p).numel()
            for p in engine.model.parameters()
        )
        seen = {"losses": run.losses, "evaluations": run.evaluations, "world": engine.world,
                "sharded": sum(sharded), "parameters": len(sharded), "own": own}  # fmt: skip
        (folder / f"{name}-{engine.rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
