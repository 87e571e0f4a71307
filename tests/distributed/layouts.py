"""The parity matrix: layouts that compute what one rank computes, by kind of model, and how they are compared with it.

The one rank takes each sequence by itself (`megarl.verify.truth`). tools/parity_matrix.py prints the table.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from megarl.config import ParallelConfig, load, save
from megarl.verify.measure import Difference
from megarl.verify.shrink import SmallLayout, as_truth, one_rank, small_recipe, write_models
from tests.distributed import verify_cases
from tests.distributed.ranks import RankPool
from tests.public_models import DEEPSEEK_V3, QWEN2_05B, QWEN3_30B_A3B

TOLERANCE = 1e-5
# The models' features, in four small layers: biases, tied embeddings, grouped queries; experts in three layers of four;
# latent attention with YaRN, a shared expert and groups of experts.
MODELS = {
    "dense": QWEN2_05B,
    "MoE": QWEN3_30B_A3B | {"mlp_only_layers": [1]},
    "MLA": DEEPSEEK_V3,
    "dense, values": QWEN2_05B,
    "MoE, values": QWEN3_30B_A3B,
}
# GRPO's loss with every term, so that token, sequence and entropy parts all have a gradient; or PPO, for its critic.
RECIPE = """
algorithm: {algorithm}
model: {{path: models/none}}
data: {{path: data/none.jsonl}}
loss: {{kl_loss_coef: 0.01, truncated_importance_sampling_type: seq-tis, entropy_coef: 0.01, loss_agg_mode: {mode}}}
"""


@dataclass(frozen=True)
class Layout:
    """``tokens``: positions of a microbatch, over all ranks of a context-parallel group; 12 samples have about 350."""

    sizes: SmallLayout
    tokens: int

    @property
    def world_size(self) -> int:
        return self.sizes.world_size


def _layout(
    tp: int = 1,
    pp: int = 1,
    vpp: int | None = None,
    cp: int = 1,
    ep: int = 1,
    etp: int | None = None,
    dp: int = 1,
    sp: bool = True,
    stages: tuple[int | None, int | None] = (None, None),
    tokens: int = 144,
) -> Layout:
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        context_parallel_size=cp,
        sequence_parallel=sp and tp > 1,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        num_layers_in_first_pipeline_stage=stages[0],
        num_layers_in_last_pipeline_stage=stages[1],
    )
    return Layout(SmallLayout(parallel, dp), tokens)


LAYOUTS: dict[str, dict[str, Layout]] = {
    "dense": {
        "one microbatch": _layout(tokens=1000),
        "microbatches": _layout(),
        "short microbatches": _layout(tokens=60),
        "TP2": _layout(tp=2, sp=False),
        "TP2 SP": _layout(tp=2),
        "TP4 SP": _layout(tp=4),
        "PP2": _layout(pp=2),
        "PP2, short microbatches": _layout(pp=2, tokens=60),
        "PP4": _layout(pp=4),
        "PP2 uneven": _layout(pp=2, stages=(1, 3)),
        "PP2 VPP2": _layout(pp=2, vpp=2),
        "CP2": _layout(cp=2),
        "CP4": _layout(cp=4),
        "DP2": _layout(dp=2),
        "DP4": _layout(dp=4),
        "TP2 SP PP2": _layout(tp=2, pp=2),
        "TP2 SP CP2": _layout(tp=2, cp=2),
        "TP2 SP DP2": _layout(tp=2, dp=2),
        "PP2 CP2": _layout(pp=2, cp=2),
        "CP2 DP2": _layout(cp=2, dp=2),
        "PP2 DP2": _layout(pp=2, dp=2),
        "PP2 VPP2 DP2": _layout(pp=2, vpp=2, dp=2),
        "PP2 VPP2 CP2": _layout(pp=2, vpp=2, cp=2),
        "TP2 SP PP2 VPP2": _layout(tp=2, pp=2, vpp=2),
        "TP2 SP PP2 CP2": _layout(tp=2, pp=2, cp=2),
        "TP2 SP CP2 DP2": _layout(tp=2, cp=2, dp=2),
        "TP2 SP PP2 VPP2 CP2": _layout(tp=2, pp=2, vpp=2, cp=2),
    },
    "MoE": {
        "one microbatch": _layout(tokens=1000),
        "short microbatches": _layout(tokens=60),
        "TP2 SP": _layout(tp=2),
        "TP2 SP ETP1": _layout(tp=2, etp=1),
        "ETP2 DP2": _layout(etp=2, dp=2),
        "EP2 DP2": _layout(ep=2, dp=2),
        "EP4 DP4": _layout(ep=4, dp=4),
        "TP2 SP EP2 ETP1": _layout(tp=2, ep=2, etp=1),
        "TP2 SP EP2 ETP2 DP2": _layout(tp=2, ep=2, etp=2, dp=2),
        "TP2 SP EP2 ETP1 DP2": _layout(tp=2, ep=2, etp=1, dp=2),
        "CP2": _layout(cp=2),
        "CP2 EP2": _layout(cp=2, ep=2),
        "CP2 EP2 DP2": _layout(cp=2, ep=2, dp=2),
        "PP2 EP2 DP2": _layout(pp=2, ep=2, dp=2),
        "PP2 CP2 EP2": _layout(pp=2, cp=2, ep=2),
        "PP2 VPP2 EP2 DP2": _layout(pp=2, vpp=2, ep=2, dp=2),
        "TP2 SP PP2 EP2 ETP1": _layout(tp=2, pp=2, ep=2, etp=1),
        "TP2 SP CP2 EP2 ETP1 PP2": _layout(tp=2, cp=2, ep=2, etp=1, pp=2),
    },
    "MLA": {
        "short microbatches": _layout(tokens=60),
        "TP2 SP": _layout(tp=2),
        "CP2": _layout(cp=2),
        "PP2": _layout(pp=2),
        "PP2 VPP2": _layout(pp=2, vpp=2),
        "PP2 CP2": _layout(pp=2, cp=2),
        "EP2 DP2": _layout(ep=2, dp=2),
        "CP2 EP2": _layout(cp=2, ep=2),
        "TP2 SP CP2": _layout(tp=2, cp=2),
        "TP2 SP EP2 ETP1": _layout(tp=2, ep=2, etp=1),
        "TP2 SP PP2 CP2 EP2 ETP1": _layout(tp=2, pp=2, cp=2, ep=2, etp=1),
    },
    "dense, values": {
        "CP2": _layout(cp=2),
        "PP2 VPP2": _layout(pp=2, vpp=2),
        "TP2 SP CP2": _layout(tp=2, cp=2),
    },
    "MoE, values": {
        "EP2 DP2": _layout(ep=2, dp=2),
        "CP2 EP2": _layout(cp=2, ep=2),
        "PP2 VPP2 EP2 DP2": _layout(pp=2, vpp=2, ep=2, dp=2),
    },
}


def prepare(ranks: RankPool, model: str, folder: Path) -> None:
    """Write the small model, every layout's recipe, and what one rank computes, into ``folder``."""
    values = model.endswith("values")
    mode = "token-mean" if values else "seq-mean-token-mean"
    (folder / "recipe.yaml").write_text(RECIPE.format(algorithm="ppo" if values else "grpo", mode=mode))
    (folder / "data.jsonl").touch()
    cfg = load([str(folder / "recipe.yaml")], check_model=False)
    write_models(MODELS[model], _layout(tp=2).sizes, folder, seed=0)
    for name, layout in LAYOUTS[model].items():
        small = small_recipe(cfg, layout.sizes, folder, "cpu")
        tokens = layout.tokens // layout.sizes.parallel.context_parallel_size
        train = dataclasses.replace(small.train, train_mb_tokens=tokens, logprob_mb_tokens=tokens)
        save(dataclasses.replace(small, train=train), folder / f"{name}.yaml")
    save(as_truth(small_recipe(cfg, one_rank(_layout().sizes), folder, "cpu")), folder / "one.yaml")
    ranks.run(verify_cases.truth, 1, recipe=str(folder / "one.yaml"), folder=str(folder))


def differences(ranks: RankPool, model: str, name: str, folder: Path) -> list[Difference]:
    """How far the layout is from what `prepare` wrote."""
    arguments = {"recipe": str(folder / f"{name}.yaml"), "folder": str(folder)}
    rows: list[Difference] = ranks.run(verify_cases.differences, LAYOUTS[model][name].world_size, **arguments)[0]
    return rows
