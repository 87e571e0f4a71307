"""Writing beside the training: what a save copies at once, and what it leaves to a thread.

`DistWriter.stage` runs megatron-core's fully parallel torch_dist plan and copies this rank's share into host memory,
which is kept from save to save: the training waits for that alone. `DistWriter.write`, in a thread, puts the copy into
files, with their hashes. `DistWriter.finish` adds the metadata, on rank 0, when all ranks have written.

megarl writes with its own threads in place of megatron's forked processes: a fork of a process with CUDA, vLLM and
process groups inherits locks that nobody releases, and hashing and writing run without the interpreter's lock.

Checked with megatron-core 0.16.1, torch 2.13.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync, _split_by_size_and_type
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megarl.checkpoint.folder import FileEntry, HashedFile, write_file
from megarl.convert.torch_dist_chunk import frame

_FILES = 2  # a rank's files, written at the same time
_ALIGN = 512
COMMON, CONFIG, METADATA = "common.pt", "metadata.json", ".metadata"


@dataclass
class Share:
    """What this rank writes into one folder: files by name, of items with their data in host memory."""

    folder: Path
    writer: FileSystemWriterAsync
    files: dict[str, list[tuple[WriteItem, Tensor | io.BytesIO]]]
    metadata: Metadata | None  # on rank 0


class HostBuffer:
    """Host memory (pinned where there is CUDA) that holds the copy; made by the first save, large enough ever after."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, tensors: list[Tensor]) -> list[Tensor]:
        """Copies of the tensors, in the shapes and types they have, in this memory."""
        places, end = [], 0
        for tensor in tensors:
            places.append(end)
            end += -(-tensor.nbytes // _ALIGN) * _ALIGN
        if len(self._bytes) < end:
            self._bytes = torch.empty(end, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        copies, memory = [], self._bytes.numpy()
        for tensor, at in zip(tensors, places, strict=True):
            # A tensor of its own: a view of the buffer would keep all of the buffer's storage.
            copy = torch.empty(tensor.shape, dtype=tensor.dtype)
            if tensor.numel():
                flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=at)
                copy = flat.view(tensor.shape).copy_(tensor.detach(), non_blocking=True)
            copies.append(copy)
        return copies


class _PlanOnly(TorchDistSaveShardedStrategy):
    """Megatron's torch_dist strategy up to the plan of who writes what.

    Its plan is made once: a run's tensors keep their names, shapes and places.
    """

    def __init__(self) -> None:
        super().__init__("torch_dist", 1, thread_count=_FILES)
        self.planned: tuple[FileSystemWriterAsync, SavePlanner, SavePlan, Metadata | None] | None = None
        self._plans: tuple[SavePlan, SavePlan] | None = None
        self._metadata: Metadata | None = None

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Any, async_strategy: str = "") -> AsyncRequest:
        """The last argument is that of megatron-core 0.19, which chooses among its own ways of writing."""
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        writer = _Planned(checkpoint_dir, thread_count=_FILES)
        planner = MCoreSavePlanner(dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False)
        cached = (*self._plans, True) if self._plans else None
        found, central, local, _, _ = save_state_dict_async_plan(
            mcore_to_pyt_state_dict(by_key, False), writer, None, 0, planner=planner, cached_ckpt_structure=cached
        )
        self._plans = (central, local)
        self._metadata = found[1] or self._metadata
        self.planned = (writer, planner, central, self._metadata)
        return AsyncRequest(None, (), [])


class _Planned(FileSystemWriterAsync):
    """Megatron's writer without its queue between processes, for which it would start one more."""

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """`DistWriter.stage` reads the data."""


class DistWriter:
    """Saves one set of sharded tensors again and again. ``stage`` is a collective over all ranks."""

    def __init__(self, parallel_group: dist.ProcessGroup) -> None:
        self._plan = _PlanOnly()
        self._strategy = FullyParallelSaveStrategyWrapper(self._plan, parallel_group, do_cache_distribution=True)
        self._buffer = HostBuffer()
        self._checked = False

    def stage(self, state: dict[str, Any], folder: Path) -> Share:
        """Copy this rank's share of ``state`` to the host. On return the training may change its tensors."""
        sharded, common = save_preprocess(state, validate_access_integrity=not self._checked)
        if common:
            raise ValueError(f"state that is not sharded would not be saved: {sorted(map(str, common))}")
        self._checked = True
        self._strategy.async_save(sharded, folder)
        assert self._plan.planned is not None
        writer, planner, plan, metadata = self._plan.planned
        self._plan.planned = None
        items = [(item, planner.resolve_data(item)) for item in plan.items]
        tensors = [(item, data) for item, data in items if item.type != WriteItemType.BYTE_IO]
        staged = self._buffer.take([data for _, data in tensors])
        data_of = {id(item): copy for (item, _), copy in zip(tensors, staged, strict=True)}
        data_of |= {id(item): data for item, data in items if item.type == WriteItemType.BYTE_IO}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        buckets = [bucket for bucket in _split_by_size_and_type(_FILES, list(plan.items)) if bucket]
        prefix = plan.storage_data.prefix
        files = {f"{prefix}{n}.distcp": [(i, data_of[id(i)]) for i in bucket] for n, bucket in enumerate(buckets)}
        return Share(folder, writer, files, metadata)

    @staticmethod
    def write(share: Share) -> tuple[list[WriteResult], dict[str, FileEntry]]:
        """Put the share on the disk: what megatron's metadata has to say of each item, and each file's hash."""
        if not share.files:
            return [], {}
        with ThreadPoolExecutor(len(share.files), thread_name_prefix="megarl-save") as threads:
            done = list(threads.map(lambda name: _write(share, name), share.files))
        return [r for results, _ in done for r in results], dict(zip(share.files, (e for _, e in done), strict=True))

    @staticmethod
    def finish(share: Share, results: list[list[WriteResult]]) -> dict[str, FileEntry]:
        """Write what ties the ranks' files together. Rank 0 only."""
        metadata = share.metadata
        assert metadata is not None, "only rank 0 has it"
        metadata.storage_data = {r.index: r.storage_data for each in results for r in each}
        metadata.storage_meta = share.writer.storage_meta()
        metadata.all_local_plans = None  # larger than the rest, and only there to save a later run its planning
        config = json.dumps(dataclasses.asdict(CheckpointingConfig("torch_dist", 1)))
        common = io.BytesIO()
        torch.save({}, common)
        return {
            METADATA: write_file(share.folder / METADATA, pickle.dumps(metadata)),
            COMMON: write_file(share.folder / COMMON, common.getvalue()),
            CONFIG: write_file(share.folder / CONFIG, config.encode()),
        }


def _write(share: Share, name: str) -> tuple[list[WriteResult], FileEntry]:
    with HashedFile(share.folder / name) as file:
        results = [_write_one(file, name, item, data) for item, data in share.files[name]]
    return results, file.entry()


def _write_one(file: HashedFile, name: str, item: WriteItem, data: Tensor | io.BytesIO) -> WriteResult:
    """One item, as torch.save would have written it: the frame of our own leaves out its checksum, which the file's
    hash makes up for, and costs the interpreter nothing for the numbers."""
    offset = file.tell()
    if isinstance(data, io.BytesIO):
        file.write(data.getbuffer())
    elif data.numel():
        around = frame(data.dtype, tuple(data.shape), item.index.fqn, tuple(item.index.offset or ()))
        file.write(around.head)
        file.write(data.reshape(-1).view(torch.uint8).numpy())
        file.write(around.tail)
    else:
        empty = io.BytesIO()
        torch.save(data, empty)
        file.write(empty.getbuffer())
    length = file.tell() - offset
    return WriteResult(item.index, length, _StorageInfo(name, offset, length))


def free_bytes(folder: Path) -> int:
    """What the disk of a folder can still take."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize
