"""The loop: two learning rates, a schedule, exact resumption, failures that say what happened."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from bmojo_core import BMojoConfig, BMojoForCausalLM
from bmojo_core.tasks import mqar
from bmojo_core.training import (
    Recipe,
    adamw,
    bptt,
    learning_rate,
    loop,
    parameter_groups,
    provenance,
    scored_loss,
    single,
    train,
)
from bmojo_core.training.checkpoint import checkpoints, load_checkpoint

SIZES = dict(vocab_size=40, hidden_size=16, num_layers=1, num_heads=2, window=8, state_size=4)


def small_model(seed: int = 0) -> BMojoForCausalLM:
    torch.manual_seed(seed)
    return BMojoForCausalLM(BMojoConfig.bmojo(**SIZES, num_eidetic_tokens=4))


def batch(step: int):
    return mqar(8, 32, 4, vocab_size=40, seed=step)


def test_schedule_is_warm_up_cosine_floor():
    at = [learning_rate(s, 100, 1.0, 10, 0.1) for s in range(1, 101)]
    assert at[0] == 0.1 and at[9] == 1.0 and math.isclose(at[-1], 0.1)
    assert math.isclose(at[54], 0.55)  # half way down the cosine: the mean of peak and floor
    assert np.all(np.diff(at[9:]) < 0)


def test_groups_hold_every_parameter_once_with_its_rate_and_decay():
    model = small_model()
    groups = parameter_groups(model, 1e-3, 3e-4, 0.1)
    grouped = [id(p) for g in groups for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    where = {id(p): g for g in groups for p in g["params"]}
    for name, p in model.named_parameters():
        group = where[id(p)]
        assert group["lr"] == (1e-3 if ".ssm." in name and "norm" not in name else 3e-4), name
        undecayed = p.ndim < 2 or name.endswith(("A_log", ".D", "bias"))
        assert group["weight_decay"] == (0.0 if undecayed else 0.1), name


def test_loss_is_the_cross_entropy_of_the_scored_columns():
    model = small_model().eval()
    ids, labels = batch(1)
    logits = model(ids, use_cache=False).logits.log_softmax(-1)
    by_hand = [
        -logits[i, t, labels[i, t]].item()
        for i in range(len(ids)) for t in range(ids.shape[1]) if labels[i, t] != -100
    ]  # fmt: skip
    assert math.isclose(scored_loss(model, ids, labels).item(), np.mean(by_hand), rel_tol=1e-5)


@pytest.mark.parametrize("stop_at", [None, 0.5])
def test_the_progress_bar_ends_at_the_last_step(stop_at, capsys):
    recipe = Recipe(steps=3, lr_ssm=1e-2, lr_attention=1e-2, evaluate_every=2, stop_at=stop_at)
    train(small_model(), batch, recipe, evaluate=lambda m: {"accuracy": 0.5}, name="recall")
    shown = capsys.readouterr().err.rpartition("\r")[2]
    assert shown.startswith("recall") and f"| {2 if stop_at else 3}/3 " in shown


def test_training_learns_and_records():
    run = train(small_model(), batch, Recipe(steps=30, lr_ssm=1e-2, lr_attention=1e-2),
                evaluate=lambda m: {"accuracy": 0.5}, progress=False)  # fmt: skip
    assert np.mean(run.losses[-5:]) < np.mean(run.losses[:5]) - 0.1
    assert run.evaluations == [{"step": 30, "accuracy": 0.5}]
    assert run.record["recipe"]["steps"] == 30 and "torch" in run.record["versions"]


def test_accumulated_batches_equal_one_large_batch():
    whole, parts = small_model(), small_model()
    ids, labels = batch(1)
    train(whole, lambda s: (ids, labels), Recipe(steps=2), progress=False)
    halves = [(ids[:4], labels[:4]), (ids[4:], labels[4:])]
    train(parts, lambda s: halves[(s - 1) % 2], Recipe(steps=2, accumulate=2), progress=False)
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_early_stop():
    run = train(small_model(), batch, Recipe(steps=50, evaluate_every=5, stop_at=0.9),
                evaluate=lambda m: {"accuracy": 0.95}, progress=False)  # fmt: skip
    assert len(run.losses) == 5


def test_an_interrupted_run_continues_to_the_same_numbers(tmp_path):
    recipe = Recipe(steps=12, checkpoint_every=4)
    whole = train(small_model(), batch, recipe, folder=tmp_path / "whole", progress=False)

    def interrupted(step):
        if step == 7:
            raise KeyboardInterrupt
        return batch(step)

    with pytest.raises(KeyboardInterrupt):
        train(small_model(), interrupted, recipe, folder=tmp_path / "cut", progress=False)
    assert [p.name for p in checkpoints(tmp_path / "cut")] == ["step-00000004"]
    resumed = train(small_model(5), batch, recipe, folder=tmp_path / "cut", progress=False)
    np.testing.assert_allclose(resumed.losses, whole.losses, rtol=1e-6)


@pytest.mark.parametrize("damage", ["cut", "flip", "missing"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, damage):
    train(small_model(), batch, Recipe(steps=2, checkpoint_every=2), folder=tmp_path,
          progress=False)  # fmt: skip
    path = checkpoints(tmp_path)[-1] / "model.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[-3] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    model = small_model()
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load_checkpoint(path.parent, model, adamw(model, 1e-3, 1e-3))


def test_a_checkpoint_of_another_model_or_recipe_is_refused(tmp_path):
    recipe = Recipe(steps=2, checkpoint_every=2)
    train(small_model(), batch, recipe, folder=tmp_path, progress=False)
    other = BMojoForCausalLM(BMojoConfig.mamba(**SIZES))
    with pytest.raises(ValueError, match="does not fit the model"):
        load_checkpoint(checkpoints(tmp_path)[-1], other, adamw(other, 1e-3, 1e-3))
    with pytest.raises(ValueError, match="another recipe"):
        train(small_model(), batch, dataclasses.replace(recipe, steps=4), folder=tmp_path,
              progress=False)  # fmt: skip


def test_a_failed_write_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    from bmojo_core.training import checkpoint

    recipe = Recipe(steps=4, checkpoint_every=2)
    written = []

    def full_disk(tensors, path):
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        save(tensors, path)

    save = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", lambda t, p: full_disk(t, p) if "model" in p.name
                        else save(t, p))  # fmt: skip
    with pytest.raises(OSError, match="No space left"):
        train(small_model(), batch, recipe, folder=tmp_path, progress=False)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000002"]
    model = small_model()
    assert load_checkpoint(checkpoints(tmp_path)[0], model, adamw(model, 1e-3, 1e-3))["step"] == 2


def test_divergence_says_the_step_and_the_largest_gradient():
    def explode(model, ids, labels):
        loss = scored_loss(model, ids, labels)
        explode.calls += 1
        return loss * float("nan") if explode.calls == 3 else loss

    explode.calls = 0
    with pytest.raises(FloatingPointError, match=r"nan at step 3; the largest gradient .* of .*\."):
        train(small_model(), batch, Recipe(steps=5), loss=explode, progress=False)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(steps=0), "steps must be at least 1, got 0"),
        (dict(lr_ssm=-1.0), "lr_ssm must be positive and finite"),
        (dict(warmup=1.0), "warmup must be in"),
        (dict(warmup="x"), "warmup must be in .* got 'x'"),
        (dict(precision="float8"), "precision must be"),
        (dict(steps=2.5), r"steps must be an integer, got 2\.5"),
        (dict(steps=True), "steps must be an integer, got True"),
        (dict(seed=None), "seed must be an integer, got None"),
        (dict(evaluate_every=-5), "evaluate_every must be at least 0, got -5"),
        (dict(lr_ssm="x"), "lr_ssm must be positive and finite, got 'x'"),
        (dict(weight_decay=-1.0), r"weight_decay must be at least 0 and finite, got -1\.0"),
        (dict(floor=-1.0), r"floor must be at least 0 and finite, got -1\.0"),
        (dict(floor=math.nan), "floor must be at least 0 and finite, got nan"),
        (dict(stop_at="x"), "stop_at must be a number or None, got 'x'"),
    ],
)
def test_impossible_recipes_are_refused(change, says):
    with pytest.raises(ValueError, match=says):
        Recipe(**{"steps": 1, **change})


IDS, LABELS = batch(1)


@pytest.mark.parametrize("chunk", [0, 8])
@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((IDS, LABELS[:, 1:]), r"labels of batch\(2\) must have the shape of its input_ids, "
         r"\(8, 32\), got \(8, 31\)"),
        ((IDS, LABELS[:4]), r"got \(4, 32\)"),
        ((IDS, torch.full_like(IDS, -100)), r"labels of batch\(2\) must score .* got only -100"),
        ((IDS, LABELS, LABELS), r"batch\(2\) must be a pair of tensors .* got tuple of Tensor, T"),
        (IDS, r"batch\(2\) must be a pair .* got Tensor of Tensor, Tensor, Tensor, \.\.$"),
        ({"input_ids": IDS, "labels": LABELS}, "must be a pair .* got dict of str, str"),
        ((IDS.numpy(), LABELS.numpy()), "must be a pair .* got tuple of ndarray, ndarray"),
        (None, "must be a pair .* got NoneType$"),
    ],
)  # fmt: skip
def test_a_batch_that_teaches_nothing_is_refused_where_it_enters(given, says, chunk):
    """At whichever step it comes, and read whole or in chunks."""
    with pytest.raises(ValueError, match=says):
        train(small_model(), lambda s: given if s == 2 else batch(s),
              Recipe(steps=3, chunk=chunk), progress=False)  # fmt: skip


def test_a_batch_that_is_no_function_is_refused():
    with pytest.raises(ValueError, match="batch must be a function of the step .* got tuple"):
        train(small_model(), batch(1), Recipe(steps=1), progress=False)


def test_a_loss_of_ones_own_need_not_score_columns():
    def own(model, ids, labels):
        return model(ids, use_cache=False).logits.square().mean()

    run = train(small_model(), lambda s: (IDS, torch.full_like(IDS, -100)), Recipe(steps=1),
                loss=own, progress=False)  # fmt: skip
    assert math.isfinite(run.losses[0])


def test_a_pair_may_be_one_tensor_of_two():
    run = train(small_model(), lambda s: torch.stack(batch(s)), Recipe(steps=1), progress=False)
    assert run.losses == train(small_model(), batch, Recipe(steps=1), progress=False).losses


def test_checkpoints_without_a_folder_are_refused():
    with pytest.raises(ValueError, match="checkpoint_every needs a folder"):
        train(small_model(), batch, Recipe(steps=1, checkpoint_every=1), progress=False)


@pytest.mark.parametrize("bad", [1, 2])
def test_divergence_in_a_chunk_still_knows_a_gradient(bad, monkeypatch):
    """Gradients are cleared only when the first chunk's loss is known to be finite."""
    calls = []

    def read_on(model, ids, labels, state):
        loss, state = read(model, ids, labels, state)
        calls.append(ids)
        return (loss * float("nan") if len(calls) == 2 * 4 + bad else loss), state

    read = bptt.read_on
    monkeypatch.setattr(bptt, "read_on", read_on)
    message = rf"chunk {bad} is nan at step 3; the largest gradient before it is .* of .*\."
    with pytest.raises(FloatingPointError, match=message):
        train(small_model(), batch, Recipe(steps=5, chunk=8), progress=False)


def test_chunks_of_one_step_leave_nothing_to_the_next():
    once, twice = small_model(), small_model()
    for model, steps in ((once, [1]), (twice, [2, 1])):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for step in steps:
            recipe = Recipe(steps=5, chunk=8, accumulate=2, clip=1e9)
            loop._step(single(model), optimizer, batch, scored_loss, recipe, step)
    for a, b in zip(once.parameters(), twice.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_records_say_which_code_ran(monkeypatch):
    monkeypatch.setenv("BMOJO_COMMIT", "0123abc")  # a copy without its history
    said = provenance()
    assert said["commit"] == "0123abc" and said["versions"]["torch"] == torch.__version__
    monkeypatch.delenv("BMOJO_COMMIT")
    commit = provenance()["commit"]
    assert commit is None or set(commit) <= set("0123456789abcdef")
