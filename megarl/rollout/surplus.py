"""Steps that do not wait for their last groups (``rollout.oversample``), and rejected groups that are replaced at once
(``rollout.dynamic_sampling_refill``).

Every engine finishes its own share of a step's groups and has ``oversample`` times as many under way beside; which are
the slowest is found out by each for itself, so that no engine waits for another.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from megarl.config import Config
from megarl.data.prompts import Prompt
from megarl.model.flops import ModelFlops
from megarl.parallel.collectives import gather_objects
from megarl.parallel.mesh import Mesh
from megarl.rollout.conversation import Sampling
from megarl.rollout.local import Batch, Scored, Talks
from megarl.rollout.supply import Supply
from megarl.rollout.table import Rollout, learnable, mixed, not_empty, tabulate


class Surplus:
    """What is under way from step to step, on all engines. Methods are collectives over all ranks."""

    def __init__(self, cfg: Config, mesh: Mesh, talks: Talks, prompts: Sequence[Prompt]) -> None:
        self._cfg, self._mesh, self._talks = cfg.rollout, mesh, talks
        self._batch = Batch(talks, goes_on=True)
        self._supply = Supply(prompts, talks.engine.num_replicas)

    def rollout(self, draw: Callable[[int], list[Prompt]], sampling: Sampling, seed: int, flops: ModelFlops) -> Rollout:
        """A step's groups: those that were finished first. Raises EmptyStepError if there is none."""
        r, replica, engines = self._cfg, self._talks.engine.replica, self._talks.engine.num_replicas
        wanted = [len(range(engine, r.num_prompts_per_step, engines)) for engine in range(engines)]
        more = math.ceil(r.oversample * wanted[0])
        draws = r.dynamic_sampling_max_gen_batches if r.dynamic_sampling else 1
        under_way = map(len, self._supply.under_way)
        most = max(share * draws + more - going for share, going in zip(wanted, under_way, strict=True))
        taken = self._supply.take(most * engines, draw)
        mine = deque(taken[replica::engines])
        given = len(mine)
        accept = self._counts if r.dynamic_sampling else None
        scored = self._batch.run(mine, sampling, seed, want=wanted[replica], more=more, accept=accept)
        leads = self._talks.scorer is not None
        told = (replica, given - len(mine), self._batch.under_way) if leads else None
        by_engine = {part[0]: part[1:] for part in gather_objects(told, self._mesh.host_group) if part}
        used = [by_engine[engine][0] for engine in range(engines)]
        self._supply.settle(taken, used, [by_engine[engine][1] for engine in range(engines)])
        rollout = replace(tabulate(scored, self._mesh, sampling.max_tokens, flops), ages=True)
        if not r.dynamic_sampling:
            return not_empty(rollout)
        batches = max(1, math.ceil(sum(used) / r.num_prompts_per_step))
        return replace(learnable(rollout, sum(used)), num_gen_batches=batches)

    def state_dict(self) -> dict[str, Any]:
        return self._supply.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin anew what was under way."""
        self._batch.discard()
        self._supply.load_state_dict(state)

    def _counts(self, group: Scored) -> bool:
        rewards = torch.tensor([row.result.total for row, _ in group])
        low, high = self._cfg.dynamic_sampling_min_reward, self._cfg.dynamic_sampling_max_reward
        return bool(mixed(rewards, torch.zeros(len(group), dtype=torch.int64), low, high).all())
