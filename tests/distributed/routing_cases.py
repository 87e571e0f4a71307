"""Cases that `RankPool` runs: routers that are balanced, frozen, or told where to send tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from megarl.config import load
from megarl.data.prompts import PromptStream, load_prompts
from megarl.data.records import Sample
from megarl.losses.sft import sft
from megarl.model.attention import packed_layout
from megarl.model.build import build_model
from megarl.model.engine import Engine
from megarl.model.family import read_spec
from megarl.model.router import routers
from megarl.observe.timers import Phases
from megarl.parallel.mesh import build_mesh
from megarl.rollout.sampler import Sampler
from megarl.verify.measure import gradient_of
from megarl.weights.load import load_hf
from megarl.weights.stream import WeightStream

Fields = list[dict[str, Any]]


def step(recipe: str, model: str, overrides: list[str], samples: Fields, replay: bool = False) -> dict[str, Any]:
    """Log-probabilities of all samples, and one SFT update of this replica's share of them; and which share a pack."""
    cfg = load([recipe, f"model.path={model}", *overrides])
    mesh = build_mesh(cfg)
    engine = Engine(cfg, mesh, read_spec(model), temperature=1.0, total_updates=10, replays_experts=replay)
    before = [router.weight.detach().clone() for router in routers(engine.model)]
    everything = [Sample(**fields) for fields in samples]
    logps = [x.numpy() for x in engine.logps(everything)]
    metrics = engine.step(everything[mesh.dp_rank :: mesh.dp_size], sft)
    gradients = WeightStream(engine.model, engine.spec, mesh, 1 << 20, value=gradient_of)
    moved = [not torch.equal(a, b.weight) for a, b in zip(before, routers(engine.model), strict=True)]
    grads = {name: tensor.numpy().copy() for name, tensor in gradients}
    batches, _ = engine._microbatches(everything[mesh.dp_rank :: mesh.dp_size], cfg.train.train_mb_tokens)
    packs = [[sample.prompt_id for sample in batch.samples] for batch in batches]
    return {"logps": logps, "metrics": metrics, "grads": grads, "moved": moved, "packs": packs}


def balanced_by_hand(
    recipe: str, model: str, overrides: list[str], packs: list[Fields], coeff: float
) -> tuple[float, dict[str, np.ndarray]]:
    """(auxiliary loss, gradients) of -mean log-probability of the step's response tokens, plus ``coeff`` times the mean
    over packs, weighed by their tokens, and over layers, summed, of E sum_i f_i P_i: from the routers' inputs and torch
    alone, each sequence by itself.
    """
    cfg = load([recipe, f"model.path={model}", *overrides])
    mesh = build_mesh(cfg)
    spec = read_spec(model)
    with mesh.platform():
        policy = build_model(cfg, spec, mesh, temperature=1.0)
        load_hf(policy, spec, mesh, model)
        seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        for router in routers(policy):
            router.register_forward_pre_hook(lambda module, args: seen.append((module.place, args[0], module.weight)))
        logps, totals, tokens = [], [], 0
        for pack in packs:
            seen.clear()
            for sample in (Sample(**fields) for fields in pack):
                read, positions = torch.tensor(sample.tokens[:-1]), torch.arange(len(sample.tokens) - 1)
                layout = packed_layout([0, len(read)], mesh.device, transformer_engine=False)
                logits = policy(read[None], positions[None], None, packed_seq_params=layout)[0, :, : spec.vocab_size]
                targets = torch.tensor(sample.tokens[1:])
                found = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
                logps.append(found[sample.prompt_length - 1 :])
            for layer in {place for place, _, _ in seen}:
                hidden = torch.cat([h.reshape(-1, h.shape[-1]) for place, h, _ in seen if place == layer])
                [weight] = {id(w): w for place, _, w in seen if place == layer}.values()
                probs = (hidden @ weight.t()).softmax(-1)  # [t, E]
                chosen = probs.topk(spec.moe.topk).indices
                f = torch.bincount(chosen.flatten(), minlength=spec.moe.num_experts) / chosen.numel()
                totals.append(len(hidden) * spec.moe.num_experts * (f * probs.mean(0)).sum())
            tokens += sum(len(fields["tokens"]) - 1 for fields in pack)
        aux = torch.stack(totals).sum() / tokens
        (-torch.cat(logps).mean() + coeff * aux).backward()
        stream = WeightStream(
            policy, spec, mesh, 1 << 20, value=lambda p: torch.zeros_like(p) if p.grad is None else p.grad
        )
        gradients = {name: tensor.numpy().copy() for name, tensor in stream}
    return aux.item() / sum(spec.moe.layers), gradients


def sampled(recipe: str, overrides: list[str]) -> list[dict[str, Any]]:
    """One rollout with the experts that vLLM chose, dealt to replicas, and its log-probabilities: of vLLM, of the
    policy that sends tokens to these, and of one that chooses by itself."""
    cfg = load([recipe, *overrides])
    mesh = build_mesh(cfg)
    tokenizer = AutoTokenizer.from_pretrained(cfg.model.path)
    sampler = Sampler(cfg, mesh, tokenizer, Phases())
    stream = PromptStream(load_prompts(cfg.data, tokenizer), cfg.run.seed, cfg.data.shuffle)
    sampler.engine.wake()
    samples = [sample for batch in sampler.rollout(stream.next, 1).deal(16) for sample in batch]
    sampler.close()
    found = []
    for replay in (True, False):
        engine = Engine(cfg, mesh, read_spec(cfg.model.path), temperature=1.0, total_updates=10, replays_experts=replay)
        found.append([x.numpy() for x in engine.logps(samples)])
    return [
        {"tokens": s.tokens, "experts": s.routed_experts, "vllm": s.rollout_logps.numpy(), "replayed": a, "free": b}
        for s, a, b in zip(samples, *found, strict=True)
    ]
