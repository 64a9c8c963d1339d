"""Sweeps: a job's record is whole, named after its content, and never computed twice."""

import dataclasses
import json
import random

import pytest
import torch
import torch.nn.functional as F

from bmojo_core import BMojoConfig, BMojoForCausalLM
from bmojo_core.evaluation import accuracy_per_example, recall_accuracy
from bmojo_core.experiments import command as sweep_command
from bmojo_core.experiments import (
    external,
    figure2,
    figure2_random,
    harder,
    policies,
    table3,
    trained,
    wiring,
)
from bmojo_core.experiments.command import collect, results_folder
from bmojo_core.experiments.packed import Job, _Running, build, load_records, run_jobs, state_bytes
from bmojo_core.experiments.recall_data import make_pool
from bmojo_core.experiments.sweep import repeats
from bmojo_core.tasks import mqar
from bmojo_core.training import scored_loss

TASK = {"seq_len": 24, "pairs": [2, 4], "vocab_size": 32, "examples": 64, "held_out": 16}
SIZES = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "window": 4, "state_size": 4,
         "num_eidetic_tokens": 6, "num_fading_tokens": 1}  # fmt: skip


def job(**changes) -> Job:
    return dataclasses.replace(
        Job("bmojo", SIZES, TASK, steps=3, batch=4, tags={"kind": "bmojo"}), **changes
    )


def test_names_follow_content():
    assert job().name == job().name
    names = {
        job(**c).name for c in ({}, {"seed": 1}, {"lr": 1e-4}, {"sizes": {**SIZES, "window": 5}})
    }
    assert len(names) == 4


def test_weights_are_kept_where_asked(tmp_path):
    run_jobs([job()], tmp_path / "a", weights=tmp_path / "w", say=lambda line: None)
    (record,) = load_records(tmp_path / "a")
    model = BMojoForCausalLM.from_pretrained(tmp_path / "w" / job().name).eval()
    pool = make_pool(TASK)
    assert pool.evaluate(model) == record["accuracy"]


@pytest.mark.parametrize("kind", sorted(trained.RATES))
def test_kept_models_answer_as_recorded(kind):
    """The weights in results/ are those of the job, and new examples find them as good."""
    folder = results_folder() / "trained" / kind
    record = json.loads((folder / "record.json").read_text())
    assert Job(**record["job"]) == trained.job(kind)
    model = BMojoForCausalLM.from_pretrained(folder).eval()
    assert model.num_parameters() == record["parameters"]
    for pairs in (16, 64):
        examples = mqar(64, 256, pairs, seed=1)
        assert abs(recall_accuracy(model, *examples) - record["accuracy"][str(pairs)]) < 0.05


def test_a_recorded_job_is_not_run_again(tmp_path):
    jobs = [job(), job(seed=1)]
    said = []
    assert run_jobs(jobs, tmp_path, together=2, say=said.append) == 2
    before = [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())]
    assert run_jobs(jobs, tmp_path, say=said.append) == 0
    assert before == [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())]
    record = load_records(tmp_path)[0]
    assert Job(**record["job"]) in jobs and record["accuracy"].keys() == {"2", "4"}
    assert record["parameters"] == BMojoConfig.bmojo(vocab_size=32, **SIZES).parameter_count
    assert {"versions", "device", "seconds", "state_bytes"} <= record.keys()


def test_a_sweep_without_time_runs_nothing_and_leaves_nothing(tmp_path):
    assert run_jobs([job()], tmp_path, seconds=0.0) == 0 and not list(tmp_path.iterdir())


def test_runs_repeat_to_the_same_numbers(tmp_path):
    for folder in ("a", "b"):
        run_jobs([job()], tmp_path / folder, say=lambda line: None)
    a, b = (load_records(tmp_path / folder)[0]["evaluations"] for folder in ("a", "b"))
    assert a == b


def whole(examples):
    return [x.long() for x in (examples.ids, examples.positions, examples.targets)]


def test_pool_holds_mqar_examples():
    pool = make_pool(TASK)
    ids, labels = mqar(64, 24, 4, vocab_size=32, seed=4)
    kept_ids, positions, targets = whole(pool.train["4"])
    assert torch.equal(kept_ids, ids)
    rebuilt = torch.full_like(labels, -100)
    assert torch.equal(rebuilt.scatter(1, positions, targets), labels)
    _, positions, targets = whole(pool.train["2"])
    assert (targets != -100).all() and targets.shape[1] == 2


def test_packed_loss_and_accuracy_are_those_of_the_plain_path():
    running = _Running(job(), make_pool(TASK), "cpu")
    drawn = running.pool.draw(running.buffers, random.Random(1), torch.Generator().manual_seed(1))
    buffers = running.buffers[drawn]
    labels = torch.full((4, 24), -100)
    for row in range(4):
        for at, target in zip(buffers.positions[row], buffers.targets[row], strict=True):
            if target != -100:
                labels[row, at] = target.long()
    expected = scored_loss(running.model, buffers.ids.long(), labels)
    running._plain_step(drawn)
    torch.testing.assert_close(running.loss, expected.detach(), rtol=1e-5, atol=1e-6)
    data = mqar(16, 24, 4, vocab_size=32, seed=10_004)
    running.model.eval()
    plain = recall_accuracy(running.model, *data)
    assert abs(running.pool.evaluate(running.model)["4"] - plain) < 1e-4


def test_accuracy_is_the_mean_share_of_right_answers():
    torch.manual_seed(0)
    model = BMojoForCausalLM(BMojoConfig.mamba(vocab_size=32, hidden_size=16, num_layers=1)).eval()
    ids, labels = mqar(30, 24, 4, vocab_size=32, seed=0)
    said = F.log_softmax(model(ids).logits, -1).argmax(-1)
    by_hand = [
        sum(int(said[i, t] == labels[i, t]) for t in range(24) if labels[i, t] != -100) / 4
        for i in range(30)
    ]
    torch.testing.assert_close(
        accuracy_per_example(model, ids, labels, batch_size=7), torch.tensor(by_hand).double()
    )
    with pytest.raises(ValueError, match="score at least one column"):
        accuracy_per_example(model, ids, torch.full_like(labels, -100))


def test_oracle_scores_are_the_values_columns():
    pool = make_pool({**TASK, "pairs": [3]})
    assert pool.train["3"].useful.nonzero()[:, 0].tolist() == [1, 3, 5]
    buffers = pool.buffers(2)
    assert pool.draw(buffers, random.Random(0), torch.Generator()) == "3"
    assert buffers["3"].scores.nonzero()[:, 1].tolist() == [1, 3, 5] * 2


def test_state_bytes_do_not_grow_except_for_full_attention():
    bmojo = BMojoConfig.bmojo(vocab_size=32, **SIZES)
    full = BMojoConfig.transformer(vocab_size=32, hidden_size=16, num_layers=1, num_heads=2)
    assert state_bytes(bmojo, 1) == state_bytes(bmojo, 40)
    assert state_bytes(full, 40) > 30 * state_bytes(full, 1)


def test_figure_2_repeats_the_best_rate(tmp_path):
    folder = tmp_path / "runs" / "figure2"
    folder.mkdir(parents=True)
    for lr, accuracy in ((1e-3, 0.2), (3e-3, 0.9), (9e-3, 0.4)):
        made = figure2.job("mamba", 8, lr, 0)
        record = {"job": dataclasses.asdict(made), "accuracy": {"16": accuracy}}
        (folder / f"{made.name}.json").write_text(json.dumps(record))
    repeats = figure2.repeats(folder)
    assert [(j.lr, j.seed) for j in repeats] == [(3e-3, 1), (3e-3, 2)]
    assert len({j.name for j in figure2.jobs(tmp_path)}) == 75 + 24 + 2


def test_figure_2_widens_the_grid_while_the_best_rate_is_at_its_edge(tmp_path):
    def record(lr, accuracy):
        made = figure2.job("hybrid", 16, lr, 0)
        content = {"job": dataclasses.asdict(made), "accuracy": {"64": accuracy}}
        (tmp_path / f"{made.name}.json").write_text(json.dumps(content))
        return [job.lr for job in figure2.beyond(tmp_path)]

    assert record(3e-3, 0.2) == record(9e-3, 0.4) == []  # no grid yet
    assert record(1e-3, 0.1) == [0.027]
    assert record(0.027, 0.3) == [0.027]  # inside now; what was added stays in the list
    assert record(0.027, 0.5) == [0.081, 0.027]


SWEEPS = (table3, policies, harder, external)


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda sweep: sweep.__name__.rsplit(".", 1)[-1])
@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_a_sweep_lists_every_job_once_and_each_is_a_model(sweep, size, tmp_path):
    jobs = sweep.jobs(tmp_path, size)
    assert len({job.name for job in jobs}) == len(jobs)
    different = {(job.kind, json.dumps(job.sizes, sort_keys=True)): job for job in jobs}
    for job in different.values():
        with torch.device("cpu" if job.kind == external.BEGUN_AS_THEIRS else "meta"):
            assert build(job, 64).config.hidden_size == job.sizes["hidden_size"]


def test_the_best_rate_is_repeated_once_its_group_is_complete(tmp_path):
    first = [job(lr=lr, tags={"kind": "bmojo", "lr": lr, "seed": 0}) for lr in (1e-3, 1e-2)]
    for made, accuracy in zip(first, (0.9, 0.3), strict=True):
        assert repeats(first, tmp_path, (1, 2)) == []
        record = {"job": dataclasses.asdict(made), "accuracy": {"4": accuracy}}
        (tmp_path / f"{made.name}.json").write_text(json.dumps(record))
    again = repeats(first, tmp_path, (1, 2))
    assert [(j.lr, j.seed, j.tags["seed"]) for j in again] == [(1e-3, 1, 1), (1e-3, 2, 2)]


@pytest.mark.parametrize(("ours", "theirs"), external.PAIRS.items())
@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_outside_models_have_our_parameters(ours, theirs, size):
    with torch.device("meta"):
        models = [build(external.job(size, kind, 1e-3), 100) for kind in (ours, theirs)]
    shapes = [sorted(tuple(p.shape) for p in model.parameters()) for model in models]
    assert shapes[0] == shapes[1]


def test_our_mamba_learns_as_theirs_from_the_same_weights():
    """Same seed, same initial weights, same batches: the losses are the same, step by step."""
    runs = []
    for kind in (external.PAIRS["mamba"], external.BEGUN_AS_THEIRS):
        made = external.job("cpu", kind, 4e-3)
        made = dataclasses.replace(made, task={**made.task, "examples": 64, "held_out": 8})
        runs.append(_Running(made, make_pool(made.task), "cpu"))
    for _ in range(4):
        losses = []
        for run in runs:
            run.advance()
            losses.append(float(run.loss))
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    learned = [{p.shape: p for p in run.model.parameters()} for run in runs]
    for shape, theirs in learned[0].items():
        torch.testing.assert_close(learned[1][shape], theirs, rtol=1e-3, atol=2e-5)


def test_collect_takes_the_sweeps_own_records(tmp_path, capsys):
    jobs = [job(), job(seed=1)]
    run_jobs(jobs[:1], tmp_path / "runs" / "x", say=lambda line: None)
    content = json.loads(collect("x", jobs, tmp_path).read_text())
    assert content["jobs"] == 2 and len(content["runs"]) == 1
    assert "1 of 2 runs" in capsys.readouterr().out


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A working directory apart from a checkout; sweeps are called as from the shell there."""
    package = tmp_path / "checkout" / "bmojo_core"
    (package.parent / "results").mkdir(parents=True)
    (package.parent / "pyproject.toml").touch()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    find = results_folder
    monkeypatch.setattr(sweep_command, "results_folder", lambda: find(package))

    def call(function, jobs, *arguments):
        monkeypatch.setattr("sys.argv", ["sweep", *arguments])
        function("x", jobs, "A sweep.")

    return call


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--shard", "3"], "--shard: must be i/n with 0 <= i < n, got '3'"),
        (["--shard", "3/0"], "got '3/0'"),
        (["--shard=-1/2"], "got '-1/2'"),
        (["--shard", "2/2"], "got '2/2'"),
        (["--shard", "a/b"], "got 'a/b'"),
        (["--only", "nomatch"], "--only: must be part of a job's name, such as bmojo-"),
        (["--only", "nomatch", "--collect"], "none of 2 jobs is named so, got 'nomatch'"),
    ],
)
@pytest.mark.parametrize("function", [sweep_command.main, sweep_command.command])
def test_a_choice_of_no_jobs_is_refused_and_writes_nothing(
    elsewhere, tmp_path, capsys, function, arguments, says
):
    def jobs(folder, size="cpu"):
        return [job(), job(seed=1)]

    with pytest.raises(SystemExit) as ended:
        elsewhere(function, jobs, *arguments)
    assert ended.value.code == 2 and says in capsys.readouterr().err
    assert not list((tmp_path / "here").iterdir())
    assert not list((tmp_path / "checkout" / "results").iterdir())


def test_a_size_without_jobs_is_refused_but_collected_with_the_other(elsewhere, tmp_path, capsys):
    results = tmp_path / "checkout" / "results"
    with pytest.raises(SystemExit) as ended:
        elsewhere(sweep_command.main, figure2_random.jobs)
    assert ended.value.code == 2 and not list(results.iterdir())
    assert "--size: must be a size of which x has jobs (gpu), got 'cpu'" in capsys.readouterr().err
    elsewhere(sweep_command.main, figure2_random.jobs, "--collect")
    assert json.loads((results / "x.json").read_text())["jobs"] == 45


@pytest.mark.parametrize("function", [sweep_command.main, sweep_command.command])
def test_a_sweep_finds_the_checkouts_records_from_any_folder(elsewhere, tmp_path, capsys, function):
    results, asked = tmp_path / "checkout" / "results", []

    def jobs(folder, size="cpu"):
        asked.append(str(folder))
        return [job(seed=0 if size == "cpu" else 1)]

    run_jobs(jobs("given"), results / "runs" / "x", say=lambda line: None)
    elsewhere(function, jobs, "--shard", "0/1", "--only", "bmojo")
    said = capsys.readouterr().out
    assert "1 jobs, 1 here, 0 to run" in said and f"records in {results / 'runs' / 'x'}" in said
    assert len(json.loads((results / "x.json").read_text())["runs"]) == 1
    assert not list((tmp_path / "here").iterdir())
    assert all(place.startswith(str(results)) for place in asked[1:])
    elsewhere(function, jobs, "--list", "--results", "mine")
    assert "1 to run" in capsys.readouterr().out and asked[-1].startswith("mine")


def test_results_are_the_checkouts_where_there_is_one(tmp_path):
    package = tmp_path / "bmojo_core"
    assert str(results_folder(package)) == "results"
    (tmp_path / "results").mkdir()
    assert str(results_folder(package)) == "results"  # installed beside some folder of that name
    (tmp_path / "pyproject.toml").touch()
    assert results_folder(package) == tmp_path / "results"


def test_wiring_variants_are_valid_configurations_and_differ():
    sizes = [
        getattr(BMojoConfig, kind)(vocab_size=64, **{**wiring.BASE, **changes}).to_json_string()
        for kind, changes in wiring.VARIANTS.values()
    ]
    assert len(set(sizes)) == len(sizes) == 24
