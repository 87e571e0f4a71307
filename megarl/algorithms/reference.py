"""Where loops that learn from data get the reference's log-probabilities from. The reference is the policy as it was at
the start: its weights wait in host memory and change places with the policy's for a forward pass, or all that is asked
of it is computed once, before the first step.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megarl.algorithms.onpolicy import attach
from megarl.algorithms.sft import deal
from megarl.config import Config
from megarl.data import reference_cache
from megarl.data.records import Sample
from megarl.data.reference_cache import Key, Stamp
from megarl.model.engine import Engine, HostWeights
from megarl.observe.run import Run
from megarl.parallel.collectives import gather_objects
from megarl.parallel.mesh import Mesh

_CHUNK = 1024  # samples whose log-probabilities are on the way at once


class Reference:
    """``attach`` gives samples their ``ref_logps``."""

    def __init__(self, cfg: Config, policy: Engine, run: Run, mesh: Mesh, data: Sequence[Sample]) -> None:
        """Keep the policy's weights as they are; or, with ``precompute_ref_log_probs``, what they say of ``data``:
        all samples that there will be, the same on every rank."""
        self._policy, self._run = policy, run
        self._weights: HostWeights | None = None
        self._sums: dict[Key, float] = {}
        if not cfg.preference.precompute_ref_log_probs:
            self._weights = policy.weights()
            return
        wanted = cfg.preference.ref_log_probs_path
        path = None if wanted is None else Path(wanted)
        stamp = None if path is None else Stamp.of(cfg.model.path, cfg.model.dtype, data)
        if gather_objects(path is not None and path.is_file(), mesh.host_group)[0]:
            assert path is not None and stamp is not None
            self._sums = reference_cache.read(path, stamp)
            return
        with run.phase("ref_logps"):
            self._sums = _compute(policy, data, mesh)
        if path is not None and stamp is not None and run.is_writer:
            reference_cache.write(path, stamp, self._sums)

    def attach(self, samples: Sequence[Sample]) -> None:
        """Precomputed are sums over responses, which is what losses of whole responses read: the first token has it."""
        if self._weights is not None:
            with self._run.phase("ref_logps"), self._policy.holding(self._weights):
                attach("ref_logps", self._policy, samples)
            return
        for sample in samples:
            sample.ref_logps = torch.zeros(sample.response_length)
            sample.ref_logps[0] = self._sums[sample.prompt_id, sample.index]


def ratios(policy: Engine, samples: Sequence[Sample], mesh: Mesh) -> Tensor:
    """log pi(y) - log pi_ref(y) of the whole step's samples, of which these are this replica's; fp32, on the host."""
    mine = []
    for sample, logps in zip(samples, policy.logps(list(samples)), strict=True):
        assert sample.ref_logps is not None, f"{sample.name} has no log-probabilities of the reference"
        mine.append((logps.sum() - sample.ref_logps.to(logps).sum()).item())
    return torch.tensor([ratio for part in gather_objects(mine, mesh.dp_group) for ratio in part])


def labels_of(samples: Sequence[Sample], mesh: Mesh) -> Tensor:
    """[n] bool: which of the whole step's samples are desirable, in the order of `ratios`."""
    parts = gather_objects([bool(sample.desirable) for sample in samples], mesh.dp_group)
    return torch.tensor([label for part in parts for label in part], dtype=torch.bool)


def _compute(policy: Engine, data: Sequence[Sample], mesh: Mesh) -> dict[Key, float]:
    sums: dict[Key, float] = {}
    for at in range(0, len(data), _CHUNK):
        chunk = data[at : at + _CHUNK]
        mine = deal(chunk, [policy.flops.cost(len(sample.tokens)) for sample in chunk], mesh)
        found = [(s.prompt_id, s.index, logps.sum().item()) for s, logps in zip(mine, policy.logps(mine), strict=True)]
        for part in gather_objects(found, mesh.dp_group):
            sums |= {(prompt_id, index): total for prompt_id, index, total in part}
    return sums
