"""Sampling: the vLLM engines, what samples are worth, and how weights get from the policy to the engines."""

from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING


@dataclass(frozen=True)
class ResponseLengthConfig:
    first_step: int = MISSING
    """Step, counted from 1, from which on this limit holds."""
    max_response_length: int = MISSING
    """Longest response in tokens."""


@dataclass(frozen=True)
class RolloutConfig:
    num_prompts_per_step: int = 64
    """Prompts sampled in a step, over the whole job."""
    num_generations_per_prompt: int = 8
    """Samples of each prompt: the group that advantages are computed in."""
    tensor_parallel_size: int = 1
    """Consecutive ranks that form one vLLM engine; there are as many engines as fit."""
    dynamic_sampling: bool = False
    """Train on groups of different rewards only, and sample further prompts until there are enough (DAPO)."""
    dynamic_sampling_max_gen_batches: int = 10
    """How often a step draws prompts for that at most."""
    dynamic_sampling_min_reward: float | None = None
    """Leave out groups with a lower mean reward too: too hard (PRIME takes 0.2); null leaves out none."""
    dynamic_sampling_max_reward: float | None = None
    """Leave out groups with a higher mean reward too: too easy (PRIME takes 0.8); null leaves out none."""
    dynamic_sampling_refill: bool = False
    """Begin another prompt for every group that is left out at once, and not when a whole draw has been sampled."""
    oversample: float = 0.0
    """Groups under way beyond a step's, as a share of these: a step ends without the slowest, which go on."""
    max_response_length: int = 1024
    """Longest response in tokens, those that an environment puts into it included."""
    response_length_stages: list[ResponseLengthConfig] = field(default_factory=list)
    """Shorter limits for the first steps, each longer than the last, up to `max_response_length` (DeepScaleR)."""
    temperature: float = 1.0
    """Sampling temperature; the policy's log-probs are taken at the same."""
    top_p: float = 1.0
    """Nucleus sampling: keep the likeliest tokens that together have this probability."""
    top_k: int = -1
    """Keep only this many likeliest tokens; -1 keeps all."""
    stop_token_ids: list[int] = field(default_factory=list)
    """Token ids that end a response, besides the model's own end of sequence."""
    gpu_memory_utilization: float = 0.6
    """Share of a GPU's memory that vLLM may take for weights and KV cache."""
    max_model_len: int | None = None
    """Longest sequence that vLLM plans for; null means `data.max_prompt_length` + `max_response_length`."""
    max_num_seqs: int = 256
    """Most sequences that an engine decodes at the same time."""
    max_num_batched_tokens: int | None = None
    """Most tokens in one forward pass of an engine; null leaves it to vLLM."""
    seed_per_request: bool = True
    """Give every sample a generator of its own, so that samples do not depend on how many engines there are; false
    draws for whole batches, which is faster on a GPU. Colocated only: remote servers always draw for whole batches, so
    that what they sample is not the same twice."""
    enforce_eager: bool = False
    """Run vLLM without CUDA graphs."""
    kv_cache_gb: float = 1.0
    """Size of the KV cache of a rank in GB, on CPU only."""
    sleep_level: Literal[1, 2] = 1
    """What vLLM does with its weights while the policy trains: keep them in host memory (1) or drop them (2)."""
    dtype: Literal["bf16", "fp32"] | None = None
    """Number format of vLLM's weights; null means `model.dtype`."""
    quantization: Literal["fp8_per_tensor", "fp8_per_channel", "fp8_per_block"] | None = None
    """Let vLLM quantise the weights, at its start and at every push; null leaves them as they are."""
    environment: str = "single_turn"
    """What the policy talks with: single_turn, calculator, python, search, countdown, grid, or package.module:f."""
    environment_args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments for the environment."""
    observation_role: str = "user"
    """Role of the messages that an environment puts between turns, where prompts have a chat template."""
    max_turns: int = 8
    """Most turns of a conversation."""
    turn_timeout_s: float | None = None
    """Seconds that a turn may take from when there is an engine for it, tools included; then the conversation ends."""
    episode_timeout_s: float | None = None
    """Seconds that a whole conversation may take before it ends; null is no limit."""
    router_replay: bool = False
    """Send the policy's tokens to the experts that vLLM sent them to, not to those of its own routers (2510.11370)."""
    mode: Literal["colocated", "remote"] = "colocated"
    """Where engines are: in the trainer's processes, in turns with training, or servers of their own (megarl serve)."""
    max_staleness: int = 0
    """Updates by which the weights that sample a token may be behind those that train on it; remote only."""
    on_update: Literal["recompute", "keep_kv", "wait"] = "recompute"
    """Requests that new weights meet: go on after computing their cache anew, go on with the old one, or end first."""
    num_engines: int = 1
    """Servers that `megarl serve` starts on its machine; `megarl train` on one machine starts as many beside itself."""
    num_nodes: int = 0
    """Machines of a job that are for servers only, besides cluster.num_nodes; 0: `megarl train` has them beside it."""
    min_engines: int = 1
    """Servers that a push of weights needs, and waits for; those that come later join at a later push."""
    engine_timeout_s: float = 600.0
    """Seconds that the trainer waits for so many servers before the run ends."""
    max_concurrent: int | None = None
    """Most conversations that a replica of the policy has at a time; null: all that max_staleness allows to begin."""


@dataclass(frozen=True)
class RewardFunction:
    name: str = MISSING
    """math, exact, format, countdown, code, http, judge, reward_model, or your own as package.module:function."""
    weight: float = 1.0
    """Factor of this reward in the sum."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments for the function."""
    domains: list[str] = field(default_factory=list)
    """Values of `reward.domain_key` whose samples it scores; none means all samples."""


@dataclass(frozen=True)
class RewardConfig:
    functions: list[RewardFunction] = field(default_factory=lambda: [RewardFunction("math")])
    """Rewards whose weighted sum scores a sample."""
    workers: int = 2
    """Worker processes that compute rewards, for each vLLM engine; they belong to the engine's first rank."""
    domain_key: str | None = None
    """Field of a record that says which of the rewards with `domains` score it (math, code, ...)."""
    timeout_s: float = 10.0
    """Seconds that a call may take, of one sample or as many as a service takes at once; then its worker is killed."""
    pass_env: list[str] = field(default_factory=list)
    """Environment variables that rewards may see too, such as the key of a judge; by default only PATH and the like."""
    overlong_buffer_len: int = 0
    """Last tokens up to `rollout.max_response_length` in which a response is penalised, linearly; 0 penalises none."""
    overlong_buffer_penalty: float = 1.0
    """That penalty at its largest, at the limit itself."""
    missing_eos_penalty: float = 0.0
    """What a response loses that reached the limit instead of ending by itself."""
    length_penalty: float = 0.0
    """What a response loses for each of its tokens."""
    save_scores: bool = False
    """Write every sample's prompt and reward to rewards.jsonl, which tools/select_prompts.py chooses prompts by."""
    overlong_filtering: bool = False
    """Leave responses that reached the limit out of the loss; they still count in their group's mean."""
    on_error: Literal["drop_group", "abort"] = "drop_group"
    """After a reward fails on a sample: drop that prompt's whole group, or end the run."""


@dataclass(frozen=True)
class ValidationConfig:
    val_period: int = 0
    """Steps between validations; 0 means none in between."""
    val_at_start: bool = True
    """Validate before the first step, when `data.val_path` is set."""
    val_at_end: bool = True
    """Validate after the last step, when `data.val_path` is set."""
    max_val_samples: int | None = None
    """Use only the first so many held-out prompts; null uses all."""
    val_temperature: float = 0.0
    """Sampling temperature of validation, at least 0.01; 0 is greedy."""
    val_top_p: float = 1.0
    """Nucleus sampling of validation."""
    val_num_generations_per_prompt: int = 1
    """Samples of each held-out prompt; accuracy is their mean (pass@1)."""
    val_reward: str | None = None
    """Reward function whose mean is val/accuracy; null takes the first of `reward.functions`."""


@dataclass(frozen=True)
class WeightSyncConfig:
    bucket_size_mb: int = 256
    """Weights travel from the policy to vLLM in exchanges for which no rank needs larger buffers."""
    verify: bool = False
    """At every push, compare checksums of what reaches vLLM with the policy's own; send all twice, and stop if vLLM
    does not compute with the same bits after both."""
    max_gen_kl_error: float | None = None
    """Largest `gen_kl_error` (KL between what vLLM sampled with and what the policy computes) before it is an error."""
    max_token_mult_prob_error: float | None = None
    """Largest `token_mult_prob_error` (mean factor between those probabilities, 1 when equal) before it is an error."""
