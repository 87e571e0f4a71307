"""Which prompts to train on, in which order, and with how much room to answer: pure functions of measurements.

A pass rate is the share of attempts that solved a prompt, in [0, 1]. A prompt that is always or never solved gives a
group of equal rewards and no gradient; which of the rest teaches most depends on the model that the rates were measured
with.

Contract: everything here is a function of its arguments. What a measurement gets wrong (a rate beyond [0, 1], an id
twice) is a `RecordError` or a `DataError` that says where.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from megarl.data.reading import DataError, Loaded, RecordError, json_type, read_rows

T = TypeVar("T")


def checked_rate(rate: Any, name: str) -> float | None:
    """A pass rate, or None for null: not measured."""
    if rate is None:
        return None
    if isinstance(rate, bool) or not isinstance(rate, int | float):
        raise RecordError(f"{name}: must be a number, found {json_type(rate)}")
    if not 0 <= rate <= 1:  # neither is NaN
        raise RecordError(f"{name}: must be a share in [0, 1], found {rate}")
    return float(rate)


def read_pass_rates(path: str) -> dict[str, float]:
    """Pass rates by id, from rows {"id": "train.jsonl:17", "pass_rate": 0.25}."""
    rates: dict[str, float] = {}
    for where, row in read_rows(path, None, "train"):
        try:
            if isinstance(row, RecordError):
                raise row
            if not isinstance(row.get("id"), str):
                raise RecordError(f"id: must be a string, found {json_type(row.get('id'))}")
            if row["id"] in rates:
                raise RecordError(f"id: {row['id']!r} is there twice")
            rate = checked_rate(row.get("pass_rate"), "pass_rate")
        except RecordError as error:
            raise DataError(f"{path}{where}: {error}") from error
        if rate is not None:
            rates[row["id"]] = rate
    return rates


def within(items: Loaded[T], rates: Sequence[float | None], low: float, high: float) -> Loaded[tuple[T, float]]:
    """The items whose rate is in [low, high], each with it, and how many were dropped because it is not or is unknown.

    Raises DataError if none is left.
    """
    kept = [(item, rate) for item, rate in zip(items, rates, strict=True) if rate is not None and low <= rate <= high]
    unknown = sum(rate is None for rate in rates)
    dropped = items.dropped | {"pass_rate": len(items) - len(kept) - unknown, "no_pass_rate": unknown}
    if not kept:
        raise DataError(
            f"no prompt is left: of {len(items)}, {unknown} have no pass rate and {dropped['pass_rate']} one outside "
            f"[{low}, {high}]; see data.min_pass_rate and data.max_pass_rate"
        )
    return Loaded(kept, dropped)


def in_order(rated: Sequence[tuple[T, float]], order: str) -> list[T]:
    """The items by "easiest_first" or "hardest_first", equal ones in file order; or as they are, by "file"."""
    sign = {"file": 0.0, "easiest_first": -1.0, "hardest_first": 1.0}[order]
    return [item for item, _ in sorted(rated, key=lambda pair: sign * pair[1])]


# ---- iterative context lengthening ----


@dataclass(frozen=True)
class Stage:
    """From step `first_step` on (they count from 1), responses may have `max_response_length` tokens."""

    first_step: int
    max_response_length: int


def check_stages(stages: Sequence[Stage]) -> None:
    """Refuse stages that do not begin at step 1, or of which one does not come after and allow more than the last."""
    if not stages or stages[0].first_step != 1:
        raise ValueError(
            f"the first stage must begin at step 1, found {stages[0].first_step if stages else 'no stage'}"
        )
    for before, after in itertools.pairwise(stages):
        if after.first_step <= before.first_step or after.max_response_length <= before.max_response_length:
            raise ValueError(f"{after} must begin after {before}, and allow longer responses")


def max_response_length_at(stages: Sequence[Stage], step: int) -> int:
    """Longest response at a step (DeepScaleR: 8k, 16k, then 24k tokens).

    A short limit first teaches to reason within it at a fraction of the cost; a longer one pays once answers are cut
    off by the old one.
    """
    return max((stage for stage in stages if stage.first_step <= step), key=lambda s: s.first_step).max_response_length


# ---- learning impact (LIMR) ----


def trajectories(rewards: Iterable[tuple[int, str, float]], epochs: int) -> dict[str, list[float | None]]:
    """Each prompt's mean reward in each of `epochs` epochs, from (epoch from 0, prompt id, reward) of every sample.

    None stands for an epoch in which a prompt had no sample.
    """
    samples: dict[str, list[list[float]]] = {}
    for epoch, prompt_id, reward in rewards:
        samples.setdefault(prompt_id, [[] for _ in range(epochs)])[epoch].append(reward)
    return {key: [sum(e) / len(e) if e else None for e in of_prompt] for key, of_prompt in samples.items()}


def impact_scores(trajectories: Mapping[str, Sequence[float | None]]) -> dict[str, float]:
    """How well each prompt's rewards r_k over epochs k follow the mean m_k over prompts (LIMR, 2502.11886):

    s = 1 - sum_k (r_k - m_k)^2 / sum_k (1 - m_k)^2

    so that 1 is a prompt that is learned exactly as the set is, and 0 one that was always solved. Rewards must be in
    [0, 1]. As in the authors' code a missing epoch takes the next one's reward, and a prompt without a reward in the
    last epoch has no score and no part in the mean. Where every prompt is always solved all scores are 1.
    """
    filled = {key: _filled(of_prompt) for key, of_prompt in trajectories.items()}
    complete = {key: of_prompt for key, of_prompt in filled.items() if of_prompt is not None}
    if len({len(of_prompt) for of_prompt in complete.values()}) > 1:
        raise ValueError("the prompts' trajectories do not have the same number of epochs")
    if bad := [key for key, of_prompt in complete.items() if any(not 0 <= r <= 1 for r in of_prompt)]:
        raise ValueError(f"rewards must be in [0, 1]; those of {bad[0]} are {complete[bad[0]]}")
    means = [sum(epoch) / len(epoch) for epoch in zip(*complete.values(), strict=True)]
    largest = math.fsum((1 - m) ** 2 for m in means)
    if largest == 0:
        return dict.fromkeys(complete, 1.0)
    return {
        key: 1 - math.fsum((r - m) ** 2 for r, m in zip(of_prompt, means, strict=True)) / largest
        for key, of_prompt in complete.items()
    }


def _filled(of_prompt: Sequence[float | None]) -> list[float] | None:
    """Gaps take the next epoch's reward; None if there is none to take."""
    out: list[float] = []
    for reward in reversed(of_prompt):
        if reward is None and not out:
            return None
        out.append(out[-1] if reward is None else reward)
    return out[::-1]
