"""The method: batch sizes, advantages and losses."""

from dataclasses import dataclass, field
from typing import Literal

from megarl.config.model import OptimizerConfig, ParallelConfig

# Those whose data is what the policy samples.
ON_POLICY = ("grpo", "ppo", "remax", "prime", "online_dpo", "distillation")
# Those that learn from pairs in data.
PAIRED = ("preference", "reward_model")


@dataclass(frozen=True)
class TrainConfig:
    train_global_batch_size: int = 512
    """Sequences in an optimizer update of the whole job; pairs, for preference, reward_model and online_dpo."""
    train_mb_tokens: int = 8192
    """Tokens of a rank in a packed microbatch while training; a context-parallel group holds the longest sequence."""
    logprob_mb_tokens: int = 16384
    """Tokens of a rank in a packed microbatch while computing log-probs only."""
    ppo_epochs: int = 1
    """Passes over each step's samples."""


@dataclass(frozen=True)
class AdvantageConfig:
    adv_estimator: Literal["grpo", "rloo", "reinforce", "reinforce_plus_plus", "reinforce_plus_plus_baseline"] = "grpo"
    """Which function of megarl/algorithms/credit.py makes advantages of rewards, where algorithm is grpo."""
    normalize_by_std: bool = True
    """Divide by the standard deviation of the group's rewards (GRPO); false leaves the differences (Dr. GRPO)."""
    use_leave_one_out_baseline: bool = False
    """Compare a sample with the mean of the others in its group (RLOO), not with the mean of all."""
    eps: float = 1e-6
    """Added to the standard deviation."""
    baseline: Literal["none", "batch", "leave_one_out"] = "leave_one_out"
    """What reinforce compares a reward with: nothing, the mean of the others in the batch, or in the group."""
    truncated_in_baseline: bool = True
    """Responses that reached the limit count in the mean that reinforce compares with; false leaves them out of it."""
    max_difference: float | None = None
    """Bound of remax's difference between a reward and the greedy response's (5 in its authors' code); null is none."""
    gamma: float = 1.0
    """Discount of a later token's reward, where rewards go by token."""
    gae_lambda: float = 0.95
    """Lambda of the generalised advantage estimation of ppo."""
    normalize_advantages: bool = True
    """Whiten the advantages of ppo and prime over all tokens of a step; reinforce_plus_plus always does."""
    whiten_with_bessel: bool = True
    """Take the variance over n - 1 tokens where advantages are whitened (verl, TRL); false over n (OpenRLHF)."""
    kl_coef: float = 0.0
    """Weight of the KL divergence from the reference model in the rewards; 0 leaves it out."""
    kl_target: float | None = None
    """KL, as a mean over tokens, near which `kl_coef` is held by changing it; null does not change it."""
    kl_horizon: int = 10000
    """Samples over which `kl_coef` changes by a factor of e at most, times the error."""


@dataclass(frozen=True)
class LossConfig:
    policy_loss: Literal["ppo_clip", "gspo", "sequence_clip", "cispo", "reinforce"] = "ppo_clip"
    """Which function of megarl/losses/policy.py the advantages go into."""
    clip_ratio_low: float = 0.2
    """How far below 1 the probability ratio counts."""
    clip_ratio_high: float = 0.2
    """How far above 1 the probability ratio counts."""
    clip_ratio_c: float | None = None
    """Dual clip: bound of the ratio for negative advantages, above 1; null is off. Of ppo_clip only."""
    cispo_clip_low: bool = False
    """Clip the weights of cispo from below too, at 1 - `clip_ratio_low`, as other systems do; its paper does not."""
    value_clip: float | None = 0.2
    """How far a critic's value counts that left the value before the updates; null does not clip."""
    loss_agg_mode: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"] = (
        "token-mean"
    )
    """How token losses become one number: all tokens alike, or first within a sequence and then over sequences."""
    kl_loss_coef: float = 0.0
    """Weight of the KL divergence from the reference model in the loss; 0 keeps no reference model."""
    kl_type: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of that KL divergence (http://joschu.net/blog/kl-approx.html)."""
    kl_gradient: Literal["estimator", "score_function", "importance"] = "estimator"
    """Its gradient: of the estimate as it stands, or of the divergence, also weighed by policy / old policy."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus; 0 leaves it out."""
    use_rollout_logps: bool = False
    """Take what vLLM sampled with as the old policy, so that the ratio corrects for the two engines by itself."""
    truncated_importance_sampling_type: Literal["none", "tis", "seq-tis", "icepop", "seq-mask-tis"] = "none"
    """Weigh tokens or whole sequences by policy / rollout probability, cut or masked where the two engines disagree."""
    truncated_importance_sampling_ratio: float = 2.0
    """Largest such weight; icepop and seq-mask-tis leave out what is beyond."""
    truncated_importance_sampling_ratio_min: float = 0.5
    """Smallest such weight that icepop and seq-mask-tis keep."""


@dataclass(frozen=True)
class CriticConfig:
    path: str | None = None
    """Hugging Face directory that the critic starts from, of any size; null means `model.path`."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5))
    """AdamW of the critic; its learning rate is usually some ten times the policy's."""
    critic_warmup_steps: int = 0
    """First steps in which the critic learns alone."""
    own_layout: bool = False
    """Divide the critic over the ranks as `parallel` below says; false divides it as the policy."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """With `own_layout`: how. Samples are dealt again over its replicas."""


@dataclass(frozen=True)
class PrimeConfig:
    path: str | None = None
    """Hugging Face directory that the implicit process reward model starts from; null means `model.path`."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-6))
    """AdamW of that model."""
    beta: float = 0.05
    """Factor of its log-probability ratio to where it started: the reward of a token."""
    process_coef: float = 1.0
    """Weight of the process rewards' part of the advantage."""
    outcome_coef: float = 1.0
    """Weight of the outcome's part of the advantage."""


@dataclass(frozen=True)
class TeacherConfig:
    path: str | None = None
    """Hugging Face directory of the teacher of distillation, of any size, with the policy's tokenizer."""


@dataclass(frozen=True)
class PreferenceConfig:
    loss: Literal[
        "dpo",
        "robust",
        "ipo",
        "hinge",
        "dpop",
        "rpo_bwd_kl",
        "rpo_fwd_kl",
        "rpo_sq",
        "simpo",
        "orpo",
        "bco_pair",
        "longpo",
        "kto",
        "bco",
    ] = "dpo"
    """Which loss: kto and bco of single responses, the others of pairs."""
    beta: float = 0.1
    """Factor of the log-probability ratios: tau of ipo, lambda of orpo."""
    label_smoothing: float = 0.0
    """Share of labels taken to be wrong: of dpo, which becomes conservative DPO, and of robust, which needs it."""
    average_log_probs: bool = False
    """Mean over a response's tokens instead of the sum; simpo and orpo always take the mean."""
    dpop_lambda: float = 50.0
    """Factor of dpop's penalty on a chosen response that became less likely."""
    rpo_eta: float = 1.0
    """Factor of the rewards' gap that the rpo losses aim at."""
    simpo_gamma: float = 0.5
    """Margin of simpo: gamma itself, where its authors' files have gamma / beta."""
    longpo_lambda: float = 0.01
    """Weight of longpo's preference term, against 1 for the likelihood of the long sequence."""
    sft_loss_coef: float = 0.0
    """Weight of the chosen response's mean negative log-likelihood beside the loss."""
    kto_desirable_weight: float = 1.0
    """Weight of kto's desirable examples."""
    kto_undesirable_weight: float = 1.0
    """Weight of kto's undesirable examples."""
    bco_shift: Literal["classes", "examples", "none"] = "classes"
    """What bco and bco_pair compare rewards with: half the classes' means added, the mean of all, or nothing."""
    bco_density_ratio: bool = False
    """Weigh bco's undesirable responses so that their prompts count as those of desirable ones do."""
    ties: Literal["first", "drop"] = "first"
    """Pairs of equal rewards in online_dpo: take the first response for the chosen one, or leave the pair out."""
    precompute_ref_log_probs: bool = False
    """Compute the reference's log-probs of all pairs or examples once, at the start; no reference is kept then."""
    ref_log_probs_path: str | None = None
    """File of such log-probs: read if it is there, else written; null keeps them in memory alone."""
    center_rewards_coef: float = 0.0
    """Reward models: weight of the square of both rewards added, which holds their mean at 0."""
    margin_from_scores: bool = False
    """Reward models: the gap of the scores in the data is the least that the rewards should differ by."""
