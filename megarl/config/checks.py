"""All checks of a config, and of them those whose numbers have to fit each other or the launch.

Contract: a check is a generator over a config that yields `Problem`s; it changes nothing and starts nothing. A
problem shows the arithmetic (`512 % 384 = 128`) and names the fields it rests on: `check` leaves out what rests on a
value that is wrong anyway. These need the config alone; those of `megarl.config.machine` look at this machine.
"""

from typing import TYPE_CHECKING

from megarl.config.acting import check_acting
from megarl.config.algorithm import ON_POLICY, PAIRED
from megarl.config.critic import check_critic, critic_as_policy, of_critic
from megarl.config.fp8 import check_fp8_values
from megarl.config.machine import check_machine
from megarl.config.memory import check_memory
from megarl.config.remote import check_remote
from megarl.config.running import check_running
from megarl.config.sizes import (
    CP,
    DISPATCHER,
    DYNAMIC_CP,
    EP,
    ETP,
    FIRST,
    LAST,
    LENGTHS,
    PP,
    ROLLOUT_TP,
    TP,
    VPP,
    WORLD,
    expert_tensor_parallel,
    first_stage,
    job_size,
    last_stage,
    longest_in_microbatch,
    longest_sequence,
    remainder,
)
from megarl.config.unread import check_unread
from megarl.config.values import Problem, Problems, check_ranges, check_values

if TYPE_CHECKING:
    from megarl.config import Config


def check(cfg: "Config", launched: int | None, refused: set[str], *, this_machine: bool) -> list[str]:
    """Every problem of a config, but for echoes of the values that were `refused` before.

    `launched` is the number of ranks that a launcher started; None before the launch.
    """
    ranges = list(check_ranges(cfg))  # no echoes here: a refused value left its default behind, which is in range
    refused = refused.union(*(problem.fields for problem in ranges))
    own = [
        *check_values(cfg),
        *check_running(cfg),
        *check_acting(cfg),
        *check_unread(cfg),
        *check_memory(cfg),
        *check_fp8_values(cfg),
    ]
    others = [*own, *_launch(cfg, launched), *_layout(cfg)]
    if cfg.algorithm in ON_POLICY:
        engines = _engines(cfg) if cfg.rollout.mode == "colocated" else ()
        others += [*engines, *_grpo(cfg), *_lengths(cfg), *check_remote(cfg)]
    else:
        others += _examples(cfg)
    if cfg.algorithm == "ppo":
        others += _critic(cfg)
    if this_machine:
        others += check_machine(cfg, launched)
    return [problem.text for problem in ranges] + [problem.text for problem in others if not _echo(problem, refused)]


def _echo(problem: Problem, refused: set[str]) -> bool:
    """Whether a field of the problem, or its whole section, was refused."""
    return any(field in refused or field.partition(".")[0] in refused for field in problem.fields)


# ---- sizes that have to fit each other ----


def _critic(cfg: "Config") -> Problems:
    """A critic's own layout divides the ranks, and holds the longest sequence, as the policy's does."""
    wrong = list(check_critic(cfg))
    yield from wrong
    if cfg.critic.own_layout and not wrong:
        critic = critic_as_policy(cfg)
        yield from of_critic(_layout(critic))
        if critic.parallel.context_parallel_size != cfg.parallel.context_parallel_size:
            yield from of_critic(_lengths(critic))


def _launch(cfg: "Config", launched: int | None) -> Problems:
    """A launcher started as many ranks as the recipe is made for."""
    nodes, per_node = cfg.cluster.num_nodes, cfg.cluster.gpus_per_node
    if launched is not None and launched != nodes * per_node:
        text = (
            f"{launched} ranks were launched, but cluster.num_nodes {nodes} x cluster.gpus_per_node {per_node} = "
            f"{nodes * per_node}"
        )
        yield Problem(text, WORLD)


def _layout(cfg: "Config") -> Problems:
    """Ranks over tensor, pipeline, context and data parallelism, and what of it needs what else."""
    world, batch = job_size(cfg), cfg.train.train_global_batch_size
    tp, pp, cp = (
        cfg.parallel.tensor_model_parallel_size,
        cfg.parallel.pipeline_model_parallel_size,
        cfg.parallel.context_parallel_size,
    )
    model = tp * pp * cp
    words = f"{TP} {tp} x {PP} {pp}" + (f" x {CP} {cp}" if cp > 1 else "")
    if rest := remainder(world, model):
        text = f"{world} ranks cannot be divided by {words} = {model}: {world} % {model} = {rest}"
        yield Problem(text, (*WORLD, TP, PP, CP))
    else:
        yield from _expert_layout(cfg)
    if not rest and batch < (replicas := world // max(1, model)):
        yield Problem(
            f"train.train_global_batch_size = {batch} sequences are too few for {replicas} data-parallel ranks: "
            f"{world} ranks / ({words}) = {replicas}",
            (*WORLD, TP, PP, CP, "train.train_global_batch_size"),
        )
    yield from _dynamic_context(cfg)
    if cfg.parallel.moe_token_dispatcher_type == "allgather" and pp > 1:
        text = (
            f"{DISPATCHER} = allgather takes packs of one length, which stages do not send: {PP} = {pp}; set alltoall"
        )
        yield Problem(text, (DISPATCHER, PP))
    if cfg.model.freeze_router and cfg.model.moe_aux_loss_coeff:
        text = f"model.moe_aux_loss_coeff = {cfg.model.moe_aux_loss_coeff} is learnt by routers: model.freeze_router"
        yield Problem(f"{text} = true holds them", ("model.moe_aux_loss_coeff", "model.freeze_router"))
    if cfg.parallel.sequence_parallel and tp == 1:
        text = f"parallel.sequence_parallel divides activations over tensor-parallel ranks, but {TP} = 1"
        yield Problem(text, ("parallel.sequence_parallel", TP))
    if cfg.parallel.virtual_pipeline_model_parallel_size is not None and pp == 1:
        chunks = cfg.parallel.virtual_pipeline_model_parallel_size
        yield Problem(f"{VPP} = {chunks} needs more than one stage, but {PP} = 1", (VPP, PP))
    for path, layers in ((FIRST, first_stage(cfg)), (LAST, last_stage(cfg))):
        if layers is not None and pp == 1:
            yield Problem(f"{path} = {layers} needs more than one stage, but {PP} = 1", (path, PP))


def _dynamic_context(cfg: "Config") -> Problems:
    """What knows of the whole context-parallel group only."""
    if not cfg.parallel.dynamic_context_parallel:
        return
    cp = cfg.parallel.context_parallel_size
    if cp < 2 or cp & (cp - 1):
        text = f"{DYNAMIC_CP} halves groups of {CP} ranks again and again: {CP} = {cp} is no power of two above 1"
        yield Problem(text, (DYNAMIC_CP, CP))
    clashes = {
        f"{DISPATCHER} = allgather takes packs of one length": (
            DISPATCHER,
            cfg.parallel.moe_token_dispatcher_type == "allgather",
        ),
        "model.moe_aux_loss_coeff > 0 counts each pack's tokens over the whole group": (
            "model.moe_aux_loss_coeff",
            cfg.model.moe_aux_loss_coeff > 0,
        ),
        "model.recompute_modules mla_up_proj rotates again in backward, by what the last pack's ranks are": (
            "model.recompute_modules",
            "mla_up_proj" in cfg.model.recompute_modules,
        ),
    }
    for why, (path, wished) in clashes.items():
        if wished:
            yield Problem(f"{DYNAMIC_CP} = true does not go with it: {why} (megatron-core)", (DYNAMIC_CP, path))


def _expert_layout(cfg: "Config") -> Problems:
    """Ranks over expert and pipeline parallelism. One model's experts and the rest of it are to be on the same ranks,
    so that the ranks of the smaller share lie within those of the larger."""
    world, tp, pp = job_size(cfg), cfg.parallel.tensor_model_parallel_size, cfg.parallel.pipeline_model_parallel_size
    ep, etp = cfg.parallel.expert_model_parallel_size, expert_tensor_parallel(cfg)
    fields = (*WORLD, TP, PP, EP, ETP)
    if rest := remainder(world, ep * etp * pp):
        text = f"{world} ranks cannot be divided by {EP} {ep} x {ETP} {etp} x {PP} {pp} = {ep * etp * pp}"
        yield Problem(f"{text}: {world} % {ep * etp * pp} = {rest}", fields)
    elif remainder(tp, ep * etp) and remainder(ep * etp, tp):
        yield Problem(
            f"{TP} {tp} and {EP} {ep} x {ETP} {etp} = {ep * etp} do not divide one another: "
            f"{tp} % {ep * etp} = {tp % (ep * etp)}, {ep * etp} % {tp} = {ep * etp % tp}",
            fields,
        )


def _engines(cfg: "Config") -> Problems:
    """Ranks over vLLM engines: several to a node, or several nodes to an engine, but none across part of a node."""
    world, per_node, tp = job_size(cfg), cfg.cluster.gpus_per_node, cfg.rollout.tensor_parallel_size
    if rest := remainder(world, tp):
        text = f"{world} ranks cannot be divided by {ROLLOUT_TP} {tp}: {world} % {tp} = {rest}"
        yield Problem(text, (*WORLD, ROLLOUT_TP))
    elif remainder(per_node, tp) and remainder(tp, per_node):
        yield Problem(
            f"cluster.gpus_per_node {per_node} and {ROLLOUT_TP} {tp} do not divide one another: an engine would have "
            f"part of a node ({per_node} % {tp} = {per_node % tp}, {tp} % {per_node} = {tp % per_node})",
            (*WORLD, ROLLOUT_TP),
        )


def _grpo(cfg: "Config") -> Problems:
    """Groups and batches of a step."""
    rollout, batch = cfg.rollout, cfg.train.train_global_batch_size
    prompts, group = rollout.num_prompts_per_step, rollout.num_generations_per_prompt
    if cfg.algorithm == "online_dpo":
        if rest := remainder(prompts, batch):
            yield Problem(
                f"rollout.num_prompts_per_step {prompts}, a pair each, do not make whole updates of "
                f"train.train_global_batch_size {batch} pairs: {prompts} % {batch} = {rest}",
                ("rollout.num_prompts_per_step", "train.train_global_batch_size"),
            )
    elif rest := remainder(prompts * group, batch):
        yield Problem(
            f"rollout.num_prompts_per_step {prompts} x rollout.num_generations_per_prompt {group} = {prompts * group} "
            f"sequences a step do not make whole updates of train.train_global_batch_size {batch} sequences: "
            f"{prompts * group} % {batch} = {rest}",
            (
                "rollout.num_prompts_per_step",
                "rollout.num_generations_per_prompt",
                "train.train_global_batch_size",
            ),
        )
    updates = cfg.train.ppo_epochs * -(-prompts * group // max(batch, 1))
    if cfg.loss.policy_loss == "reinforce" and cfg.algorithm != "online_dpo" and updates > 1:
        yield Problem(
            f"loss.policy_loss = reinforce takes samples to be the present policy's, but train.ppo_epochs "
            f"{cfg.train.ppo_epochs} x {prompts * group} sequences a step / train.train_global_batch_size {batch} = "
            f"{updates} updates; take one, or ppo_clip",
            (
                "loss.policy_loss",
                "train.ppo_epochs",
                "rollout.num_prompts_per_step",
                "rollout.num_generations_per_prompt",
                "train.train_global_batch_size",
            ),
        )
    if group == 1 and _compares_in_groups(cfg):
        why = "has no pair" if cfg.algorithm == "online_dpo" else "is its own mean, so every advantage is r - r = 0"
        text = f"rollout.num_generations_per_prompt = 1: a group of one {why}"
        yield Problem(text, ("rollout.num_generations_per_prompt", "algorithm", "advantage.adv_estimator"))
    if rollout.max_num_batched_tokens is not None and rollout.max_num_batched_tokens < rollout.max_num_seqs:
        yield Problem(
            f"rollout.max_num_batched_tokens = {rollout.max_num_batched_tokens} is less than a token for each of "
            f"rollout.max_num_seqs = {rollout.max_num_seqs}",
            ("rollout.max_num_batched_tokens", "rollout.max_num_seqs"),
        )
    if rollout.quantization is not None and (rollout.dtype or cfg.model.dtype) == "fp32":
        yield Problem(
            f"rollout.quantization = {rollout.quantization} needs rollout.dtype = bf16: vLLM quantises no fp32 weights",
            ("rollout.quantization", "rollout.dtype", "model.dtype"),
        )


def _compares_in_groups(cfg: "Config") -> bool:
    """Whether advantages compare a sample with others of its prompt."""
    estimator, baseline = cfg.advantage.adv_estimator, cfg.advantage.baseline
    by_itself = estimator == "reinforce_plus_plus" or (estimator == "reinforce" and baseline != "leave_one_out")
    always = cfg.rollout.dynamic_sampling or cfg.algorithm in ("prime", "online_dpo")
    return always or (cfg.algorithm == "grpo" and not by_itself)


def _lengths(cfg: "Config") -> Problems:
    """The longest sequence has to fit vLLM's plan and every microbatch."""
    longest, words = longest_sequence(cfg)
    cp = cfg.parallel.context_parallel_size
    if cfg.rollout.max_model_len is not None and cfg.rollout.max_model_len < longest:
        path = "rollout.max_model_len"
        text = f"{path} = {cfg.rollout.max_model_len} is less than the longest sequence: {words}"
        yield Problem(text, (path, *LENGTHS))
    if cfg.algorithm == "online_dpo" and longest_in_microbatch(cfg, 2) < longest:
        times, padding = _over_context(cfg)
        limit = f"train.train_mb_tokens = {cfg.train.train_mb_tokens}{times}"
        text = f"{limit} is less than a pair of the longest{padding}: 2 x ({words})"
        yield Problem(text, ("train.train_mb_tokens", CP, *LENGTHS))
        return
    for path, limit in {
        "train.train_mb_tokens": cfg.train.train_mb_tokens,
        "train.logprob_mb_tokens": cfg.train.logprob_mb_tokens,
    }.items():
        if limit * cp < longest:
            times = f" x {CP} {cp} = {limit * cp}" if cp > 1 else ""
            text = f"{path} = {limit}{times} is less than the longest sequence: {words}"
            yield Problem(text, (path, CP, *LENGTHS))


def _over_context(cfg: "Config") -> tuple[str, str]:
    """How context parallelism changes what a budget holds, in words."""
    cp = cfg.parallel.context_parallel_size
    if cp == 1:
        return "", ""
    return f" x {CP} {cp} = {cfg.train.train_mb_tokens * cp}", f", each padded to a multiple of 2 x {cp}"


def _examples(cfg: "Config") -> Problems:
    """The longest prompt leaves room to learn something; longer examples are dropped or refused as they are read."""
    prompt, budget = cfg.data.max_prompt_length, cfg.train.train_mb_tokens
    sides = 2 if cfg.algorithm in PAIRED else 1
    if longest_in_microbatch(cfg, sides) < prompt + 1:
        what, open_ = ("pair", "2 x (") if sides == 2 else ("example", "")
        times, padding = _over_context(cfg)
        least = f"{open_}data.max_prompt_length {prompt} + 1 token of response{')' * (sides - 1)}"
        yield Problem(
            f"train.train_mb_tokens = {budget}{times} is less than the shortest {what} with the longest prompt"
            f"{padding}: {least} = {sides * (prompt + 1)}",
            ("train.train_mb_tokens", CP, "data.max_prompt_length"),
        )
    elif cfg.algorithm in ("preference", "unpaired"):
        longest, cp = longest_in_microbatch(cfg, sides), cfg.parallel.context_parallel_size
        if cfg.train.logprob_mb_tokens * cp < longest:
            times = f" x {CP} {cp}" if cp > 1 else ""
            yield Problem(
                f"train.logprob_mb_tokens = {cfg.train.logprob_mb_tokens}{times} is less than the longest sequence "
                f"that train.train_mb_tokens = {budget}{times} lets through: {longest}",
                ("train.logprob_mb_tokens", "train.train_mb_tokens", CP),
            )
