"""Many decompositions at once: workers, streams, ranks, and one progress bar."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from . import ranks, rules
from .memory import memory_error, reason
from .products import exact_products
from .threads import become_worker

MOST = 8  # workers, each of which holds a weight and its factors
STREAMS = 2  # on CUDA: one layer's panels hide behind another's products


class Job(NamedTuple):
    """The work of one weight, or of some of one shape together."""

    name: str
    shape: tuple[int, int]
    device: torch.device
    run: Callable[[], None]
    results: list[Tensor]  # what `run` fills in
    about: Callable[[], object]  # all that the results follow from, to compare between ranks
    weights: int = 1  # how many


def sweep(jobs: Sequence[Job], title: str, workers: int | None = None, progress: bool | None = None) -> None:
    """Runs all jobs, the costliest first. The first error, or Ctrl-C, stops what has not begun, and is raised.

    Each job has the thread count that its size asks for, however many run at a time: the bits are the same. Under
    torch.distributed each rank runs its share, and the results of all are on all ranks at the end.

    Args:
        jobs: under torch.distributed, the same list on every rank.
        title: of the progress bar.
        workers: how many at a time. None: as many as torch's threads allow, at most 8.
        progress: whether to show a bar. None: on a terminal.
    """
    costs = [job.weights * rules.cost(*job.shape) for job in jobs]
    told = [(job.name, job.shape, job.device.type, job.about()) for job in jobs] if ranks.sharing() else []
    owners = ranks.owners(told, costs)
    order = sorted(range(len(jobs)), key=lambda index: -costs[index])
    mine = [jobs[index] for index in order if owners is None or owners[index] == ranks.rank()]
    failure: BaseException | None = None
    try:
        with (
            exact_products("cpu"),
            tqdm(
                total=sum(job.weights for job in mine),
                desc=title,
                unit="module",
                leave=False,
                disable=_hidden(progress),
            ) as bar,
        ):
            for threads in sorted({rules.threads(*job.shape) for job in mine}, reverse=True):
                _run([job for job in mine if rules.threads(*job.shape) == threads], threads, workers, bar)
    except BaseException as error:
        if owners is None:
            raise
        failure = error  # Ctrl-C too: the other ranks have to hear of it
    if owners is not None:
        ranks.agree(failure)
        ranks.exchange([job.results for job in jobs], owners)


def _hidden(progress: bool | None) -> bool | None:
    return None if progress is None else not progress  # tqdm's own None: hidden where there is no terminal


def _run(jobs: list[Job], threads: int, workers: int | None, bar: tqdm) -> None:
    cuda = {job.device for job in jobs if job.device.type == "cuda"}
    count = workers or (STREAMS if cuda else max(1, min(MOST, torch.get_num_threads() // threads)))
    if count == 1 or len(jobs) == 1:
        for job in jobs:
            _run_one(job)
            bar.update(job.weights)
        return
    for device in cuda:
        torch.cuda.synchronize(device)  # the weights have to be there before other streams read them
    before, mode = torch.get_num_threads(), torch.is_inference_mode_enabled()
    with ThreadPoolExecutor(count, "decomposing", become_worker, (threads,)) as pool:
        tasks = {pool.submit(_work, job, mode): job.weights for job in jobs}
        try:
            for task in as_completed(tasks):
                task.result()
                bar.update(tasks[task])
        except BaseException:
            for task in tasks:
                task.cancel()
            raise
        finally:
            pool.shutdown(wait=True)
            torch.set_num_threads(before)


def _work(job: Job, inference: bool) -> None:
    """Runs a job in a worker: on a stream of its own on CUDA, and in the caller's mode, as a new thread has its own."""
    with torch.inference_mode(inference):
        if job.device.type != "cuda":
            _run_one(job)
            return
        stream = torch.cuda.Stream(job.device)
        try:
            with torch.cuda.stream(stream):
                _run_one(job)
        finally:
            stream.synchronize()  # before anything it allocated is given to another stream


def _run_one(job: Job) -> None:
    """Runs a job. Where memory is too little, the error names the weight and its size."""
    try:
        job.run()
    except (RuntimeError, MemoryError) as error:
        kind = memory_error(error)
        if kind is None:
            raise
        m, n = job.shape
        raise kind(
            f"{job.name} ({m} x {n}): there is too little memory on {job.device} for its singular values and vectors "
            f"({reason(error)}). Free some, compute on another device, or leave the module out of target_modules."
        ) from error
