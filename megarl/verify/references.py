"""The small model on one rank, against transformers and against vLLM, on the same prompt."""

from __future__ import annotations

import torch

from megarl.config import Config
from megarl.data.records import Sample
from megarl.model.compare import transformers_logits
from megarl.model.engine import Engine
from megarl.model.family import read_spec
from megarl.parallel.mesh import Mesh
from megarl.verify.measure import Difference
from megarl.verify.shrink import VOCABULARY

TOLERANCE = 1e-4  # different programs add up in different orders


def prompt(cfg: Config, length: int = 20) -> list[int]:
    generator = torch.Generator().manual_seed(cfg.run.seed + 1)
    return torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()


def against_transformers(cfg: Config, mesh: Mesh) -> Difference:
    """The largest difference of logits, relative to their spread."""
    tokens = prompt(cfg, 48)
    engine = Engine(cfg, mesh, read_spec(cfg.model.path), temperature=1.0, total_updates=1)
    expected = transformers_logits(cfg.model.path, torch.tensor(tokens[:-1]))
    found = engine.logits(Sample("prompt", 0, tokens, 1)).cpu()
    difference = float((found - expected).abs().max()) / max(float(expected.std()), 1.0)
    return Difference("logits: megatron and transformers", difference, TOLERANCE)


def against_vllm(cfg: Config, mesh: Mesh) -> Difference:
    """The largest difference of log-probabilities of what vLLM samples greedily. Where it is not installed, or says
    that it cannot compute the model here, that is no difference: the row says why. Anything else is raised."""
    from megarl.rollout.vllm_engine import RolloutError, Sampling, VLLMEngine

    what, tokens = "log-probs: megatron and vLLM", prompt(cfg)
    try:
        vllm = VLLMEngine(
            cfg.model.path,
            cfg.rollout,
            dtype="fp32",
            device_type=mesh.device.type,
            max_model_len=64,
            seed=cfg.run.seed,
            deadline_s=cfg.run.deadline_s,
        )
    except (RolloutError, ImportError) as reason:
        return Difference(what, None, TOLERANCE, str(reason))
    [[completion]] = vllm.generate([tokens], Sampling(1, 16, 0.0), cfg.run.seed)
    vllm.close()
    engine = Engine(cfg, mesh, read_spec(cfg.model.path), temperature=1.0, total_updates=1)
    [found] = engine.logps([Sample("prompt", 0, tokens + completion.tokens, len(tokens))])
    difference = float((found.cpu() - torch.tensor(completion.logps)).abs().max())
    return Difference(what, difference, TOLERANCE)
