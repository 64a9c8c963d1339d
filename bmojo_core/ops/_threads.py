"""Run a compiled kernel that releases the interpreter lock over independent tasks, in threads.

Plain Python threads rather than a compiled threading layer: they compile nothing, survive a
fork, may be entered from any thread at once, and follow `torch.set_num_threads`.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import torch

PIECES_PER_THREAD = 4  # more pieces than threads, so that a slow core does not hold up the rest


def split_tasks(tasks: int, cost: int) -> list[tuple[int, int]]:
    """Cut `range(tasks)` into contiguous pieces for `run_pieces`.

    Parameters
    ----------
    tasks : int
        Number of independent tasks.
    cost : int
        Elementary operations in all of them; a small job stays in one piece, since waking
        threads takes longer (tens of microseconds).

    Returns
    -------
    list of (first, last)
        Half-open ranges; they depend only on the arguments and the number of threads.
    """
    threads = torch.get_num_threads() if cost > 200_000 else 1
    pieces = min(tasks, threads * PIECES_PER_THREAD) if threads > 1 else 1
    edges = [tasks * i // pieces for i in range(pieces + 1)]
    return list(pairwise(edges))


def run_pieces(kernel: Callable[..., None], pieces: list[tuple[int, int]], *arguments) -> None:
    """Call `kernel(piece, first, last, *arguments)` for every piece and wait for all."""
    if len(pieces) == 1:
        kernel(0, *pieces[0], *arguments)
        return
    pool = _pool(os.getpid(), torch.get_num_threads())
    calls = [pool.submit(kernel, i, *piece, *arguments) for i, piece in enumerate(pieces)]
    for call in calls:
        call.result()


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """The threads of this process: a forked child has none of its parent's and starts its own."""
    return ThreadPoolExecutor(threads, thread_name_prefix="bmojo")
