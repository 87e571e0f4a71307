"""From rewards to advantages: pure functions over whole groups and whole steps, before anything is split over ranks.

Shapes: N samples, in any order; ``groups`` [N] says which prompt a sample belongs to. What goes by token is [N, L] with
a bool ``mask`` [N, L] of the tokens that the policy wrote: responses begin at 0, holes and padding are masked and may
hold anything. What is masked is 0 in every result.

``groups`` has what compares a sample with others of its prompt, ``tokens`` what credits single tokens, ``shaping`` what
is done to rewards before. Statistics over a step take ``reduce``, which sums a tensor over ranks.
"""

from megarl.advantages.groups import (
    grpo,
    keep_between,
    keep_mixed,
    reinforce,
    remax,
    rloo,
    zero_variance_fraction,
)
from megarl.advantages.shaping import (
    AdaptiveKL,
    choose_pairs,
    missing_eos_penalty,
    sequence_rewards,
    soft_overlong_penalty,
)
from megarl.advantages.tokens import (
    distillation,
    gae,
    moments,
    pad,
    prime,
    process_means,
    reinforce_pp,
    reinforce_pp_baseline,
    reward_to_go,
    token_rewards,
    whiten,
)

__all__ = [
    "AdaptiveKL",
    "choose_pairs",
    "distillation",
    "gae",
    "grpo",
    "keep_between",
    "keep_mixed",
    "missing_eos_penalty",
    "moments",
    "pad",
    "prime",
    "process_means",
    "reinforce",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "remax",
    "reward_to_go",
    "rloo",
    "sequence_rewards",
    "soft_overlong_penalty",
    "token_rewards",
    "whiten",
    "zero_variance_fraction",
]
