"""What tools/compare_trl.py compares: the data, and every method in megarl's words and in TRL's.

Needs nothing but the standard library: both sides import it, each in its own virtual environment.

Equal on both sides: model, batches and their order, AdamW (lr 1e-3, constant, no decay), clipping at 1, fp32, no
dropout. Where the two define a method differently the data or an option makes them the same; ``note`` says how.

What TRL 1.16 does not have has no row: its sigmoid loss ignores ``label_smoothing`` (cDPO), and BCO of single
responses went with its trainer. Three of TRL's trainers have none either: PPO puts the score behind EOS, where
megarl's critic has no value; GKD minimises a divergence over the whole vocabulary, megarl's distillation a policy
gradient on the sampled tokens; online DPO samples inside its training step, and its loss is dpo's or ipo's on two of
the samples, which have rows.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STEPS = 6
BATCH = 8  # sequences, or pairs
GROUP = 4  # completions of a prompt
MAX_COMPLETION = 8
CHARACTERS = "0123456789+="
SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
EOS = list(SPECIAL).index("eos_token")


@dataclass(frozen=True)
class Method:
    """``megarl`` are settings over the recipe; ``trl`` are arguments of the trainer's config."""

    data: str  # which of `make`'s files
    trainer: str  # TRL's, as module:name
    megarl: dict[str, Any]
    trl: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    updates_per_rollout: int = 1  # of those that sample

    @property
    def samples(self) -> bool:
        return self.data == "groups"


def dpo(loss: str, note: str = "", megarl: dict[str, Any] | None = None, **trl: Any) -> Method:
    ours = {"algorithm": "preference", "preference.loss": loss, "preference.beta": 0.1, **(megarl or {})}
    return Method("pairs", "trl:DPOTrainer", ours, {"beta": 0.1, **trl}, note)


def policy(trainer: str, megarl: dict[str, Any], trl: dict[str, Any], note: str = "", updates: int = 1) -> Method:
    if trainer == "GRPOTrainer":
        trl = {"beta": 0.0, **trl}
    return Method("groups", f"trl:{trainer}", {"algorithm": "grpo", **megarl}, trl, note, updates)


MEAN = {"loss.loss_agg_mode": "seq-mean-token-mean"}
TRL_EPS = {"advantage.eps": 1e-4}
_CPO = "trl.experimental.cpo:CPOTrainer"
_ONE = "prompts of one token and chosen responses of equal length: TRL's likelihood is over prompts too, and by token"
_KTO = "file reversed within batches: TRL takes the response before, megarl the one after, for the KL"

METHODS = {
    "sft": Method("sft", "trl:SFTTrainer", {"algorithm": "sft"}, {"completion_only_loss": True}),
    "reward model": Method("pairs", "trl:RewardTrainer", {"algorithm": "reward_model"}),
    "reward model, centred": Method(
        "pairs",
        "trl:RewardTrainer",
        {"algorithm": "reward_model", "preference.center_rewards_coef": 0.01},
        {"center_rewards_coefficient": 0.01},
    ),
    "dpo": dpo("dpo", loss_type=["sigmoid"]),
    "reward model, margin": Method(
        "scored",
        "trl:RewardTrainer",
        {"algorithm": "reward_model", "preference.margin_from_scores": True},
        note="TRL's margin is the gap of the scores",
    ),
    "robust dpo": dpo("robust", "", {"preference.label_smoothing": 0.1}, loss_type=["robust"], label_smoothing=0.1),
    "ipo": dpo("ipo", "TRL's only form: means", {"preference.average_log_probs": True}, loss_type=["ipo"]),
    "hinge": dpo("hinge", loss_type=["hinge"]),
    "bco, pairs": dpo("bco_pair", "no shift", {"preference.bco_shift": "none"}, loss_type=["bco_pair"]),
    "dpo, means": dpo("dpo", "", {"preference.average_log_probs": True}, loss_type=["sigmoid_norm"]),
    "dpo + sft": Method(
        "short",
        "trl:DPOTrainer",
        {"algorithm": "preference", "preference.loss": "dpo", "preference.sft_loss_coef": 0.5},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "beta": 0.1},
        _ONE,
    ),
    "simpo": Method(
        "pairs",
        _CPO,
        {
            "algorithm": "preference",
            "preference.loss": "simpo",
            "preference.beta": 2.0,
            "preference.simpo_gamma": 0.5,
        },
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "cpo_alpha": 0.0},
        "without TRL's default likelihood term",
    ),
    "orpo": Method(
        "short",
        "trl.experimental.orpo:ORPOTrainer",
        {"algorithm": "preference", "preference.loss": "orpo", "preference.beta": 0.1},
        {"beta": 0.1},
        _ONE,
    ),
    "kto": Method(
        "labels",
        "trl:KTOTrainer",
        {"algorithm": "unpaired", "preference.loss": "kto", "preference.kto_undesirable_weight": 0.8},
        {"beta": 0.1, "undesirable_weight": 0.8},
        _KTO,
    ),
    "grpo": policy(
        "GRPOTrainer",
        {**MEAN, **TRL_EPS, "loss.kl_loss_coef": 0.04},
        {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False},
    ),
    "grpo, KL by importance": policy(
        "GRPOTrainer",
        {**MEAN, **TRL_EPS, "loss.kl_loss_coef": 0.04, "loss.kl_gradient": "importance"},
        {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": True},
        "TRL's default",
        2,
    ),
    "grpo, two updates": policy(
        "GRPOTrainer",
        {**MEAN, **TRL_EPS, "loss.clip_ratio_high": 0.28},
        {"loss_type": "grpo", "epsilon_high": 0.28},
        "",
        2,
    ),
    "dr. grpo": policy(
        "GRPOTrainer",
        {"advantage.normalize_by_std": False, "loss.loss_agg_mode": "seq-mean-token-sum-norm"},
        {"loss_type": "dr_grpo", "scale_rewards": "none"},
    ),
    "dapo's loss": policy(
        "GRPOTrainer", {**TRL_EPS, "loss.clip_ratio_high": 0.28}, {"loss_type": "dapo", "epsilon_high": 0.28}, "", 2
    ),
    "gspo": policy(
        "GRPOTrainer",
        {**MEAN, **TRL_EPS, "loss.policy_loss": "gspo"},
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
        "",
        2,
    ),
    "cispo": policy(
        "GRPOTrainer",
        {**TRL_EPS, "loss.policy_loss": "cispo", "loss.clip_ratio_high": 0.5},
        {"loss_type": "cispo", "epsilon_high": 1.5},
        "TRL's bound is 1 + megarl's",
        2,
    ),
    "rloo": policy(
        "RLOOTrainer",
        {**MEAN, "loss.policy_loss": "sequence_clip", "advantage.adv_estimator": "rloo", "advantage.kl_coef": 0.05},
        {"beta": 0.05},
        "KL in the rewards",
        2,
    ),
}


def make(folder: Path, seed: int = 0) -> None:
    """Write every method's data, and reversed copies where the two sides go through it in other directions."""
    generator = random.Random(seed)

    def number(low: int, high: int) -> str:
        return str(generator.randint(10**low, 10**high - 1))

    def prompt() -> str:
        return f"{number(0, 3)}+{number(0, 3)}="

    rows = STEPS * BATCH
    sft = [{"prompt": prompt(), "response": number(0, 5)} for _ in range(rows)]
    pairs = [{"prompt": prompt(), "chosen": number(0, 3), "rejected": number(3, 5)} for _ in range(rows)]
    short = [{"prompt": number(0, 1), "chosen": number(2, 3), "rejected": number(3, 5)} for _ in range(rows)]
    scored = [row | {"chosen_score": generator.randint(2, 4), "rejected_score": 1} for row in pairs]
    labels = [{"prompt": f"{i}=", "response": number(0, 5), "label": i % 3 > 0} for i in range(rows)]
    batches = [labels[at : at + BATCH] for at in range(0, rows, BATCH)]
    groups = [
        {"prompt": f"{i}+{number(0, 3)}=", "completions": completions(generator), "rewards": rewards(generator)}
        for i in range(rows // GROUP)
    ]
    reversed_labels = [row for batch in batches for row in reversed(batch)]
    files = {"sft": sft, "pairs": pairs, "short": short, "scored": scored, "labels": labels, "groups": groups}
    for name, made in (files | {"labels-reversed": reversed_labels}).items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))


def completions(generator: random.Random) -> list[list[int]]:
    """Token ids that anybody could have sampled; all but some end in EOS."""
    made = []
    for _ in range(GROUP):
        length = generator.randint(1, MAX_COMPLETION - 1)
        digits = [len(SPECIAL) + generator.randrange(len(CHARACTERS)) for _ in range(length)]
        made.append([*digits, EOS])
    return made


def rewards(generator: random.Random) -> list[float]:
    return [generator.randint(0, 4) / 4 for _ in range(GROUP)]


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
