"""What a recipe trains, as updates that can be compared: its policy with the loss of its algorithm, and the critic,
reward model or process reward model beside it, on random samples that have everything these losses ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from megarl.algorithms.online_dpo import pairs_of_rollouts
from megarl.algorithms.preference import on_long_prompts, samples_of, short_samples
from megarl.algorithms.reward_model import scored
from megarl.config import Config
from megarl.data.preferences import Pair
from megarl.data.records import Sample
from megarl.losses.policy import grpo
from megarl.losses.preference import longpo_tokens, preference_tokens
from megarl.losses.reward_model import bradley_terry_tokens, implicit_process_reward_tokens
from megarl.losses.sft import sft
from megarl.losses.unpaired import unpaired_tokens
from megarl.losses.value import value
from megarl.model.engine import Loss
from megarl.verify.shrink import LONGEST_PROMPT, LONGEST_RESPONSE, VOCABULARY

PAIRS = "seq-mean-token-mean"  # how the loops aggregate losses of whole responses and of pairs
# Of bco and kto: a number that the loops compute from the whole step, before its update.
_BASELINE = 0.05


@dataclass(frozen=True)
class Case:
    """One optimizer update. ``samples`` become those of a model by `anchored`."""

    name: str
    samples: list[Sample]
    loss: Loss
    loss_agg_mode: str
    together: int = 1  # neighbours that share a microbatch
    scalar_head: bool = False
    temperature: float = 1.0


def cases_of(cfg: Config) -> list[Case]:
    """The models that the recipe's algorithm updates, the policy first."""
    return _ALGORITHMS[cfg.algorithm](cfg)


def anchored(case: Case, outputs: list[Tensor], seed: int) -> list[Sample]:
    """The samples with log-probabilities before the update, of vLLM and of a reference near ``outputs``, what the model
    says of their responses; or with values and returns near these, where it has a scalar head.

    Far from the model's own, ratios would be clipped, and their gradients 0.
    """
    generator = torch.Generator().manual_seed(seed + 2)
    out = []
    for sample, found in zip(case.samples, outputs, strict=True):
        near = [found + scale * torch.randn(len(found), generator=generator) for scale in (0.1, 0.11, 0.3)]
        if case.scalar_head:
            out.append(replace(sample, values=near[0], returns=near[2]))
        else:
            out.append(replace(sample, old_logps=near[0], rollout_logps=near[1], ref_logps=near[2]))
    return out


# ---- samples ----


def _numbers(cfg: Config) -> torch.Generator:
    return torch.Generator().manual_seed(cfg.run.seed)


def _number(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def _tokens(count: int, generator: torch.Generator) -> list[int]:
    tokens: list[int] = torch.randint(0, VOCABULARY, (count,), generator=generator).tolist()
    return tokens


def _single(cfg: Config, count: int = 12) -> list[Sample]:
    """Responses of many lengths, two to a prompt; some with holes, one that counts for nothing."""
    generator, out = _numbers(cfg), []
    for i in range(count):
        if i % 2 == 0:
            prompt = _tokens(_number(1, LONGEST_PROMPT, generator), generator)
        length = _number(1, LONGEST_RESPONSE, generator)
        sample = Sample(f"random:{i // 2}", i % 2, prompt + _tokens(length, generator), len(prompt))
        sample.advantages = torch.randn(length, generator=generator)
        sample.score, sample.desirable = float(i % 2), i % 3 > 0
        if i % 4 == 3:
            sample.loss_mask = torch.rand(length, generator=generator) < 0.7
        if i == 5:
            sample.loss_mask = torch.zeros(length, dtype=torch.bool)
        out.append(sample)
    return out


def _pairs(cfg: Config, count: int = 6) -> list[Pair]:
    generator, out = _numbers(cfg), []
    for i in range(count):
        prompt = _tokens(_number(2, LONGEST_PROMPT, generator), generator)
        chosen, rejected = (prompt + _tokens(_number(1, LONGEST_RESPONSE, generator), generator) for _ in range(2))
        # As far apart as a reward model's: near what the policy's are apart, squares would leave rounding alone.
        scores = (4 * torch.rand(2, generator=generator)).tolist()
        out.append(Pair(f"random:{i}", chosen, rejected, len(prompt), *scores, reference_prompt=prompt[-1:]))
    return out


def _long(pairs: list[Pair]) -> list[Sample]:
    """What longpo's policy reads. `anchored` gives them the reference's log-probabilities."""
    short = [sample for pair in pairs for sample in short_samples(pair)]
    return on_long_prompts(pairs, [replace(x, ref_logps=torch.zeros(x.response_length)) for x in short])


# ---- one function an algorithm ----


def _policy(cfg: Config) -> list[Case]:
    loss = partial(grpo, cfg=cfg.loss)
    return [Case("policy", _single(cfg), loss, cfg.loss.loss_agg_mode, temperature=cfg.rollout.temperature)]


def _ppo(cfg: Config) -> list[Case]:
    critic = Case("critic", _single(cfg), partial(value, cfg=cfg.loss), "token-mean", scalar_head=True)
    return [*_policy(cfg), critic]


def _prime(cfg: Config) -> list[Case]:
    loss = partial(implicit_process_reward_tokens, beta=cfg.prime.beta)
    model = Case("process reward model", _single(cfg), loss, PAIRS, temperature=cfg.rollout.temperature)
    return [*_policy(cfg), model]


def _sft(cfg: Config) -> list[Case]:
    return [Case("policy", _single(cfg), sft, cfg.loss.loss_agg_mode)]


def _preference(cfg: Config) -> list[Case]:
    pairs, preference = _pairs(cfg), cfg.preference
    if preference.loss == "longpo":
        loss: Loss = partial(longpo_tokens, cfg=preference, prompt_lengths={p.id: p.prompt_length for p in pairs})
        return [Case("policy", _long(pairs), loss, PAIRS, together=2)]
    shift = {"shift": _BASELINE} if preference.loss == "bco_pair" else {}
    samples = [sample for pair in pairs for sample in samples_of(pair)]
    return [Case("policy", samples, partial(preference_tokens, cfg=preference, **shift), PAIRS, together=2)]


def _online_dpo(cfg: Config) -> list[Case]:
    samples = [sample for pair in _pairs(cfg) for sample in samples_of(pair)]
    loss = partial(pairs_of_rollouts, cfg=cfg.preference)
    return [Case("policy", samples, loss, PAIRS, together=2, temperature=cfg.rollout.temperature)]


def _unpaired(cfg: Config) -> list[Case]:
    samples = _single(cfg)
    density = {sample.prompt_id: 0.5 + i / 4 for i, sample in enumerate(samples)}
    loss = partial(
        unpaired_tokens,
        cfg=cfg.preference,
        baseline=_BASELINE,
        density=density if cfg.preference.bco_density_ratio else None,
    )
    return [Case("policy", samples, loss, PAIRS)]


def _reward_model(cfg: Config) -> list[Case]:
    samples = [sample for pair in _pairs(cfg) for sample in scored(pair)]
    loss = partial(bradley_terry_tokens, cfg=cfg.preference)
    return [Case("reward model", samples, loss, PAIRS, together=2, scalar_head=True)]


_ALGORITHMS: dict[str, Callable[[Config], list[Case]]] = {
    "sft": _sft,
    "preference": _preference,
    "unpaired": _unpaired,
    "reward_model": _reward_model,
    "grpo": _policy,
    "ppo": _ppo,
    "remax": _policy,
    "prime": _prime,
    "online_dpo": _online_dpo,
    "distillation": _policy,
}
