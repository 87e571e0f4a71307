"""One engine, driven a step at a time: requests come and go while others are being generated.

Contract: made by `VLLMEngine.session`, in which all ranks of the engine call the same methods with the same arguments,
in the same order: `agree` gets the arguments of the first rank to the others. Their schedulers then do the same, and
each rank knows what became of every request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist

from megarl.rollout.conversation import Completion, Sampling

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine

T = TypeVar("T")
ABORTED = "abort"  # the finish_reason of what is only the beginning of a completion


@dataclass(frozen=True)
class Request:
    """What to generate: `sampling` has the most tokens, and `n` is 1."""

    name: str
    tokens: list[int]
    sampling: Sampling
    seed: int | None  # of its own generator; None draws from the session's


class Session:
    """Requests under way in this rank's part of an engine."""

    def __init__(
        self,
        engine: LLMEngine,
        params: Callable[[Sampling, int | None], SamplingParams],
        completion: Callable[[RequestOutput], Completion],
    ) -> None:
        self._engine, self._params, self._completion = engine, params, completion
        self._ids: dict[str, str] = {}  # a request's name -> vLLM's own

    def agree(self, what: T | None = None) -> T:
        """What the engine's first rank gives, on all of its ranks."""
        from vllm.distributed.parallel_state import get_tp_group

        group = get_tp_group()
        box: list[Any] = [what]
        if group.world_size > 1:
            dist.broadcast_object_list(box, src=group.ranks[0], group=group.cpu_group)
        return box[0]

    @property
    def busy(self) -> bool:
        return bool(self._ids)

    def add(self, requests: Sequence[Request]) -> None:
        from vllm import TokensPrompt

        for request in requests:
            prompt = TokensPrompt(prompt_token_ids=request.tokens)
            params = self._params(request.sampling, request.seed)
            self._ids[request.name] = self._engine.add_request(request.name, prompt, params)

    def advance(self) -> dict[str, Completion]:
        """Generate a token for (some of) the requests. Returns those that are finished, by name."""
        outputs: list[Any] = [output for output in self._engine.step() if output.finished]
        for output in outputs:
            del self._ids[output.request_id]
        return {output.request_id: self._completion(output) for output in outputs}

    def abort(self, names: Sequence[str] | None = None) -> dict[str, Completion]:
        """End requests, all of them if no names are given. Returns what each has so far; names that are unknown or
        finished are passed over."""
        wanted = list(self._ids) if names is None else [name for name in names if name in self._ids]
        states = self._engine.output_processor.request_states
        partial = {}
        for name in wanted:
            state = states[self._ids[name]]
            logps = state.logprobs_processor.logprobs
            tokens = list(state.detokenizer.output_token_ids)
            partial[name] = Completion(tokens, list(logps.logprobs[: len(tokens)]) if logps else [], ABORTED)
        self._engine.abort_request([self._ids.pop(name) for name in wanted], internal=True)
        return partial
