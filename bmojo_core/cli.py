"""The ``bmojo`` command: train, eval, generate, convert, inspect, info.

Each command reads its input, calls one public function and writes what it says it writes.  Exit
codes: 0 done; 1 the run failed (a full disk, a loss that is not finite); 2 the input is wrong;
130 stopped by Ctrl-C (training then leaves a checkpoint, and the same command goes on from it).
Where nobody reads on (``bmojo inspect .. | head``) a command ends without a word, with 1.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bmojo_core import BMojoConfig, BMojoForCausalLM
from bmojo_core.cache import state_bytes
from bmojo_core.config import KINDS, PRESETS
from bmojo_core.tasks.text_tokens import Bytes

FAILED, WRONG_INPUT, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="bmojo",
    help="B'MOJO: sequence models with fading and eidetic memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
Folder = Annotated[Path, typer.Argument(help="A folder that save_pretrained has written.")]


def plain_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Foreseen errors as one line on stderr and an exit code; others keep their traceback."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
            _fail(error, WRONG_INPUT)
        except BrokenPipeError:
            raise  # typer ends quietly: the reader of our output has seen enough
        except (OSError, FloatingPointError) as error:
            _fail(error, FAILED)
        except KeyboardInterrupt as error:
            typer.echo(str(error) or "interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from error

    return run


def _fail(error: Exception, code: int) -> None:
    typer.echo(f"error: {error}", err=True)
    raise typer.Exit(code) from error


# ------------------------------------------------------------------------------------- training


@app.command(
    epilog="Examples:  bmojo train run.yaml --output runs/first  |  "
    "bmojo train run.yaml --output runs/second --set training.steps=200 --set model.window=64  |  "
    "accelerate launch --num_processes 8 -m bmojo_core.cli train run.yaml --output runs/third"
)
@plain_errors
def train(
    settings: Annotated[Path, typer.Argument(help="YAML with the parts model, data, training.")],
    output: Annotated[Path, typer.Option(help="Folder of checkpoints, record and final model.")],
    change: Annotated[
        list[str] | None, typer.Option("--set", help="PART.KEY=VALUE, over the file's value.")
    ] = None,
    keep: Annotated[int, typer.Option(min=1, help="Checkpoints to keep.")] = 1,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Train a model; the same command goes on from where it stopped."""
    from bmojo_core.training import loop, write_json
    from bmojo_core.training.engine import launched, single
    from bmojo_core.training.interruption import interruption
    from bmojo_core.training.settings import read_settings
    from bmojo_core.training.text import read_tokens, sequences

    plan = read_settings(settings, tuple(change or ()))
    recipe, data = plan.training, plan.data
    ids = _known_tokens(read_tokens(data.path), plan.model, data.path)
    batch = sequences(ids, data.batch_size, data.length, recipe.seed)
    torch.manual_seed(recipe.seed)
    model = BMojoForCausalLM(plan.model)
    engine = launched(model) if "WORLD_SIZE" in os.environ else single(model.to(_device()))
    with interruption() as asked:
        run = loop.train(
            model, batch, recipe, engine=engine, evaluate=_validation(plan), keep=keep,
            folder=output / "checkpoints", name=plan.model.kind, progress=progress, stop=asked,
        )  # fmt: skip
    weights = engine.whole_weights()
    if engine.is_main:
        model.save_pretrained(output / "model", state_dict=weights)
        record = {"losses": run.losses, "evaluations": run.evaluations, "seconds": run.seconds}
        write_json(output / "record.json", {**record, **run.record})
        typer.echo(f"{output / 'model'}: loss {run.losses[-1]:.4f} after {len(run.losses)} steps")


def _validation(plan: Any) -> Callable[[BMojoForCausalLM], dict[str, float]] | None:
    """Mean loss on batches of the validation file, the same ones every time."""
    from bmojo_core.training.loop import scored_loss
    from bmojo_core.training.text import read_tokens, sequences

    data = plan.data
    if data.validation is None:
        return None
    ids = _known_tokens(read_tokens(data.validation), plan.model, data.validation)
    batch = sequences(ids, data.batch_size, data.length, seed=0)

    def evaluate(model: BMojoForCausalLM) -> dict[str, float]:
        steps = range(data.validation_batches)
        losses = [scored_loss(model, *(x.to(model.device) for x in batch(s))) for s in steps]
        return {"loss": float(torch.stack(losses).mean())}

    return evaluate


def _known_tokens(ids: Any, config: BMojoConfig, path: str) -> Any:
    """The ids, if a look at their beginning finds none that the model does not know."""
    largest = int(ids[: 1 << 20].max())
    if largest >= config.vocab_size:
        raise ValueError(
            f"{path} holds token {largest}, but model.vocab_size is {config.vocab_size}"
        )
    return ids


# ----------------------------------------------------------------------------------- evaluation


@app.command(
    name="eval",
    epilog="Examples:  bmojo eval runs/first/model --text book.txt --length 32768  |  "
    "bmojo eval converted/ --tasks lambada_openai,hellaswag",
)
@plain_errors
def evaluate(
    folder: Folder,
    text: Annotated[
        Path | None, typer.Option(help="Perplexity by position on this text or .npy of ids.")
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens to read from the text.")] = 8192,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens read at a time.")] = 1024,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness, with commas between.")
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option(help="A folder with task files of your own.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples a task.")] = None,
    output: Annotated[Path | None, typer.Option(help="A JSON file for the numbers.")] = None,
) -> None:
    """Perplexity against position on a text, or tasks of lm-evaluation-harness."""
    if (text is None) == (tasks is None):
        raise ValueError("give either --text or --tasks")
    if output is not None and not output.parent.is_dir():
        raise ValueError(f"output must be in a folder that exists, got {output}")
    if text is not None:
        found = _by_position(_load(folder), folder, text, length, chunk)
    else:
        from bmojo_core.evaluation.harness import run_tasks

        found = run_tasks(_with_weights(folder), tasks.split(","), task_folder, limit)
    if output is not None:
        from bmojo_core.training import write_json

        write_json(output, found)
    typer.echo(json.dumps(found, indent=1))


def _by_position(
    model: BMojoForCausalLM, folder: Path, text: Path, length: int, chunk: int
) -> dict[str, Any]:
    from bmojo_core.evaluation.positions import doubling_edges, perplexity_by_position
    from bmojo_core.training.text import read_tokens

    if text.suffix == ".npy":
        ids = torch.from_numpy(read_tokens(text)[:length].astype("int64"))
    else:
        ids = torch.tensor(_tokenizer(folder, model.config).encode(text.read_text())[:length])
    if len(ids) < 2:
        raise ValueError(f"text must hold at least 2 tokens, {text} holds {len(ids)}")
    found = perplexity_by_position(model, [ids[None]], doubling_edges(len(ids)), chunk)
    return {
        "from": list(found.edges[:-1]), "to": list(found.edges[1:]),
        "perplexity": found.perplexity.tolist(), "tokens": found.count.tolist(),
    }  # fmt: skip


# ----------------------------------------------------------------------------------- generation


@app.command(
    epilog="Examples:  bmojo generate runs/first/model 'Once upon a time'  |  "
    "bmojo generate runs/first/model 'Once' --tokens 200 --temperature 0.8 --seed 1"
)
@plain_errors
def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Argument(help="What to go on from.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws, when the temperature is not 0.")] = 0,
) -> None:
    """Continue a text."""
    model = _load(folder)
    tokenizer = _tokenizer(folder, model.config)
    read = _some_tokens(tokenizer, prompt)
    torch.manual_seed(seed)
    draws = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    ids = torch.tensor([read], device=model.device)
    mask = torch.ones_like(ids)
    written = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, **draws)
    typer.echo(tokenizer.decode(written[0].tolist()))


# -------------------------------------------------------------------------------------- folders


@app.command(
    epilog="Example:  bmojo convert path/to/Mistral-7B converted/  "
    "(Mistral, Llama, Mamba, FalconMamba, Jamba)"
)
@plain_errors
def convert(
    source: Annotated[Path, typer.Argument(help="A transformers model's folder (safetensors).")],
    output: Annotated[Path, typer.Argument(help="Where the B'MOJO with the same logits goes.")],
) -> None:
    """Convert a transformers model to a B'MOJO that computes the same logits."""
    import shutil

    from bmojo_core.convert import from_hf

    if output.exists() and any(output.iterdir()):
        raise ValueError(f"output must be a new or empty folder, {output} holds files")
    model = from_hf(source)
    model.save_pretrained(output)
    for file in sorted({*source.glob("tokenizer*"), *source.glob("special_tokens*")}):
        shutil.copy(file, output)
    typer.echo(f"{output}: {_summary(model.config)}")


@app.command(
    epilog="Example:  bmojo inspect runs/first/model 'The key of Ann is 7 .. what is her key?'"
)
@plain_errors
def inspect(
    folder: Folder,
    prompt: Annotated[str, typer.Argument(help="A text to read.")],
) -> None:
    """What each layer kept in its eidetic memory while it read a text, and who used it."""
    from bmojo_core.inspect import memory_trace

    model = _load(folder)
    tokenizer = _tokenizer(folder, model.config)
    ids = _some_tokens(tokenizer, prompt)
    with torch.no_grad():
        traces = memory_trace(model, torch.tensor([ids], device=model.device))
    for trace in traces:
        window, fading, eidetic = trace.mass[0].mean(0).tolist()
        shares = f"window {window:.2f}, fading {fading:.2f}, eidetic {eidetic:.2f}"
        typer.echo(f"layer {trace.layer}: attention to {shares}")
        for t in trace.remembered():
            score = float(trace.score[0, t])
            typer.echo(f"  {t:6d}  {score:10.4g}  {tokenizer.decode(ids[t : t + 1])!r}")


@app.command(
    epilog="Examples:  bmojo info runs/first/model  |  bmojo info 1.4b  |  "
    "bmojo info 1.4b --kind hybrid --ranks 8 --batch 4 --length 2048"
)
@plain_errors
def info(
    model: Annotated[str, typer.Argument(help=f"A folder, or one of {', '.join(PRESETS)}.")],
    kind: Annotated[str, typer.Option(help=f"Of a preset: {', '.join(KINDS)}.")] = "bmojo",
    ranks: Annotated[int, typer.Option(min=1, help="GPUs that share the training state.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Rows a GPU.")] = 1,
    length: Annotated[int, typer.Option(min=1, help="Tokens a row.")] = 2048,
) -> None:
    """Sizes of a model: parameters, bytes of its state, bytes to train it."""
    from bmojo_core.training.memory import training_memory

    if model in PRESETS:
        config = BMojoConfig.preset(model, kind)
    else:
        if not _is_saved(Path(model)):
            raise ValueError(
                f"model must be a preset ({', '.join(PRESETS)}) or a folder with a config.json, "
                f"got {model!r}"
            )
        config = BMojoConfig.from_pretrained(Path(model), local_files_only=True)
    typer.echo(_summary(config))
    state = state_bytes(config, dtype=torch.bfloat16, read=length)
    typer.echo(f"state of a row after {length} tokens, bfloat16: {_bytes(state)}")
    typer.echo(
        f"training on {ranks} GPU{'s' if ranks > 1 else ''}, {batch} x {length} tokens each:"
    )
    for name, value in training_memory(config, ranks, batch, length).table():
        typer.echo(f"  {name:<28}{_bytes(value):>12}")


def _summary(config: BMojoConfig) -> str:
    return (
        f"{config.kind}, {config.parameter_count:,} parameters, {len(config.layer_types)} "
        f"sublayers, width {config.hidden_size}, window {config.window}, "
        f"{config.num_fading_tokens} fading and {config.num_eidetic_tokens} eidetic tokens"
    )


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def _is_saved(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _with_weights(folder: Path) -> Path:
    """The folder, if a model was saved there; a preset has sizes alone."""
    if not _is_saved(folder):
        reason = ""
        if str(folder) in PRESETS:
            reason = ", a preset, which has sizes but no weights: train it first ('bmojo train')"
        raise ValueError(
            f"folder must be one that save_pretrained has written, with a config.json, "
            f"got {str(folder)!r}{reason}"
        )
    return folder


def _load(folder: Path) -> BMojoForCausalLM:
    """A saved model, from safetensors alone: nothing is unpickled, nothing downloaded."""
    model = BMojoForCausalLM.from_pretrained(
        _with_weights(folder), use_safetensors=True, local_files_only=True
    )
    return model.to(_device()).eval()


def _device() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _tokenizer(folder: Path, config: BMojoConfig) -> Any:
    """The folder's own tokenizer, or bytes for a vocabulary of 256."""
    if any(folder.glob("tokenizer*")):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if config.vocab_size != Bytes.vocab_size:
        raise ValueError(
            f"{folder} holds no tokenizer, and its vocabulary of {config.vocab_size} is not bytes"
        )
    return Bytes()


def _some_tokens(tokenizer: Any, prompt: str) -> list[int]:
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ValueError("prompt must hold at least one token")
    return ids


if __name__ == "__main__":
    app()
