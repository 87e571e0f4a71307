"""Ranks that stay: a pool of processes that import megatron once and then run many cases, each in a fresh mesh.

A case is a module-level function ``case(cfg, **kwargs)``. It runs on ranks 0 to world - 1 of the pool with torchrun's
environment set; what it returns on each rank comes back as a list.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from megarl.parallel.ports import free_port

CASE_TIMEOUT_S = 280  # a little less than pytest's own limit on a test, which could not say where the ranks are


class RankPool:
    def __init__(self, size: int) -> None:
        self.size = size
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, case: Callable[..., Any], world: int, **kwargs: Any) -> list[Any]:
        """Run ``case(**kwargs)`` on ``world`` ranks. Raises AssertionError with every failed rank's traceback.

        If a rank does not answer, every rank's stacks go to stderr and the next case gets new processes.
        """
        port = free_port()
        for pipe in self.pipes[:world]:
            pipe.send((case.__module__, case.__name__, world, port, kwargs))
        deadline = time.monotonic() + CASE_TIMEOUT_S
        results, errors, silent = [], [], []
        for rank, pipe in enumerate(self.pipes[:world]):
            # Once one is late, the others had their time too.
            if not pipe.poll(max(deadline - time.monotonic(), 0)):
                silent.append(rank)
                continue
            value, error = pipe.recv()
            results.append(value)
            errors += [f"rank {rank}:\n{error}"] if error else []
        if silent:
            self._restart()
            late = f"ranks {silent} did not answer within {CASE_TIMEOUT_S} s (their stacks are in stderr)"
            raise AssertionError("\n".join([late, *errors]))
        assert not errors, "\n".join(errors)
        return results

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(5)
            process.kill()

    def _restart(self) -> None:
        for process in self.processes:
            os.kill(process.pid, signal.SIGUSR1)
            time.sleep(0.5)  # so that the stacks come one after another
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self.pipes:
            pipe.close()
        self._start()


def _serve(rank: int, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    while True:
        try:
            module, name, world, port, kwargs = pipe.recv()
        except EOFError:
            return
        os.environ.update(
            {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        )
        try:
            case = getattr(importlib.import_module(module), name)
            pipe.send((case(**kwargs), None))
        except Exception:  # the test in the parent raises it, with this traceback
            pipe.send((None, traceback.format_exc()))
        if "vllm.distributed.parallel_state" in sys.modules:
            from megarl.rollout.vllm_process import leave_process_groups

            leave_process_groups(own_default_group=False)  # an engine is not closed where its run was to fail
        if dist.is_initialized():
            from megatron.core import parallel_state

            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
        _forget_models()


def _forget_models() -> None:
    """Free the case's models: they hold process groups, whose threads would spin once the other ranks' are gone.

    Megatron's token dispatchers keep the last forward pass's probabilities, whose graph leads back to the model by ways
    that Python's collector does not see.
    """
    import torch

    for thing in gc.get_objects():
        if type(thing).__name__.endswith("TokenDispatcher"):
            graphs = [name for name, x in vars(thing).items() if isinstance(x, torch.Tensor) and x.requires_grad]
            for name in graphs:
                setattr(thing, name, None)
    gc.collect()
