"""The mesh: who this rank is, and which groups it talks in. Built once, passed down, never imported as a global.

This is the only reader of megatron's ``parallel_state``. Ranks are laid out as Megatron lays them (tp fastest, then cp,
dp, pp; for experts etp fastest, then ep, then the replicas, then pp): neighbours in a tensor-parallel group are
neighbours on a node. Expert parallelism divides the experts over ranks that otherwise are tensor, context and data
parallel. The ranks of a context-parallel group hold the same weights, and share each sequence's tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from megarl.config import Config, launched_world_size
from megarl.parallel import cpu
from megarl.parallel.ports import free_port


class RendezvousError(RuntimeError):
    """The ranks cannot meet. The message says what to set otherwise."""


@dataclass(frozen=True)
class Mesh:
    """One rank's place. ``groups`` is megatron's own collection; the fields below are what our code reads."""

    device: torch.device
    rank: int
    world_size: int
    tp_size: int
    tp_rank: int
    cp_size: int
    cp_rank: int
    pp_size: int
    pp_rank: int
    vpp_size: int  # chunks of layers that each pipeline stage holds
    dp_size: int
    dp_rank: int
    ep_size: int
    ep_rank: int
    etp_size: int  # tensor parallelism of the experts' matrices
    etp_rank: int
    tp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup  # the replicas, one rank of each: those at this rank's place in context parallelism
    replica_group: dist.ProcessGroup  # the fewest ranks around this one that together hold the whole model
    replica_ranks: list[int]  # global ranks of replica_group, in its order
    host_group: dist.ProcessGroup  # every rank, over gloo: for data that lives in host memory
    groups: ProcessGroupCollection
    # Ranks that may share a sequence -> those around this one: the context-parallel group alone, or with
    # parallel.dynamic_context_parallel its halves, quarters, ... too
    cp_groups: dict[int, dist.ProcessGroup]
    # megatron's parallel_state of this layout, where it is not the one that the job began with
    state: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last pipeline stage in this rank's pipeline."""
        return dist.get_global_rank(self.pp_group, self.pp_size - 1)

    def dp_rank_of(self, rank: int) -> int:
        """Which data-parallel replica another global rank trains in."""
        return rank // (self.tp_size * self.cp_size) % self.dp_size

    @contextlib.contextmanager
    def platform(self) -> Iterator[None]:
        """Enter before calling into megatron-core: on a machine without CUDA its CUDA calls then mean the CPU, and its
        parallel_state is this layout's."""
        with cpu.megatron_on_cuda() if self.device.type == "cuda" else cpu.megatron_on_cpu(), _held(self.state):
            yield

    def describe(self) -> str:
        where = f"{self.world_size} x {self.device.type}"
        experts = (
            f", EP {self.ep_size}, ETP {self.etp_size}" if self.ep_size > 1 or self.etp_size != self.tp_size else ""
        )
        sizes = " or ".join(str(size) for size in sorted(self.cp_groups))
        context = f", CP {sizes}" if self.cp_size > 1 else ""
        chunks = f" x {self.vpp_size} chunks" if self.vpp_size > 1 else ""
        return f"{where}: TP {self.tp_size}{context}, PP {self.pp_size}{chunks}, DP {self.dp_size}{experts}"

    def close(self) -> None:
        """Leave together: a rank that exits first makes the others' last collective fail."""
        dist.barrier(group=self.host_group)
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def pick_device(wanted: str) -> torch.device:
    """``auto`` takes CUDA where there is any. Each rank gets the GPU of its LOCAL_RANK."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def build_mesh(cfg: Config) -> Mesh:
    """Join the job and build its groups.

    torchrun says who this rank is, or srun (with MASTER_ADDR and MASTER_PORT set for it); a process started by hand is
    a job of one. Every collective of every group fails after ``run.deadline_s``. Raises ValueError where the launcher
    started another number of ranks than the recipe asks for, and RendezvousError where they cannot meet.
    """
    _identify()
    wanted = cfg.cluster.num_nodes * cfg.cluster.gpus_per_node
    if int(os.environ["WORLD_SIZE"]) != wanted:
        raise ValueError(
            f"this process is one of {os.environ['WORLD_SIZE']}, but cluster.num_nodes {cfg.cluster.num_nodes} x "
            f"cluster.gpus_per_node {cfg.cluster.gpus_per_node} = {wanted} ranks: start as many, or change the recipe"
        )
    device = pick_device(cfg.cluster.device)
    if device.type == "cuda":
        # Megatron's tensor parallelism relies on one hardware queue to overlap its collectives with computation.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=cfg.run.deadline_s)
    if not dist.is_initialized():
        _meet("nccl" if device.type == "cuda" else "gloo", timeout)
    host_group = dist.new_group(backend="gloo", timeout=timeout) if device.type == "cuda" else dist.group.WORLD
    with cpu.megatron_on_cpu() if device.type == "cpu" else contextlib.nullcontext():
        _initialize(cfg)
        _seed_rng_tracker(cfg.run.seed)
    return _mesh_of(cfg, device, host_group)


def another_layout(cfg: Config, first: Mesh) -> Mesh:
    """The same ranks, divided as ``cfg.parallel`` says, for a model beside the one of ``first``.

    Parts of megatron-core take process groups as arguments, and others (its schedules, experts, checkpoints) look into
    parallel_state in 0.16 to 0.19: so that is exchanged, as a whole, for as long as `Mesh.platform` is entered.
    """
    before = _parallel_state()
    with first.platform():
        parallel_state.destroy_model_parallel()  # forgets the groups; it would destroy gloo twins, which were not made
        try:
            _initialize(cfg)
            mesh = _mesh_of(cfg, first.device, first.host_group)
            return dataclasses.replace(mesh, state=_parallel_state())
        finally:
            _set_parallel_state(before)


def _parallel_state() -> dict[str, Any]:
    """All that the module knows: groups, ranks, sizes."""
    return {name: value for name, value in vars(parallel_state).items() if re.match(r"_[A-Z]|_global_process", name)}


def _set_parallel_state(state: dict[str, Any]) -> None:
    for name, value in state.items():
        setattr(parallel_state, name, value)


@contextlib.contextmanager
def _held(state: dict[str, Any]) -> Iterator[None]:
    before = _parallel_state() if state else {}
    _set_parallel_state(state)
    try:
        yield
    finally:
        _set_parallel_state(before)


def _initialize(cfg: Config) -> None:
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=cfg.parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=cfg.parallel.pipeline_model_parallel_size,
        context_parallel_size=cfg.parallel.context_parallel_size,
        virtual_pipeline_model_parallel_size=cfg.parallel.virtual_pipeline_model_parallel_size,
        expert_model_parallel_size=cfg.parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=cfg.parallel.expert_tensor_parallel_size,  # None: as the rest of the model
        distributed_timeout_minutes=cfg.run.deadline_s / 60,
        create_gloo_process_groups=False,
    )


def _mesh_of(cfg: Config, device: torch.device, host_group: dist.ProcessGroup) -> Mesh:
    """What megatron's parallel_state now says."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    # One of the two contains the other: TP and EP x ETP divide one another, and both count neighbours first.
    replica = max(groups.mp, groups.tp_ep_pp, key=dist.ProcessGroup.size)
    return Mesh(
        device=device,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_size=groups.tp.size(),
        tp_rank=groups.tp.rank(),
        cp_size=groups.cp.size(),
        cp_rank=groups.cp.rank(),
        pp_size=groups.pp.size(),
        pp_rank=groups.pp.rank(),
        vpp_size=cfg.parallel.virtual_pipeline_model_parallel_size or 1,
        dp_size=groups.dp.size(),
        dp_rank=groups.dp.rank(),
        ep_size=groups.ep.size(),
        ep_rank=groups.ep.rank(),
        etp_size=groups.expt_tp.size(),
        etp_rank=groups.expt_tp.rank(),
        tp_group=groups.tp,
        cp_group=groups.cp,
        pp_group=groups.pp,
        dp_group=groups.dp,
        replica_group=replica,
        replica_ranks=dist.get_process_group_ranks(replica),
        host_group=host_group,
        groups=groups,
        cp_groups=_context_groups(cfg, groups.cp),
    )


def _context_groups(cfg: Config, whole: dist.ProcessGroup) -> dict[int, dist.ProcessGroup]:
    groups = {whole.size(): whole}
    if cfg.parallel.dynamic_context_parallel:
        ranks, timeout = dist.get_process_group_ranks(whole), timedelta(seconds=cfg.run.deadline_s)
        for size in (1 << k for k in range(whole.size().bit_length() - 1)):
            first = whole.rank() // size * size
            members = ranks[first : first + size]
            groups[size] = dist.new_group(members, timeout=timeout, use_local_synchronization=True)
    return groups


def _meet(backend: str, timeout: timedelta) -> None:
    """Join the job at MASTER_ADDR:MASTER_PORT. What would be waited for in vain is said at once."""
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        socket.getaddrinfo(host, int(port))
    except OSError as reason:
        raise RendezvousError(
            f"MASTER_ADDR={host}: {socket.gethostname()} cannot resolve it ({reason}); set it to a name or address of "
            "rank 0's machine that every node resolves"
        ) from reason
    try:
        dist.init_process_group(backend, timeout=timeout)
    except dist.DistNetworkError as reason:
        if "EADDRINUSE" not in str(reason):
            raise
        raise RendezvousError(f"MASTER_PORT={port}: another program of {host} has it; set another") from reason


def _seed_rng_tracker(seed: int) -> None:
    """Megatron's per-rank generators (dropout, recompute), and torch's own: the same numbers for the same layout."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def _identify() -> None:
    """Give torch.distributed the names it reads, from srun's where torchrun is not there."""
    env = os.environ
    if "RANK" in env:
        return
    ranks = launched_world_size()
    if ranks is not None:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in env]
        if missing:
            names = " and ".join(missing)
            raise ValueError(f"srun started {ranks} ranks; set {names} for them, or use torchrun")
        env.update(RANK=env["SLURM_PROCID"], WORLD_SIZE=str(ranks), LOCAL_RANK=env["SLURM_LOCALID"])
        return
    port = str(free_port())
    env.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)


def device_name(device: torch.device) -> str | None:
    """The GPU's name, as its maker gives it; None on a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None
