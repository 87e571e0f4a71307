"""Cases that `RankPool` runs: pushes to vLLM servers."""

from __future__ import annotations

from megarl.rollout.remote import RemoteEngines, to_sender
from megarl.weights.sync import push
from tests.distributed.model_cases import engine_of


def pushed(recipe: str, model: str, overrides: list[str], urls: list[str]) -> None:
    """Push twice, the second time verified."""
    policy = engine_of(recipe, model, overrides)
    stream = policy.stream(1 << 16, to_sender(policy.mesh))
    engines = RemoteEngines(urls, policy.mesh, stream.metadata, 1 << 15, host="127.0.0.1", timeout_s=100)
    push(stream, engines)
    push(stream, engines, verify=True)
