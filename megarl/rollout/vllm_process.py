"""vLLM as a guest in the trainer's process.

vLLM expects a process of its own: on a CPU it replaces parts of torch for good, and everywhere it seeds the random
generators, changes environment variables, thread counts and matmul precision. `SharedProcess` keeps that inside a
``with process.vllm():``. Outside of it the trainer finds its process as it left it.

Facts are of vllm 0.32.0; each line says what would go wrong without it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import multiprocessing
import os
import random
import sys
import uuid
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

# What vllm/v1/worker/cpu/shm.py, cpu_worker.py and cpu_model_runner.py replace by placeholders that do nothing. Left
# in place, `torch.set_num_threads` would be dead for the trainer, and streams and pinned memory not what they say.
_REPLACED_BY_VLLM: tuple[tuple[Any, str], ...] = (
    (torch, "Event"),
    (torch, "set_num_threads"),
    (torch.cuda, "Event"),
    (torch.cuda, "Stream"),
    (torch.cuda, "stream"),
    (torch.cuda, "set_stream"),
    (torch.cuda, "current_stream"),
    (torch.accelerator, "synchronize"),
    (torch.accelerator, "empty_cache"),
    (torch.accelerator, "get_memory_info"),
    (torch.Tensor, "pin_memory"),
    (torch.Tensor, "record_stream"),
)

# Variables that vLLM writes and others read: LD_PRELOAD would load libgomp and tcmalloc into every process we start,
# LOCAL_WORLD_SIZE becomes the engine's tensor-parallel size, RANK and LOCAL_RANK are ours while an engine starts.
_RESTORED_VARIABLES = ("LD_PRELOAD", "LD_LIBRARY_PATH", "LOCAL_WORLD_SIZE", "NUMEXPR_MAX_THREADS", "RANK", "LOCAL_RANK")


def set_environment(device_type: str) -> None:
    """Set what vLLM reads from the environment. Must run before vLLM is first imported."""
    # The engine has to live in this process: weights are handed over as tensors, not through a file or a socket.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # It would silently win over rollout.kv_cache_gb, and it only knows whole GiB.
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    # No report of what is run here to anybody.
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # On a CPU its warnings speak of tcmalloc, Triton and OpenMP only; they would tear the progress line.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING" if device_type == "cuda" else "ERROR")
    # vLLM configures its logger late; what it logs while being imported needs the level now.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    # After every load it would warn that a tied output layer got no weights; load_weights has its own, stricter check.
    logging.getLogger("vllm.model_executor.model_loader.reload").setLevel(logging.ERROR)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if original is None:
            delattr(owner, name)
        else:
            setattr(owner, name, original)


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """Leave torch's, numpy's and Python's generators as they were found."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


@contextlib.contextmanager
def _settings_kept() -> Iterator[None]:
    """Leave environment, thread count and matmul precision as they were found."""
    environment = {name: os.environ.get(name) for name in _RESTORED_VARIABLES}
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    set_num_threads = torch.set_num_threads  # vLLM replaces it in the meantime
    try:
        yield
    finally:
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if torch.get_num_threads() != threads:
            set_num_threads(threads)
        if torch.get_float32_matmul_precision() != precision:
            torch.set_float32_matmul_precision(precision)


class SharedProcess:
    """Swaps between the trainer's view of the process and vLLM's."""

    def __init__(self, device_type: str) -> None:
        self._on_cpu = device_type != "cuda"
        self._theirs: list[Any] | None = None  # vLLM's values of _REPLACED_BY_VLLM, once it has set them

    @staticmethod
    def _attributes() -> list[Any]:
        return [getattr(owner, name) for owner, name in _REPLACED_BY_VLLM]

    @staticmethod
    def _set_attributes(values: list[Any]) -> None:
        for (owner, name), value in zip(_REPLACED_BY_VLLM, values, strict=True):
            setattr(owner, name, value)

    @contextlib.contextmanager
    def vllm(self) -> Iterator[None]:
        """Everything vLLM does happens in here; on leaving, the process is the trainer's again."""
        ours = self._attributes()
        with _random_state_kept(), _settings_kept(), warnings.catch_warnings(), self._without_compiler():
            warnings.simplefilter("ignore", FutureWarning)  # about vLLM's own use of torch
            if self._theirs is not None:
                self._set_attributes(self._theirs)
            try:
                yield
            finally:
                self._theirs = self._attributes()
                self._set_attributes(ours)

    @contextlib.contextmanager
    def trainer(self, ours: list[Any]) -> Iterator[None]:
        """Inside `vllm()`: run a piece of the trainer's code (weights are computed while vLLM loads them)."""
        theirs = self._attributes()
        self._set_attributes(ours)
        try:
            yield
        finally:
            ours[:] = self._attributes()  # the piece may have entered a context of its own that is still open
            self._set_attributes(theirs)

    def trainer_attributes(self) -> list[Any]:
        """What `trainer()` needs; call it outside of `vllm()`."""
        return self._attributes()

    def _without_compiler(self) -> contextlib.AbstractContextManager[Any]:
        # vLLM compiles one small function of its sampler (the rank of the sampled token, which we do not read): on a
        # CPU that takes 3 to 20 seconds at the first generation, and a C++ compiler, which a fresh machine may lack.
        return torch.compiler.set_stance("force_eager") if self._on_cpu else contextlib.nullcontext()

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Additionally around the construction of an engine (inside `vllm()`)."""
        start_method = multiprocessing.get_start_method(allow_none=True)
        try:
            with contextlib.ExitStack() as stack:
                warnings.simplefilter("ignore")
                self._export_ranks()
                if self._on_cpu:
                    self._enter_cpu_start(stack)
                yield
        finally:
            # vLLM freezes all live objects, the trainer's too; frozen cycles would never be collected.
            gc.unfreeze()
            # It makes a Lock, which fixes the start method to fork; the trainer's own choice must still be possible.
            multiprocessing.set_start_method(start_method, force=True)

    def _export_ranks(self) -> None:
        """external_launcher reads RANK and LOCAL_RANK; the process group and the current device know better."""
        if dist.is_initialized():
            os.environ["RANK"] = str(dist.get_rank())
            if not self._on_cpu:
                os.environ["LOCAL_RANK"] = str(torch.cuda.current_device())
        os.environ.setdefault("LOCAL_RANK", "0")

    def _enter_cpu_start(self, stack: contextlib.ExitStack) -> None:
        if "vllm.v1.worker.cpu.shm" in sys.modules:
            # A second engine in this process: the placeholders come with this module's import, so import it again.
            importlib.reload(sys.modules["vllm.v1.worker.cpu.shm"])
        # Binds all future memory of the process, the trainer's too, to one NUMA node: out of memory when that is full.
        stack.enter_context(_replaced(torch.ops._C, "init_cpu_memory_env", lambda nodes: None))
        from vllm.distributed.device_communicators import cpu_communicator

        # Ranks of an engine meet in shared memory under a name that external_launcher makes the same for every job on
        # the machine: two runs side by side would add up each other's activations.
        job = _agreed_job_id()

        def group_name(communicator: Any) -> str:
            ranks = "-".join(str(rank) for rank in communicator.ranks)
            return f"megarl-{job}-{communicator.unique_name}-{ranks}"

        shm = cpu_communicator._CPUSHMDistributed
        stack.enter_context(_replaced(shm, "make_group_name", staticmethod(group_name)))


def _agreed_job_id() -> str:
    """A name nobody else on this machine has, the same on every rank."""
    agreed = [uuid.uuid4().hex[:16]]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(agreed, src=0)
    return agreed[0]


def leave_process_groups(own_default_group: bool) -> None:
    """Drop vLLM's process groups and nothing else: its own clean-up would destroy the trainer's default group too."""
    from vllm.distributed import parallel_state

    parallel_state.destroy_model_parallel()
    if parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
    parallel_state._WORLD = None
    parallel_state._NODE_COUNT = None
    if own_default_group and dist.is_initialized():
        dist.destroy_process_group()
