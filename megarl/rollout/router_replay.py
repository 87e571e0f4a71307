"""Which experts vLLM chose for every token, so that the trainer can send it to the same ones (R3, 2510.11370).

Per request: uint8 (int16 beyond 256 experts), ``[prompt + response - 1, layers with experts, top-k]``. Row t is of the
position that reads token t, which is also the one that predicts token t + 1: the last token is never read. The order of
a token's experts means nothing.

On a GPU vLLM 0.32 delivers them itself (``enable_return_routed_experts``), on the first rank of an engine. That needs
its second model runner, whose kernels are Triton's, and so does not exist on CPUs: there a `Recorder` listens to the
routers and delivers where the scheduler expects vLLM's own connector.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from megarl.model.family import ModelSpec


def replay_arguments(*, on_cpu: bool) -> dict[str, Any]:
    """For vLLM's ``EngineArgs``."""
    if on_cpu:
        return {"enable_prefix_caching": False}  # the routers never see a token that comes from the cache
    return {"enable_return_routed_experts": True, "enable_prefix_caching": True}  # it keeps routes beside its cache


class Recorder:
    """In place of vLLM's `AuxOutputSchedulerConnector`, in the same process as the model."""

    def __init__(self, model: torch.nn.Module, runner: Any) -> None:
        from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (
            _get_routed_experts_shape,
            bind_routed_experts_capturer,
        )

        layers, _, topk = _get_routed_experts_shape(runner.vllm_config)
        self._shape = (runner.max_model_len, layers, topk)
        self._batch = runner.input_batch
        self._scheduled: dict[str, int] = {}  # tokens of each request in the step that runs
        self._rows: dict[str, np.ndarray] = {}
        self._delivered: dict[str, int] = {}
        capturer: Any = self
        bind_routed_experts_capturer(model, capturer)

    # --- called by the routers ----------------------------------------------------------------------------------------

    def capture(self, layer_id: int, topk_ids: torch.Tensor) -> None:
        """``topk_ids [tokens, topk]`` of one layer in one step: all requests of the batch, end to end."""
        chosen, at = topk_ids.numpy(), 0
        for index, request in enumerate(self._batch.req_ids):
            count, start = self._scheduled[request], self._batch.num_computed_tokens_cpu[index]
            self._rows[request][start : start + count, layer_id] = chosen[at : at + count]
            at += count

    # --- called by the scheduler --------------------------------------------------------------------------------------

    def build_connector_meta(self, step: Any, requests: dict[str, Any]) -> None:
        self._scheduled = step.num_scheduled_tokens
        for request in self._scheduled:
            if request not in self._rows:
                self._rows[request] = np.zeros(self._shape, np.int16)
                self._delivered[request] = 0

    def take_output(self, request: Any, output: None) -> np.ndarray:
        """Rows that are new since the last time. A request that was preempted computes its old ones again."""
        start, stop = self._delivered[request.request_id], request.num_tokens - 1
        self._delivered[request.request_id] = stop
        return self._rows[request.request_id][start:stop].copy()

    def request_finished(self, request: Any) -> None:
        """Also called when a request is preempted, which goes on later."""
        if request.is_finished():
            self._rows.pop(request.request_id, None)
            self._delivered.pop(request.request_id, None)

    def reset(self) -> None:
        """The prefix cache was emptied."""


def compact(rows: np.ndarray, spec: ModelSpec) -> torch.Tensor:
    """From vLLM's ``[positions, layers, topk]``, dense layers included, to what this module promises."""
    assert spec.moe is not None
    of_experts = rows[:, np.flatnonzero(spec.moe.layers)]
    return torch.from_numpy(of_experts.astype(np.uint8 if spec.moe.num_experts <= 256 else np.int16))
