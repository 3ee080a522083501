"""Runs a function in several processes that have met, as torchrun would start them."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch

from afd_kernels.dispatch import OPS

# Imported once, in the server from which every process is forked: what a run imports on its way.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "tests.afd.distributed",
        "torch.distributed.fsdp",
        "torch._dynamo",
        "peft",
        *(f"afd_kernels.{op}.triton_impl" for op in OPS),
    ]
)
PATIENCE_S = 300


def together(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """function(*args) in each of `world` processes; what they return, by rank.

    An exception of one is raised here as RuntimeError with its words; none outlives this call.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes, processes = [], []
    for rank in range(world):
        ours, theirs = SERVER.Pipe()
        facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
        facts |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        process = SERVER.Process(target=_one, args=(theirs, facts, function, args))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        answers = [_answer(pipe) for pipe in pipes]
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    if any(kind != "returned" for kind, _ in answers):
        said = [
            f"process {rank} {kind}: {str(value)[:500]}"
            for rank, (kind, value) in enumerate(answers)
        ]
        raise RuntimeError("; ".join(said))
    return [value for _, value in answers]


def _answer(pipe: Any) -> tuple[str, Any]:
    if not pipe.poll(PATIENCE_S):
        return "hangs", None
    try:
        return pipe.recv()
    except EOFError:
        return "ended", None


def _one(pipe: Any, facts: dict[str, Any], function: Callable[..., Any], args: Any) -> None:
    os.environ.update({key: str(value) for key, value in facts.items()})
    torch.set_num_threads(1)
    try:
        answer = ("returned", function(*args))
    except BaseException as error:
        answer = ("raised", repr(error))
    pipe.send(answer)
    # As a real process would, without waiting for others.
    os._exit(0 if answer[0] == "returned" else 1)
