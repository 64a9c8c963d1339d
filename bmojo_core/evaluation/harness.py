"""lm-evaluation-harness on a saved folder, through its own ``hf`` model.

Nothing of the harness is replaced: it loads the folder with transformers' Auto classes, which know
B'MOJO once this package is imported.  The same from a shell:

    bmojo eval FOLDER --tasks lambada_openai,hellaswag
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def run_tasks(
    folder: str | Path,
    tasks: Sequence[str],
    task_folder: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    device: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Metrics of every task.

    Parameters
    ----------
    folder
        What ``save_pretrained`` has written, with its tokenizer.
    tasks
        Names of the harness's tasks, or of those in ``task_folder``.
    task_folder
        Tasks of your own, as the harness's YAML files.
    limit
        Examples a task; None for all.
    device
        None: an accelerator if there is one.

    Raises
    ------
    ModuleNotFoundError
        When lm-evaluation-harness is not installed (``pip install "lm_eval>=0.4.13"``;
        older ones do not load with transformers 5).
    ValueError
        When the folder holds no model or no tokenizer.
    """
    folder = Path(folder)
    for name, pattern in {"model": "config.json", "tokenizer": "tokenizer*"}.items():
        if not any(folder.glob(pattern)):
            raise ValueError(f"folder must hold a {name}, {str(folder)!r} has no {pattern}")
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = HFLM(pretrained=str(folder), batch_size=batch_size, device=device)
    manager = TaskManager(include_path=None if task_folder is None else str(task_folder))
    found = simple_evaluate(model=model, tasks=list(tasks), task_manager=manager, limit=limit)
    return found["results"]
