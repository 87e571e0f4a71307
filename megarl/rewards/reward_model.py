"""A discriminative reward model, served by vLLM (`vllm serve MODEL --runner pooling`): any
...ForSequenceClassification.

It is asked at /classify for scores without activation, so that a reward is the model's own number and not its sigmoid.
A model with several labels needs `label`, whose score counts.

`prompts` and `completions` go to it as text, end to end, a request for each `batch_size` samples. With `chat=true` it
is sent a conversation a sample instead, and puts it into its own chat template: the user's message is the record's
`prompt_field` (a text, or messages; null: the prompt as the policy read it), the assistant's is the completion.
"""

from typing import Any

from megarl.rewards.service import Service, ServiceError, ask


def reward_model_reward(
    completions: list[str],
    prompts: list[str],
    *,
    url: str = "",
    model: str = "",
    chat: bool = False,
    prompt_field: str | None = None,
    label: int | None = None,
    scale: float = 1.0,
    token_env: str | None = None,
    batch_size: int = 32,
    concurrency: int = 32,
    timeout_s: float = 60.0,
    total_timeout_s: float = 120.0,
    max_retries: int = 3,
    max_response_bytes: int = 1 << 22,
    **columns: list,
) -> list[Any]:
    """The model's scores times `scale`; an exception in the place of each that it did not give."""
    address = f"{url.rstrip('/')}/classify"
    service = Service(address, token_env, timeout_s, total_timeout_s, max_retries, max_response_bytes, concurrency)
    shared = {"model": model, "use_activation": False}
    if chat:
        if prompt_field is not None and prompt_field not in columns:
            raise ValueError(f"prompt_field = {prompt_field!r}: no record has it; there are {', '.join(columns)}")
        asked = prompts if prompt_field is None else columns[prompt_field]
        talks = [conversation(prompt, completion) for prompt, completion in zip(asked, completions, strict=True)]
        bodies = [shared | {"messages": talk, "add_generation_prompt": False} for talk in talks]
    else:
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        bodies = [shared | {"input": texts}]
    each = len(completions) // len(bodies)
    scores: list[Any] = []
    for answer in ask(service, bodies):
        scores += [answer] * each if isinstance(answer, Exception) else scores_of(answer, each, label)
    return [score if isinstance(score, Exception) else score * scale for score in scores]


def conversation(prompt: Any, completion: str) -> list[dict[str, Any]]:
    """The messages of a prompt, and the completion as the assistant's."""
    asked = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    return [*asked, {"role": "assistant", "content": completion}]


def scores_of(answer: Any, expected: int, label: int | None) -> list[Any]:
    """One score an input, out of what /classify returned."""
    try:
        found = {entry["index"]: entry["probs"] for entry in answer["data"]}
    except (KeyError, TypeError) as error:
        why = f"not an answer of /classify ({type(error).__name__}: {error}): {answer!r:.300}"
        return [ServiceError(why)] * expected
    if sorted(found) != list(range(expected)):
        return [ServiceError(f"/classify was given {expected} inputs and answers {sorted(found)}")] * expected
    return [score_of(found[at], label) for at in range(expected)]


def score_of(labels: list[float], label: int | None) -> float | ServiceError:
    if label is None and len(labels) == 1:
        return labels[0]
    if label is None or not 0 <= label < len(labels):
        return ServiceError(f"the model has {len(labels)} labels: say in `label` which of them counts, not {label}")
    return labels[label]
