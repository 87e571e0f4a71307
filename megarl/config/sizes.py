"""Small sums over a config, and the names of the settings that they rest on."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megarl.config import Config

WORLD = ("cluster.num_nodes", "cluster.gpus_per_node")
TP = "parallel.tensor_model_parallel_size"
PP = "parallel.pipeline_model_parallel_size"
VPP = "parallel.virtual_pipeline_model_parallel_size"
CP = "parallel.context_parallel_size"
DYNAMIC_CP = "parallel.dynamic_context_parallel"
EP = "parallel.expert_model_parallel_size"
ETP = "parallel.expert_tensor_parallel_size"
FIRST = "parallel.num_layers_in_first_pipeline_stage"
LAST = "parallel.num_layers_in_last_pipeline_stage"
DISPATCHER = "parallel.moe_token_dispatcher_type"
ROLLOUT_TP = "rollout.tensor_parallel_size"
LENGTHS = ("data.max_prompt_length", "rollout.max_response_length")


def remainder(value: int, divisor: int) -> int:
    """value % divisor; 0 where the divisor is out of range, which is a problem of its own."""
    return value % divisor if divisor > 0 else 0


def job_size(cfg: "Config") -> int:
    return cfg.cluster.num_nodes * cfg.cluster.gpus_per_node


def expert_tensor_parallel(cfg: "Config") -> int:
    return cfg.parallel.expert_tensor_parallel_size or cfg.parallel.tensor_model_parallel_size


def first_stage(cfg: "Config") -> int | None:
    return cfg.parallel.num_layers_in_first_pipeline_stage


def last_stage(cfg: "Config") -> int | None:
    return cfg.parallel.num_layers_in_last_pipeline_stage


def longest_sequence(cfg: "Config") -> tuple[int, str]:
    """Tokens of the longest sequence, and how they come about."""
    prompt, response = cfg.data.max_prompt_length, cfg.rollout.max_response_length
    words = f"data.max_prompt_length {prompt} + rollout.max_response_length {response} = {prompt + response}"
    return prompt + response, words


def longest_in_microbatch(cfg: "Config", together: int = 1) -> int:
    """Positions of the longest sequence of which ``together`` fit a microbatch of training, whatever the others'
    length: a context-parallel group holds its ranks' budgets, and pads each sequence to a multiple of 2 CP."""
    cp = cfg.parallel.context_parallel_size
    each = 2 * cp if cp > 1 else 1
    budget = -(-cfg.train.train_mb_tokens * cp // each) * each
    return budget // together // each * each
