"""Two processes are one: replicas and shards take the steps of a single process."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import distributed_run
import pytest
import torch

from bmojo_core.training import adamw, train
from bmojo_core.training.checkpoint import checkpoints, load_checkpoint
from bmojo_core.training.engine import single

pytest.importorskip("accelerate", reason="accelerate launches the processes")


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> Path:
    """Everything that two processes did, in one launch."""
    folder = tmp_path_factory.mktemp("launched")
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp",
        "--fsdp_version", "2", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", "0", distributed_run.__file__, str(folder),
    ]  # fmt: skip
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    result = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **threads}, timeout=600
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return folder


@pytest.mark.parametrize("name", distributed_run.RUNS)
def test_two_processes_take_the_steps_of_one(launched, name):
    here = train(
        distributed_run.small_model(), distributed_run.batch, distributed_run.recipe(name),
        evaluate=distributed_run.evaluate, folder=launched / f"{name}-single", progress=False,
    )  # fmt: skip
    for rank in (0, 1):
        seen = json.loads((launched / f"{name}-{rank}.json").read_text())
        assert seen["world"] == 2
        assert seen["losses"] == pytest.approx(here.losses, abs=1e-5)
        for found, expected in zip(seen["evaluations"], here.evaluations, strict=True):
            assert found == pytest.approx(expected, abs=1e-5)
    whole = sum(p.numel() for p in distributed_run.small_model().parameters())
    if name == "replicas":
        assert seen["sharded"] == 0 and seen["own"] == whole
    else:
        assert seen["sharded"] == seen["parameters"] and seen["own"] < 0.6 * whole
    one, two = (loaded(launched / folder, name) for folder in (f"{name}-single", name))
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4)


def loaded(folder: Path, name: str) -> tuple[dict, dict]:
    """Weights and optimiser of the checkpoint that a run has left, in this one process."""
    model = distributed_run.small_model(seed=7)
    optimizer = adamw(model, 1e-2, 3e-3)
    (path,) = checkpoints(folder)
    assert load_checkpoint(path, model, optimizer)["step"] == distributed_run.recipe(name).steps
    return model.state_dict(), optimizer.state_dict()["state"]


def test_the_two_learning_rates_survive_sharding(launched):
    """The first step of AdamW moves every weight by its learning rate."""
    seen = json.loads((launched / "shards-rates.json").read_text())
    for name, moved in seen.items():
        ssm = ".ssm." in name
        assert moved == pytest.approx(1e-2 if ssm else 3e-3, rel=1e-2), name


def test_a_rank_without_labels_is_refused():
    engine = single(distributed_run.small_model())
    ids, labels = distributed_run.batch(1)
    two = replace(engine, world=2)
    share = two.share(ids, labels)
    assert share.scored == 24 and share.weight == pytest.approx(2 * 24 / 39)
    labels[1::2] = -100
    with pytest.raises(ValueError, match=r"2 ranks must have a scored label.*\[24, 0\]"):
        two.share(ids, labels)
