"""Every knob of a run: nested dataclasses with a sentence under each field, and how they are filled in.

Contract: `load([recipe.yaml, key=value, ...])` merges schema <- YAML <- overrides and returns a frozen `Config`, or
raises `ConfigError` with *every* problem found, before any process group exists. Fields are read as attributes and
never written. A recipe is a short diff from the defaults below; `save` writes the whole of it next to the run's
results. Nothing here imports torch: loading a config takes a fraction of a second.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import MISSING, OmegaConf

from megarl.config_checks import check
from megarl.config_reader import ConfigError, read

__all__ = ["Config", "ConfigError", "launched_world_size", "load", "save", "world_size"]


@dataclass(frozen=True)
class RunConfig:
    name: str = "run"
    """Name of the run: the folder under `root` that holds everything it writes."""
    root: str = "runs"
    """Folder that holds the runs; made when missing."""
    seed: int = 1234
    """Seed of the order of the data, of sampling and of dropout; weights always come from a checkpoint."""
    max_num_steps: int | None = None
    """Stop after this many steps; null goes by `max_num_epochs` alone."""
    max_num_epochs: int = 1
    """Stop after this many passes over the data."""
    deadline_s: float = 1800.0
    """Longest time in seconds that a rank may stay in one phase or collective before it ends the job with an error."""


@dataclass(frozen=True)
class ClusterConfig:
    num_nodes: int = 1
    """Number of machines."""
    gpus_per_node: int = 1
    """Ranks on each machine, one for a GPU; where there is no GPU, CPU processes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes CUDA when torch finds a GPU."""


@dataclass(frozen=True)
class ModelConfig:
    path: str = MISSING
    """Hugging Face directory of the policy: config.json, safetensors and tokenizer."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Number format of weights and activations; the optimizer's own copy is always fp32."""
    logprob_chunk_size: int = 1024
    """Tokens whose logits exist at the same time; smaller needs less memory."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """What the backward pass computes again instead of keeping: whole layers, or only `recompute_modules`."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With full recompute: all layers in units of `recompute_num_layers`, or only that many layers of a stage."""
    recompute_num_layers: int | None = None
    """With full recompute: layers in a unit (uniform), or recomputed layers in a stage (block)."""
    recompute_modules: list[str] = field(default_factory=list)
    """With selective recompute: which parts of a layer, of core_attn and mlp."""
    model_overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of megatron's TransformerConfig to set by name, over what its family says, but for layout and numbers."""


@dataclass(frozen=True)
class ParallelConfig:
    tensor_model_parallel_size: int = 1
    """Ranks that share each layer's matrices."""
    pipeline_model_parallel_size: int = 1
    """Stages that the layers are divided into."""
    sequence_parallel: bool = False
    """Divide activations outside the matrices over the tensor-parallel ranks too."""
    expert_model_parallel_size: int = 1
    """Ranks that share the experts of each layer, each holding some of them whole."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that share each expert's matrices; null means `tensor_model_parallel_size`."""
    num_layers_in_first_pipeline_stage: int | None = None
    """Layers of the first stage, which also holds the embedding; null divides evenly."""
    num_layers_in_last_pipeline_stage: int | None = None
    """Layers of the last stage, which also computes the log-probs; null divides evenly."""


@dataclass(frozen=True)
class OptimizerConfig:
    lr: float = 1e-6
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after the warm-up."""
    lr_warmup_iters: int = 0
    """Optimizer updates over which the learning rate rises from 0."""
    lr_decay_iters: int | None = None
    """Optimizer updates until `min_lr` is reached, warm-up included; null means the run's last update."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    adam_beta1: float = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: float = 0.999
    """Decay of Adam's second moment."""
    adam_eps: float = 1e-8
    """Added to the root of Adam's second moment."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    use_distributed_optimizer: bool = True
    """Divide the optimizer's state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""


@dataclass(frozen=True)
class TrainConfig:
    train_global_batch_size: int = 512
    """Sequences in an optimizer update, over the whole job; pairs, where algorithm is preference."""
    train_mb_tokens: int = 8192
    """Tokens in a packed microbatch of a rank while training; the longest sequence must fit."""
    logprob_mb_tokens: int = 16384
    """Tokens in a packed microbatch of a rank while computing log-probs only."""
    ppo_epochs: int = 1
    """Passes over each step's samples."""


@dataclass(frozen=True)
class DataConfig:
    path: str = MISSING
    """Training data: a .jsonl, .json or .parquet file, or the name of a data set that `datasets` can load."""
    split: str = "train"
    """Split to train on, for a `datasets` name."""
    val_path: str | None = None
    """Held-out data, in the same forms as `path`, for GRPO; null means no validation."""
    val_split: str = "test"
    """Split to validate on, for a `datasets` name."""
    subset: str | None = None
    """Configuration name of a `datasets` data set, such as main for GSM8K."""
    val_subset: str | None = None
    """Configuration name of the held-out data set; null means `subset`."""
    prompt_key: str = "prompt"
    """Field of a record that holds the prompt: text, or a list of chat messages."""
    answer_key: str = "answer"
    """Field of a record that holds the answer which rewards compare with."""
    response_key: str = "response"
    """Field of a record that holds the response which SFT learns, or that has a label; else `completion` is read."""
    reasoning_key: str | None = None
    """Field of a record that holds the reasoning before its response; SFT puts it between think tags."""
    messages_key: str = "messages"
    """Field that holds a conversation, for a record without a prompt or response; else `conversations` is read."""
    chosen_key: str = "chosen"
    """Field of a pair that holds the better response: text, a message, or the whole conversation."""
    rejected_key: str = "rejected"
    """Field of a pair that holds the worse response."""
    chosen_score_key: str = "chosen_score"
    """Field of a pair that holds the chosen response's score; read if it is there."""
    rejected_score_key: str = "rejected_score"
    """Field of a pair that holds the rejected response's score; read if it is there."""
    responses_key: str = "responses"
    """Field that holds several responses to rank: texts, or objects with a score each."""
    scores_key: str = "scores"
    """Field that holds the scores of those responses, as many and in the same order."""
    label_key: str = "label"
    """Field of an unpaired example that says whether its response is desirable: true or false, 1 or 0."""
    reference_prompt_key: str | None = None
    """Field of a pair that holds the prompt which the reference model reads in place of the prompt, for LongPO."""
    ranked_pairs: Literal["best_worst", "all"] = "best_worst"
    """Pairs made of ranked responses: the best with the worst, or every two with different scores."""
    train_on_turns: Literal["all", "last"] = "all"
    """Which of the assistant's turns of a conversation SFT learns."""
    pass_rate_key: str | None = None
    """Field of a record that holds the share of attempts that solved it, in [0, 1]."""
    pass_rates: str | None = None
    """Measured pass rates: a .jsonl, .json or .parquet file of id (`train.jsonl:17`) and pass_rate."""
    min_pass_rate: float = 0.0
    """Leave out prompts with a lower pass rate; 0.01 leaves out what was never solved."""
    max_pass_rate: float = 1.0
    """Leave out prompts with a higher pass rate; 0.99 leaves out what was always solved."""
    order: Literal["file", "easiest_first", "hardest_first"] = "file"
    """Order of prompts without `shuffle`: as read, or by pass rate."""
    adapter: str | None = None
    """Reader for a data set with fields of its own, such as gsm8k; null uses the keys above."""
    system_prompt: str | None = None
    """System message put before every prompt."""
    apply_chat_template: bool = True
    """Render prompts with the tokenizer's chat template; false feeds the text as it stands."""
    shuffle: bool = True
    """Shuffle every epoch anew, by the run's seed."""
    max_prompt_length: int = 1024
    """Longest prompt in tokens."""
    overlong_prompts: Literal["drop", "refuse"] = "drop"
    """What to do with a longer prompt: drop and count it, or end with an error."""
    bad_records: Literal["refuse", "drop"] = "refuse"
    """What to do with a record that cannot be read: end with file:line and the reason, or drop and count it."""
    max_records: int | None = None
    """Read only this many records; null reads all."""


@dataclass(frozen=True)
class RolloutConfig:
    num_prompts_per_step: int = 64
    """Prompts sampled in a step, over the whole job."""
    num_generations_per_prompt: int = 8
    """Samples of each prompt: the group that advantages are computed in."""
    tensor_parallel_size: int = 1
    """Consecutive ranks that form one vLLM engine; there are as many engines as fit."""
    max_response_length: int = 1024
    """Longest response in tokens."""
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
    enforce_eager: bool = False
    """Run vLLM without CUDA graphs."""
    kv_cache_gb: float = 1.0
    """Size of the KV cache of a rank in GB, on CPU only."""
    sleep_level: Literal[1, 2] = 1
    """What vLLM does with its weights while the policy trains: keep them in host memory (1) or drop them (2)."""
    dtype: Literal["bf16", "fp32"] | None = None
    """Number format of vLLM's weights; null means `model.dtype`."""
    quantization: Literal["fp8"] | None = None
    """Let vLLM quantise the weights, at its start and at every push; null leaves them as they are."""


@dataclass(frozen=True)
class RewardFunction:
    name: str = MISSING
    """math, exact, format, countdown, or a function of your own as package.module:function."""
    weight: float = 1.0
    """Factor of this reward in the sum."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments for the function."""


@dataclass(frozen=True)
class RewardConfig:
    functions: list[RewardFunction] = field(default_factory=lambda: [RewardFunction("math")])
    """Rewards whose weighted sum scores a sample."""
    workers: int = 2
    """Worker processes that compute rewards, for each vLLM engine; they belong to the engine's first rank."""
    timeout_s: float = 10.0
    """Seconds that one sample may take; a worker that needs longer is killed and replaced."""
    on_error: Literal["drop_group", "abort"] = "drop_group"
    """After a reward fails on a sample: drop that prompt's whole group, or end the run."""


@dataclass(frozen=True)
class AdvantageConfig:
    normalize_by_std: bool = True
    """Divide by the standard deviation of the group's rewards (GRPO); false leaves the differences (Dr. GRPO)."""
    use_leave_one_out_baseline: bool = False
    """Compare a sample with the mean of the others in its group (RLOO), not with the mean of all."""
    eps: float = 1e-6
    """Added to the standard deviation."""


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
    """What rewards are compared with in bco: half the classes' means added, the mean of all, or nothing."""
    center_rewards_coef: float = 0.0
    """Reward models: weight of the square of both rewards added, which holds their mean at 0."""


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
    """Send weights twice at every push, and stop if vLLM does not compute with the same bits after both."""
    max_gen_kl_error: float | None = None
    """Largest `gen_kl_error` (KL between what vLLM sampled with and what the policy computes) before it is an error."""
    max_token_mult_prob_error: float | None = None
    """Largest `token_mult_prob_error` (mean factor between those probabilities, 1 when equal) before it is an error."""


@dataclass(frozen=True)
class CheckpointConfig:
    save_period: int = 0
    """Steps between Hugging Face exports of the policy; 0 means none in between."""
    save_at_end: bool = True
    """Export the policy after the last step."""


@dataclass(frozen=True)
class LoggerConfig:
    wandb_enabled: bool = False
    """Log to Weights & Biases too; metrics.jsonl and TensorBoard files are always written."""
    project: str = "megarl"
    """Weights & Biases project."""
    name: str | None = None
    """Weights & Biases name of the run; null means `run.name`."""


@dataclass(frozen=True)
class Config:
    algorithm: Literal["sft", "preference", "unpaired", "grpo"] = "grpo"
    """Which loop of megarl/algorithms runs."""
    run: RunConfig = field(default_factory=RunConfig)
    """Name, length and seed of the run."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """How many ranks there are, and on what."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The policy."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the policy is divided over ranks; what remains of the job is data parallel."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and its learning rate."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Batch sizes."""
    data: DataConfig = field(default_factory=DataConfig)
    """Prompts, responses, preferences, and which of them to take."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Sampling and the vLLM engines."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """What a sample is worth."""
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    """From rewards to advantages."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The policy loss."""
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    """The loss of preference data."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """When and how held-out accuracy is measured."""
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)
    """From the policy to vLLM, and how far the two may disagree."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When the policy is written out."""
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    """Where metrics go besides the run's folder."""


def load(argv: Sequence[str], *, check_model: bool = True) -> Config:
    """The config of `[recipe.yaml, key=value, ...]`, checked; raises ConfigError with all problems at once.

    `check_model=False` leaves out what needs files or devices of this machine: the model's directory, data files, CUDA.
    """
    reading = read(Config, argv)
    cfg: Config = reading.config
    problems = reading.problems + check(cfg, launched_world_size(), reading.refused, this_machine=check_model)
    if problems:
        raise ConfigError(problems)
    return cfg


def save(cfg: Config, path: str | Path) -> None:
    """Write every value, defaults included, as YAML that `load` reads back to the same config."""
    OmegaConf.save(OmegaConf.structured(cfg), path)


def world_size(cfg: Config) -> int:
    """Number of ranks: what the launcher started, or what the recipe asks for when nothing is launched yet."""
    return launched_world_size() or cfg.cluster.num_nodes * cfg.cluster.gpus_per_node


def launched_world_size() -> int | None:
    """Number of ranks that torchrun, or srun by itself, started this process among; None before any launch.

    A batch script has SLURM_PROCID=0 and the job's SLURM_NTASKS without being a rank: srun alone counts the tasks of a
    step. A step of one task is a job started by hand, or the shell of an interactive allocation.
    """
    if world := os.environ.get("WORLD_SIZE"):
        return int(world)
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1)
    return tasks if tasks > 1 and "SLURM_PROCID" in os.environ else None
