"""What the loops that sample their own data share: the parts they are made of, log-probabilities for their samples, and
the end of a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from megarl.advantages import AdaptiveKL
from megarl.algorithms.sft import due
from megarl.checkpoint.checkpoints import Checkpoints, Stateful
from megarl.config import AdvantageConfig, Config, OptimizerConfig
from megarl.data.prompts import Prompt, PromptStream, load_prompts
from megarl.data.records import Sample
from megarl.data.tokenizer import load_tokenizer
from megarl.losses.mismatch import MISMATCH_METRICS, check_mismatch, of_fresh
from megarl.model.engine import Engine, HostWeights
from megarl.model.family import read_spec
from megarl.observe.run import Run
from megarl.parallel.mesh import Mesh
from megarl.rollout.remote import to_senders
from megarl.rollout.remote_sampler import RemoteSampler
from megarl.rollout.sampler import Sampler
from megarl.rollout.table import Rollout
from megarl.weights.stream import WeightStream
from megarl.weights.sync import to_engines


@dataclass
class Parts:
    """What a run is made of."""

    cfg: Config
    run: Run
    mesh: Mesh
    stream: PromptStream[Prompt]
    held_out: Sequence[Prompt]
    sampler: Sampler | RemoteSampler
    policy: Engine
    weights: WeightStream  # the policy's, on their way to vLLM
    reference: HostWeights | None  # the policy as it was at the start
    kl: AdaptiveKL  # the KL penalty in rewards
    steps: int
    checkpoints: Checkpoints = field(init=False)  # from `each_step` on

    def each_step(self, **more: Engine | Stateful) -> Iterator[int]:
        """The steps that are left, once what the run resumes from is loaded and vLLM has the policy's weights, which a
        new run validates if that is asked for. ``more`` are parts of the loop's own that a checkpoint keeps."""
        shared: dict[str, Engine | Stateful] = {"policy": self.policy, "stream": self.stream, "kl": self.kl}
        if isinstance(self.sampler, Sampler) and self.sampler.surplus:
            shared["surplus"] = self.sampler.surplus
        self.checkpoints = Checkpoints(self.cfg, self.run, self.mesh, **shared, **more)
        with self.run.phase("load"):
            start = self.checkpoints.resume()
            self.sync()
        if start == 0 and self.held_out and self.cfg.validation.val_at_start:
            self.run.report(0, self.steps, self.validate(step=0))
        yield from self.checkpoints.steps(self.steps, on_rollback=self.sync, make_room=self.sampler.make_room)

    def sync(self) -> None:
        self.sampler.update(self.weights, version=self.checkpoints.step)

    def old_logps(self, samples: Sequence[Sample], *, updates: int) -> None:
        """Keep the policy's log-probabilities where its updates will move it away from them, or rewards need them."""
        if self.cfg.loss.use_rollout_logps or (updates == 1 and not self.kl.kl_coef):
            return  # with a single update the policy is its own old policy
        with self.run.phase("old_logps"):
            attach("old_logps", self.policy, samples)

    def ref_logps(self, samples: Sequence[Sample]) -> None:
        """Keep the reference's log-probabilities, where there is one."""
        if self.reference:
            with self.run.phase("ref_logps"), self.policy.holding(self.reference):
                attach("ref_logps", self.policy, samples)

    def finish(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """The end of a step: save and validate where that is due, and give vLLM the new weights. Returns the step's
        metrics."""
        last = step == self.steps
        self.checkpoints.save_if_due(step)  # while vLLM sleeps, with room for whole tensors
        with self.run.phase("sync"):
            self.sync()
        wanted = due(step, self.cfg.validation.val_period) or (last and self.cfg.validation.val_at_end)
        return metrics | (self.validate(step) if self.held_out and wanted else {})

    def report(self, step: int, metrics: dict[str, float], rollout: Rollout) -> None:
        """Say what happened. Raises MismatchError where vLLM did not sample from the policy."""
        self.run.report(step, self.steps, metrics, rollout.lengths, epochs=self.cfg.train.ppo_epochs)
        self.run.events(step, rollout.errors)
        if self.cfg.reward.save_scores:
            self.run.scores(step, [(row.prompt_id, row.result.total) for row in rollout.rows])
        check_mismatch(metrics, self.cfg.weight_sync)

    def validate(self, step: int) -> dict[str, float]:
        """Metrics of the held-out prompts under the weights that were pushed last."""
        with self.run.phase("validate"):
            metrics, errors = self.sampler.validate(self.held_out)
        self.run.events(step, errors)
        return metrics


def prepare(cfg: Config, run: Run, mesh: Mesh, *, reference: bool) -> Parts:
    """Load data and models, and start vLLM.

    Args:
        reference: whether to keep the policy as it is now.
    """
    with run.phase("load"):
        tokenizer = load_tokenizer(cfg.model)
        prompts = load_prompts(cfg.data, tokenizer)
        run.dropped(prompts.dropped, kept=len(prompts))
        held_out = load_prompts(cfg.data, tokenizer, validation=True) if cfg.data.val_path else []
        stream = PromptStream(prompts, cfg.run.seed, cfg.data.shuffle)
        steps, updates = number_of_steps(cfg, len(prompts))
        sampler = sampler_of(cfg, mesh, tokenizer, run, stream, steps)
        policy = Engine(
            cfg,
            mesh,
            read_spec(cfg.model.path),
            temperature=cfg.rollout.temperature,
            total_updates=updates,
            replays_experts=cfg.rollout.router_replay,
        )
        colocated = cfg.rollout.mode == "colocated"
        deal = to_engines(policy.spec, mesh, cfg.rollout.tensor_parallel_size) if colocated else to_senders(mesh)
        return Parts(
            cfg=cfg,
            run=run,
            mesh=mesh,
            stream=stream,
            held_out=held_out[: cfg.validation.max_val_samples],
            sampler=sampler,
            policy=policy,
            weights=policy.stream(cfg.weight_sync.bucket_size_mb << 20, deal),
            reference=policy.weights() if reference else None,
            kl=penalty(cfg.advantage),
            steps=steps,
        )


def sampler_of(
    cfg: Config, mesh: Mesh, tokenizer: PreTrainedTokenizerBase, run: Run, prompts: PromptStream[Prompt], steps: int
) -> Sampler | RemoteSampler:
    """Engines in these processes, or servers elsewhere."""
    if cfg.rollout.mode == "remote":
        return RemoteSampler(cfg, mesh, tokenizer, run.phases, prompts, steps=steps)
    return Sampler(cfg, mesh, tokenizer, run.phases, prompts.items)


def number_of_steps(cfg: Config, num_prompts: int) -> tuple[int, int]:
    """(rollout steps, optimizer updates) of the run."""
    per_step = cfg.rollout.num_prompts_per_step
    steps = max(1, cfg.run.max_num_epochs * num_prompts // per_step)
    steps = min(steps, cfg.run.max_num_steps or steps)
    units = per_step if cfg.algorithm == "online_dpo" else per_step * cfg.rollout.num_generations_per_prompt
    return steps, steps * cfg.train.ppo_epochs * -(-units // cfg.train.train_global_batch_size)


def another_model(
    cfg: Config, mesh: Mesh, path: str | None, optimizer: OptimizerConfig | None = None, updates: int | None = None
) -> Engine:
    """A second policy-like model in the policy's layout, of any size, with an optimizer of its own; without one it is
    only asked for log-probabilities."""
    model = dataclasses.replace(cfg.model, path=path or cfg.model.path)
    own = dataclasses.replace(cfg, model=model, optimizer=optimizer or cfg.optimizer)
    spec = read_spec(model.path)
    return Engine(own, mesh, spec, temperature=cfg.rollout.temperature, total_updates=updates)


def penalty(cfg: AdvantageConfig) -> AdaptiveKL:
    """The controller of the KL penalty in rewards; without a target its coefficient stays."""
    return AdaptiveKL(cfg.kl_coef, cfg.kl_target, cfg.kl_horizon)


def attach(name: str, engine: Engine, samples: Sequence[Sample]) -> None:
    """Compute with the engine's present weights, and keep as the samples' ``name``: a policy's log-probabilities, a
    critic's values."""
    compute = engine.values if engine.spec.scalar_head else engine.logps
    for sample, found in zip(samples, compute(list(samples)), strict=True):
        setattr(sample, name, found)


def mean_metrics(history: list[dict[str, float]], whose: str = "actor") -> dict[str, float]:
    """Means over the step's updates. The mismatch is the rollout's, so it keeps its own names."""
    names = history[0] if history else ()  # where every pair was a tie there was no update
    means = {name: sum(update[name] for update in history) / len(history) for name in names}
    return {name if name in MISMATCH_METRICS else f"{whose}/{name}": value for name, value in of_fresh(means).items()}
