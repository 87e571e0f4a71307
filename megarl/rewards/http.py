"""Rewards of a service of your own, over HTTP.

It is sent `{"completions": [...], "prompts": [...], "answers": [...]}` with up to `batch_size` samples, and whichever
of a sample's other columns `columns` names, and answers `{"rewards": [...]}`: a number for each sample, or a text that
says why there is none. Bounds on time, size, retries and concurrency: `megarl.rewards.service`.
"""

from typing import Any

from megarl.rewards.service import Service, ServiceError, ask


def http_reward(
    completions: list[str],
    *,
    url: str = "",
    token_env: str | None = None,
    columns: list[str] | None = None,
    batch_size: int = 32,
    timeout_s: float = 5.0,
    total_timeout_s: float = 9.0,
    max_retries: int = 3,
    max_response_bytes: int = 1 << 20,
    **others: list,
) -> list[Any]:
    """The service's rewards; an exception in the place of each that it could not give."""
    service = Service(url, token_env, timeout_s, total_timeout_s, max_retries, max_response_bytes)
    wanted = ("prompts", "answers", *(columns or ()))
    missing = [name for name in wanted if name not in others]
    if missing:
        raise ValueError(f"columns: no record has {', '.join(missing)}; there are {', '.join(others)}")
    [answer] = ask(service, [{"completions": completions} | {name: others[name] for name in wanted}])
    if isinstance(answer, Exception):
        return [answer] * len(completions)
    rewards = answer.get("rewards") if isinstance(answer, dict) else None
    if not isinstance(rewards, list) or len(rewards) != len(completions):
        said = f"{url}: expected {{'rewards': [{len(completions)} numbers]}}, found {answer!r:.300}"
        return [ServiceError(said)] * len(completions)
    return [ServiceError(f"{url}: {reward}") if isinstance(reward, str) else reward for reward in rewards]
