"""What can go wrong with a disk or a process leaves a whole checkpoint and a plain message."""

import errno
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bmojo_core import BMojoConfig, BMojoForCausalLM
from bmojo_core.training import Recipe, adamw, scored_loss, train
from bmojo_core.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint

RECIPE = Recipe(steps=3, checkpoint_every=1)


def small_model() -> BMojoForCausalLM:
    torch.manual_seed(0)
    sizes = dict(vocab_size=16, hidden_size=16, num_layers=1, num_heads=2, window=4, state_size=4)
    return BMojoForCausalLM(BMojoConfig.bmojo(**sizes, num_eidetic_tokens=2))


def batch(step: int):
    g = torch.Generator().manual_seed(step)
    ids = torch.randint(16, (2, 9), generator=g)
    return ids[:, :-1], ids[:, 1:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with one checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    train(small_model(), batch, RECIPE, folder=folder, progress=False)
    return folder


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


# ------------------------------------------------------------------- killed at a random instant

KILLED = """
import os, signal, sys, time
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from test_faults import batch, small_model
from bmojo_core.training import Recipe, train

def run(folder):
    train(small_model().double(), batch, Recipe(steps=10**6, checkpoint_every=1), folder=folder,
          progress=False)

def newest(folder):
    return max((name for name in os.listdir(folder) if name.startswith("step-")), default="")

train(small_model().double(), batch, Recipe(steps=1), progress=False)  # all imports are done
for line in sys.stdin:  # a folder and a delay: train there in a child, and kill it
    folder, delay = line.rsplit(" ", 1)
    child = os.fork()
    if child == 0:
        try:
            run(folder)
        finally:
            os._exit(3)
    begun, old = time.monotonic(), newest(folder)
    while newest(folder) == old:  # until it has come as far as a checkpoint of its own
        if os.waitpid(child, os.WNOHANG)[0] or time.monotonic() - begun > 60:
            print("no checkpoint", flush=True)
            os._exit(4)
        time.sleep(0.002)
    time.sleep(float(delay))
    os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_killed_run_always_leaves_a_whole_checkpoint(tmp_path):
    """SIGKILL at 20 random instants of runs that write checkpoints most of the time.

    Each run but the first goes on from what the one before has left; afterwards the state is that
    of a run that nobody killed.
    """
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw, reached, torn = random.Random(seed), [], 0
    script = textwrap.dedent(KILLED).format(tests=str(Path(__file__).parent))
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        for _ in range(20):
            parent.stdin.write(f"{tmp_path} {draw.uniform(0.0, 0.15)}\n")
            parent.stdin.flush()
            assert parent.stdout.readline().strip() == str(-signal.SIGKILL)
            torn += any(path.name.startswith(".partial") for path in tmp_path.iterdir())
            newest = checkpoints(tmp_path)[-1]
            model = small_model().double()
            run = load_checkpoint(newest, model, adamw(model, 1e-3, 1e-3))
            assert run["step"] == len(run["losses"]) == int(newest.name[5:])
            reached.append(run["step"])
        parent.stdin.close()
    assert reached == sorted(reached) and reached[-1] > reached[0]
    print(f"steps {reached}, {torn} kills in the middle of a write")
    losses = []
    with pytest.raises(KeyboardInterrupt):  # the same steps, undisturbed
        train(
            small_model().double(),
            batch,
            Recipe(**{**run["recipe"], "checkpoint_every": 0}),
            loss=recording(losses),
            progress=False,
            stop=lambda: len(losses) == reached[-1],
        )
    assert losses == pytest.approx(run["losses"], rel=1e-12)


def recording(losses: list[float]):
    """The loop's loss, noting its values."""

    def loss(model, ids, labels):
        value = scored_loss(model, ids, labels)
        losses.append(float(value.detach()))
        return value

    return loss


def test_what_a_killed_run_has_left_is_cleared_away(folder):
    (folder / ".partial-1").mkdir()
    (folder / ".partial-1" / "model.safetensors").write_bytes(b"half")
    model = small_model()
    save_checkpoint(folder, 4, model, adamw(model, 1e-3, 1e-3), {})
    assert [path.name for path in folder.iterdir()] == ["step-00000004"]


# ------------------------------------------------------------------------------------ the disk


@pytest.mark.parametrize("room", [0, 1000, 20000])
def test_a_full_disk_leaves_the_last_checkpoint(folder, room):
    """The system itself refuses to write beyond ``room`` bytes a file (EFBIG, as ENOSPC would)."""
    model = small_model()
    optimizer = adamw(model, 1e-3, 1e-3)
    load_checkpoint(checkpoints(folder)[-1], model, optimizer)
    before = contents(folder)
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
    try:
        with pytest.raises(OSError, match="cannot write .*File too large"):
            save_checkpoint(folder, 4, model, optimizer, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert contents(folder) == before
    assert load_checkpoint(checkpoints(folder)[-1], model, optimizer)["step"] == 3


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_no_space_left_is_what_the_message_says(folder, monkeypatch):
    """A write that the system ends with ENOSPC, in the last of the files."""
    from bmojo_core.training import checkpoint

    def write_text(path, text):
        with open("/dev/full", "w") as full:
            full.write(text)

    model, before = small_model(), contents(folder)
    monkeypatch.setattr(checkpoint.Path, "write_text", write_text)
    with pytest.raises(OSError) as caught:
        save_checkpoint(folder, 4, model, adamw(model, 1e-3, 1e-3), {})
    assert caught.value.errno == errno.ENOSPC
    assert contents(folder) == before


def test_a_folder_that_cannot_be_written(folder):
    """A read-only folder; root may write anywhere, so for root a file stands in the way."""
    model, before = small_model(), contents(folder)
    target = folder
    if os.geteuid() == 0:
        target = folder / "step-00000003" / "run.json"
    else:
        folder.chmod(0o555)
    try:
        with pytest.raises(OSError, match=str(target)):
            save_checkpoint(target, 4, model, adamw(model, 1e-3, 1e-3), {})
    finally:
        folder.chmod(0o755)
    assert contents(folder) == before


# -------------------------------------------------------------------------------- damaged files


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "run.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "missing"])
def test_a_damaged_file_is_named_and_nothing_is_touched(folder, name, damage):
    path = checkpoints(folder)[-1] / name
    content = path.read_bytes()
    place = random.Random(len(content)).randrange(len(content) * 8)
    flipped = bytearray(content)
    flipped[place // 8] ^= 1 << place % 8
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"cut": content[:-7], "flip": bytes(flipped), "empty": b""}[damage])
    before = contents(folder)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        train(small_model(), batch, RECIPE, folder=folder, progress=False)
    assert contents(folder) == before


def test_the_checkpoint_before_a_damaged_one_is_pointed_at(tmp_path):
    train(small_model(), batch, RECIPE, folder=tmp_path, keep=2, progress=False)
    older, newest = checkpoints(tmp_path)
    (newest / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"run\.json .*remove it to go on from {older.name}"):
        train(small_model(), batch, RECIPE, folder=tmp_path, keep=2, progress=False)
    shutil.rmtree(newest)
    run = train(small_model(), batch, RECIPE, folder=tmp_path, keep=2, progress=False)
    assert len(run.losses) == 3


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_saved_model_that_is_cut_or_altered_is_refused(tmp_path, damage):
    """Weights that transformers saves carry no sums: what cannot be read at all is refused."""
    small_model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    content = bytearray(path.read_bytes())
    content = content[:-8] if damage == "cut" else b"\xff" + content[1:]
    path.write_bytes(content)
    with pytest.raises(Exception, match=r"(?i)header|incomplete|safetensors|deserializ"):
        BMojoForCausalLM.from_pretrained(tmp_path)


# --------------------------------------------------------------------------------- no unpickling


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "run.json"])
def test_a_pickle_in_a_checkpoint_is_not_executed(folder, tmp_path, name):
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    path = checkpoints(folder)[-1]
    (path / name).write_bytes(bomb)
    (path / "optimizer.pt").write_bytes(bomb)
    forge(path)
    with pytest.raises(Exception):  # noqa: B017  (what reads the file decides which)
        train(small_model(), batch, RECIPE, folder=folder, progress=False)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(bomb)
    assert (tmp_path / "exploded").exists()  # it was a bomb


@pytest.mark.parametrize("torch_format", [False, True])
def test_a_pickle_in_a_model_folder_is_not_executed(tmp_path, torch_format):
    small_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    content = Bomb(tmp_path / "exploded")
    if torch_format:
        torch.save({"model.norm.weight": content}, tmp_path / "pytorch_model.bin")
    else:
        (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(content))
    with pytest.raises(Exception):  # noqa: B017
        BMojoForCausalLM.from_pretrained(tmp_path)
    assert not (tmp_path / "exploded").exists()


def forge(path: Path) -> None:
    """Sums that fit whatever the files hold now."""
    from bmojo_core.training.checkpoint import FILES, _sha256

    sums = {name: _sha256(path / name) for name in FILES}
    (path / "sha256.json").write_text(json.dumps(sums))


def test_a_checkpoint_with_forged_sums_must_still_fit_the_model(folder):
    path = checkpoints(folder)[-1]
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, path / "model.safetensors")
    forge(path)
    with pytest.raises(ValueError, match=r"does not fit the model: model\.norm\.weight is \(3,\)"):
        train(small_model(), batch, RECIPE, folder=folder, progress=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*") if path.is_file()
    }  # fmt: skip
