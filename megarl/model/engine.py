"""The engine: one megatron-core model on this rank, and the verbs that loops use: ``logps``, ``step``, ``holding``.

Reduction lives here and nowhere else. A loss returns one value a token; the engine returns
``(sum of weights x loss, count)`` to megatron's schedule with ``calculate_per_token_loss=True``; megatron sums both
over microbatches and data parallelism and divides gradients once. So gradients do not depend on how the step was cut.

Every verb is a collective over all ranks, enters megatron's platform by itself, and brings the memory it needs onto
the device and puts it back (`megarl.model.offload`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megarl.config import Config
from megarl.config.fp8 import tokens_multiple
from megarl.data.packing import pack, packs_of, positions_of
from megarl.data.records import MicroBatch, Sample
from megarl.model.attention import packed_layout
from megarl.model.build import build_chunks, uses_transformer_engine
from megarl.model.family import ModelSpec
from megarl.model.flops import ModelFlops
from megarl.model.offload import HostWeights, Residency
from megarl.model.optimizer import build_optimizer, build_scheduler
from megarl.model.precision import FP8Rounding, as_plain
from megarl.model.router import Routing, routers
from megarl.parallel.context import ContextShare, multiple_of, share_of
from megarl.parallel.mesh import Mesh
from megarl.weights.load import load_hf
from megarl.weights.save import MAX_FILE_BYTES, save_hf
from megarl.weights.stream import Deal, WeightStream, to_all

# (log-probabilities [T], batch) -> (loss [T], metrics {name: [T]})
Loss = Callable[[Tensor, MicroBatch], tuple[Tensor, dict[str, Tensor]]]


class NonFiniteError(RuntimeError):
    """A loss or gradient is NaN or infinite. The optimizer has not stepped, on any rank."""

    # In the messages of ranks where it may have begun: gradients are summed over replicas, losses of samples are not.
    OWN = "its own samples' part not finite"
    HERE = "gradient not finite here"


def _raise(error: NonFiniteError) -> None:
    raise error


class Engine:
    """A policy in training; or, of a spec with a scalar head, a critic or reward model, whose verb is `values` in place
    of `logps`: a loss then gets values [T], of the state before each response token."""

    def __init__(
        self,
        cfg: Config,
        mesh: Mesh,
        spec: ModelSpec,
        *,
        temperature: float,
        total_updates: int | None,
        replays_experts: bool = False,
    ) -> None:
        """Build the model from ``cfg.model.path`` with its optimizer.

        Args:
            temperature: what log-probabilities divide logits by: the temperature of sampling.
            total_updates: optimizer updates of the whole run, which the learning rate decays over. None: it is never
                updated, so that it has neither gradients nor an optimizer.
            replays_experts: send tokens to the experts that samples say (`Sample.routed_experts`): of the model that
                vLLM samples from. Another's routers chose others.
        """
        self.cfg = cfg
        self.mesh = mesh
        self.replays_experts = replays_experts
        self.spec = spec = spec.without_mtp()  # they predict further tokens, which no loss here asks for
        self.flops = ModelFlops.of(spec)
        self.refused: Callable[[NonFiniteError], None] = _raise  # told, on every rank, of an update that was refused
        self.transformer_engine = uses_transformer_engine(cfg, mesh.device)
        with mesh.platform():
            parts = build_chunks(cfg, spec, mesh, temperature)
            # This rank's layers: one model, or several that take turns in an interleaved pipeline.
            self.model: torch.nn.Module = parts[0] if len(parts) == 1 else torch.nn.ModuleList(parts)
            load_hf(self.model, spec, mesh, cfg.model.path)
            if total_updates is None:
                self.model.requires_grad_(False)
            ddp = DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=cfg.optimizer.use_distributed_optimizer,
                overlap_grad_reduce=cfg.optimizer.overlap_grad_reduce,
                fp8_param_gather=cfg.fp8_cfg.enabled and cfg.fp8_cfg.fp8_param,
            )
            config = parts[0].config
            self.chunks = [
                DistributedDataParallel(config, ddp, part, pg_collection=mesh.groups, disable_bucketing=k > 0)
                for k, part in enumerate(parts)
            ]
            if cfg.optimizer.overlap_grad_reduce:
                overlapped = [chunk.no_sync for chunk in self.chunks]
                config.no_sync_func = overlapped[0] if len(overlapped) == 1 else overlapped
            if total_updates is not None:
                self.optimizer = build_optimizer(cfg, self.chunks, mesh.device)
                self.scheduler = build_scheduler(cfg, self.optimizer, total_updates)
        own = None if total_updates is None else self.optimizer
        self.residency = Residency(cfg.offload, self.chunks, own)
        self.rounding = FP8Rounding(parts, cfg.fp8_cfg, spec.num_layers) if cfg.fp8_cfg.metrics else None

    # ---- verbs -------------------------------------------------------------------------------------------------------

    def logps(self, samples: list[Sample]) -> list[Tensor]:
        """Log-probabilities of every sample's response tokens: one fp32 [response] tensor a sample, on every rank of
        the replica."""
        assert not self.spec.scalar_head, "a scalar head has values, no log-probabilities"
        return self._per_token(samples)

    def values(self, samples: list[Sample]) -> list[Tensor]:
        """The scalar head's number before each of every sample's response tokens, as `logps` gives them."""
        assert self.spec.scalar_head, "a policy has log-probabilities, no values"
        return self._per_token(samples)

    def _per_token(self, samples: list[Sample]) -> list[Tensor]:
        batches, members = self._microbatches(samples, self.cfg.train.logprob_mb_tokens)
        self.model.eval()
        with self.residency.on_device("params"), self.mesh.platform(), torch.no_grad():
            collected = self._run(batches, self._collect_step, forward_only=True, collect_non_loss_data=True)
        self.model.train()
        lengths = [sample.response_length for sample in samples]
        flat = torch.zeros(sum(lengths), device=self.mesh.device)
        each = list(flat.split(lengths))
        if self.mesh.is_last_stage:
            for batch, mine, out in zip(batches, members, collected, strict=True):
                if self._counts(batch):
                    for i, part in zip(mine, batch.response_of(out), strict=False):  # one that fills up is nobody's
                        each[i].copy_(part)
            if self.mesh.cp_size > 1:  # each part is of one rank, so that the sum is exact
                dist.all_reduce(flat, group=self.mesh.cp_group)
        if self.mesh.pp_size > 1:
            dist.broadcast(flat, self.mesh.last_stage_rank, group=self.mesh.pp_group)
        return each

    def logits(self, sample: Sample) -> Tensor:
        """[L - 1, vocabulary] fp32 on every rank, for comparing small models with other implementations of them."""
        batch = self._pack([sample], "token-mean")
        with self.residency.on_device("params"), self.mesh.platform(), torch.no_grad():
            batches = [batch, *(self._pack([_nothing()], "token-mean") for _ in range(self._missing(1)))]
            collected = self._run(batches, self._logits_step, forward_only=True, collect_non_loss_data=True)
        shape = (len(batch.tokens), self.spec.vocab_size)
        logits = collected[0].contiguous() if self.mesh.is_last_stage else torch.empty(shape, device=self.mesh.device)
        if self.mesh.pp_size > 1:
            dist.broadcast(logits, self.mesh.last_stage_rank, group=self.mesh.pp_group)
        return logits[: positions_of(sample)]

    def step(
        self, samples: list[Sample], loss: Loss, *, loss_agg_mode: str = "token-mean", together: int = 1
    ) -> dict[str, float]:
        """One optimizer update on this replica's ``samples``.

        Every ``together`` neighbours, such as the two responses of a pair, share a microbatch. Returns the loss, the
        loss's metrics as means over response tokens of the whole step (with ``seq-mean-token-mean``, over responses of
        their means), ``grad_norm``, ``lr``, ``tokens`` and ``refused_updates`` (0 or 1), the same on every rank. Where
        they are not finite no rank's optimizer steps, and ``refused`` decides what follows: it raises, unless somebody
        else takes it.
        """
        batches, _ = self._microbatches(samples, self.cfg.train.train_mb_tokens, loss_agg_mode, together)
        by_response = loss_agg_mode == "seq-mean-token-mean"
        self.model.train()
        with self.residency.on_device("params", "grads", "optimizer"), self.mesh.platform():
            self._forget_gradients()
            self.optimizer.zero_grad()
            positions, count = self._totals(batches)
            aux_scale = count / max(positions, 1)
            with self.rounding.watching() if self.rounding else contextlib.nullcontext():
                sums = self._forward_and_backward(batches, loss, by_response, aux_scale)
            metrics = self._reduce(sums, by_response)
            if self._balances:
                metrics["moe_aux_loss"] = self._balance(positions)
            here, everywhere = self._finite(metrics["loss"])
            grad_norm = 0.0
            if not everywhere:
                again = self._computed_again(batches, loss, by_response, aux_scale)
                self._forget_gradients()
                own = all(bool(torch.isfinite(part["here"])) for part in sums)
                self.refused(self._poison(metrics["loss"], own, here, samples, *again))
            elif metrics[
                "tokens"
            ]:  # else there is nothing to learn from: Adam's moments and step count stay as they are
                self.scheduler.step(1)
                _, grad_norm, _ = self.optimizer.step()
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        rounding = self.rounding.metrics() if self.rounding else {}
        refused = {"refused_updates": float(not everywhere)}
        return metrics | rounding | refused | {"grad_norm": float(grad_norm), "lr": float(lr)}

    @contextlib.contextmanager
    def holding(self, weights: HostWeights) -> Iterator[None]:
        """Let the model hold other weights for a while: the reference's, from host memory.

        Parameter by parameter the two are exchanged, so that neither the device nor the host ever holds a second copy.
        """
        with self.residency.on_device("params"):
            weights.exchange(self.model)
            try:
                yield
            finally:
                weights.exchange(self.model)

    def weights(self) -> HostWeights:
        """The weights as they are now, to be held later."""
        with self.residency.on_device("params"):
            return HostWeights(self.model)

    def stream(self, bucket_bytes: int, deal: Deal = to_all) -> WeightStream:
        """The model as HF tensors; see `WeightStream`."""
        coming = partial(self.residency.on_device, "params") if self.residency.moves("params") else None
        return WeightStream(self.model, self.spec, self.mesh, bucket_bytes, deal, as_plain, coming=coming)

    def save_hf(self, path: str | Path, bucket_bytes: int, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        """Write the model as a Hugging Face directory, in place of one that is there; see `megarl.weights.save`."""
        stream, source = partial(self.stream, bucket_bytes), self.cfg.model.path
        save_hf(stream, self.spec, self.mesh, path, source, max_file_bytes=max_file_bytes, overwrite=True)

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _microbatches(
        self, samples: list[Sample], budget: int, loss_agg_mode: str = "token-mean", together: int = 1
    ) -> tuple[list[MicroBatch], list[list[int]]]:
        """This rank's packs; and of each, which of ``samples`` are in it."""
        lengths = [positions_of(sample) for sample in samples]
        units = [range(at, at + together) for at in range(0, len(samples), together)]
        positions = [[lengths[i] for i in unit] for unit in units]
        costs = [self.flops.forward(unit) for unit in positions]
        dynamic = self.cfg.parallel.dynamic_context_parallel
        packs = [
            pack
            for pack in packs_of(positions, budget, costs, self.mesh.cp_size, dynamic)
            if pack.is_on(self.mesh.cp_rank)
        ]
        members = [[i for unit in pack.items for i in units[unit]] for pack in packs]
        batches = [
            self._pack([samples[i] for i in mine], loss_agg_mode, pack.size)
            for mine, pack in zip(members, packs, strict=True)
        ]
        nothing = [_nothing()] * together  # a replica without samples still takes part, and counts for nothing
        if not batches:
            batches = [self._pack(nothing, loss_agg_mode)]
        # In every microbatch replicas exchange tokens for experts, or the largest values for FP8's delayed scales.
        if self.mesh.ep_size > 1 or (self.cfg.fp8_cfg.enabled and self.cfg.fp8_cfg.fp8_recipe == "delayed"):
            most = torch.tensor([len(batches)])
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.mesh.host_group)
            batches += [self._pack(nothing, loss_agg_mode) for _ in range(int(most) - len(batches))]
        batches += [self._pack(nothing, loss_agg_mode) for _ in range(self._missing(len(batches)))]
        if self.mesh.ep_size > 1 and self.cfg.parallel.moe_token_dispatcher_type == "allgather":
            sizes = torch.tensor([len(batch.tokens) for batch in batches])  # it takes as many tokens of each replica
            dist.all_reduce(sizes, op=dist.ReduceOp.MAX, group=self.mesh.host_group)
            batches = [
                self._pack(batch.samples, loss_agg_mode, batch.context_size, n)
                for batch, n in zip(batches, sizes.tolist(), strict=True)
            ]
        return batches, members + [[] for _ in range(len(batches) - len(members))]

    def _missing(self, microbatches: int) -> int:
        """An interleaved pipeline takes as many microbatches at a time as it has stages."""
        return -microbatches % self.mesh.pp_size if len(self.chunks) > 1 else 0

    def _pack(
        self, samples: list[Sample], loss_agg_mode: str, size: int | None = None, length: int | None = None
    ) -> MicroBatch:
        """``size``: ranks that share it, by default as few as may. ``length``: positions, where padding is to make them
        that many."""
        size = size or min(self.mesh.cp_groups)
        multiple = self.mesh.tp_size if self.cfg.parallel.sequence_parallel else 1
        each, whole = multiple_of(size, multiple, tokens_multiple(self.cfg))
        longest = self.cfg.rollout.max_response_length
        return pack(
            samples,
            self.mesh.device,
            each=each,
            multiple=length or whole,
            loss_agg_mode=loss_agg_mode,
            max_response_length=longest,
            context_size=size,
        )

    def _counts(self, batch: MicroBatch) -> bool:
        """Whether this rank is the one, of those that share a pack, that counts it."""
        return self.mesh.cp_groups[batch.context_size].rank() == 0

    def _share(self, batch: MicroBatch) -> ContextShare | None:
        """This rank's part of a pack, where context parallelism divides it. A loss sees the whole pack."""
        group = self.mesh.cp_groups[batch.context_size]
        return share_of(batch.cu_seqlens, group, self.mesh.device) if group.size() > 1 else None

    def _forget_gradients(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()

    def _run(self, batches: list[MicroBatch], forward_step: Callable[..., Any], **kwargs: Any) -> list[Any]:
        """Megatron's schedule over the microbatches. What the last stage's loss function returned, one a microbatch."""
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iters if len(iters := [iter(batches) for _ in self.chunks]) > 1 else iters[0],
            model=self.chunks,
            num_microbatches=len(batches),
            seq_length=1,  # unused with variable_seq_lengths
            micro_batch_size=1,
            **kwargs,
        )

    def _forward(
        self, batch: MicroBatch, model: torch.nn.Module, *, labels: bool = True, aux_scale: float = 0.0
    ) -> Tensor:
        share = self._share(batch)
        layout = packed_layout(
            batch.cu_seqlens,
            self.mesh.device,
            transformer_engine=self.transformer_engine,
            share=share,
            routing=self._routing(batch, share, aux_scale) if self.spec.moe else None,
            cp_group=self.mesh.cp_groups[batch.context_size] if len(self.mesh.cp_groups) > 1 else None,
        )
        here = slice(None) if share is None else share.mine
        return model(
            batch.tokens[here][None],
            layout.positions[None],
            None,
            labels=batch.targets[here][None] if labels else None,  # without labels the model gives logits
            loss_mask=batch.loss_mask[here][None],
            packed_seq_params=layout,
        )

    def _routing(self, batch: MicroBatch, share: ContextShare | None, aux_scale: float) -> Routing:
        """Of the tokens that this rank's routers see."""
        assert batch.padding is not None, "`pack` says which positions are padding"

        def here(x: Tensor) -> Tensor:
            x = x if share is None else x[share.mine]
            return x.chunk(self.mesh.tp_size)[self.mesh.tp_rank] if self.cfg.parallel.sequence_parallel else x

        replayed = batch.routed_experts if self.replays_experts else None
        tokens = batch.num_positions
        if self.replays_experts and replayed is None and tokens:
            text = "came without the experts that its tokens were sent to, which rollout.router_replay trains with"
            raise ValueError(f"{batch.samples[0].name} {text}")
        experts = None if replayed is None else here(replayed)
        return Routing(here(batch.padding), tokens, tokens * aux_scale, experts)

    @property
    def _balances(self) -> bool:
        return self.spec.moe is not None and self.cfg.model.moe_aux_loss_coeff > 0

    def _totals(self, batches: list[MicroBatch]) -> tuple[int, int]:
        """Positions of the whole step, without padding, and its count."""
        if not self._balances:
            return 0, 0
        mine = [batch for batch in batches if self._counts(batch)]
        totals = torch.tensor([sum(b.num_positions for b in mine), sum(b.count for b in mine)], device=self.mesh.device)
        dist.all_reduce(totals, group=self.mesh.groups.dp_cp)
        positions, count = totals.tolist()
        return positions, count

    def _balance(self, positions: int) -> float:
        """The step's auxiliary loss, without its coefficient: the mean over layers with experts. 1 where every expert
        is chosen as often as any other."""
        assert self.spec.moe is not None, "asked of models with experts"
        total = torch.zeros((), device=self.mesh.device)
        for router in routers(self.model):
            if router.reported is not None:
                total += router.reported
        dist.all_reduce(total)  # ranks of a pack have parts of it, stages their layers, replicas their packs
        return total.item() / max(positions * sum(self.spec.moe.layers), 1)

    def _joined(self, out: Tensor, batch: MicroBatch) -> Tensor:
        """[n, T / CP] -> [n, T], the same on every rank of the context-parallel group."""
        share = self._share(batch)
        return out if share is None else share.join(out.t()).t()

    def _collect_step(self, batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(batches)
        return self._forward(batch, model), lambda out, non_loss_data: self._joined(out, batch)[0]

    def _logits_step(self, batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(batches)

        def collect(out: Tensor, non_loss_data: bool) -> Tensor:
            shards = [torch.empty_like(out[0]) for _ in range(self.mesh.tp_size)]
            dist.all_gather(shards, out[0].contiguous(), group=self.mesh.tp_group)
            logits = torch.cat(shards, dim=-1)[:, : self.spec.vocab_size].float()
            return self._joined(logits.t(), batch).t()

        return self._forward(batch, model, labels=False), collect

    def _forward_and_backward(
        self, batches: list[MicroBatch], loss: Loss, by_response: bool, aux_scale: float
    ) -> list[dict[str, Tensor]]:
        for router in routers(self.model):
            router.begin_step()
        return self._run(batches, partial(self._loss_step, loss, by_response, aux_scale), forward_only=False)

    def _loss_step(
        self,
        loss: Loss,
        by_response: bool,
        aux_scale: float,
        batches: Iterator[MicroBatch],
        model: torch.nn.Module,
    ) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(batches)

        def reduce(out: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            logps, batch.entropy = self._joined(out, batch)
            per_token, metrics = loss(logps, batch)
            total = torch.where(batch.loss_mask, per_token * batch.weights, 0).sum()
            count = torch.tensor(batch.count, dtype=torch.int, device=out.device)
            each = batch.weights if by_response else 1
            sums = {name: torch.where(batch.loss_mask, x.detach() * each, 0).sum() for name, x in metrics.items()}
            sums |= {"loss": total.detach(), "count": count, "tokens": batch.loss_mask.sum()}
            if not self._counts(batch):  # counts and metrics are summed over the ranks that share it, too
                count, sums = torch.zeros_like(count), {name: torch.zeros_like(x) for name, x in sums.items()}
            return total, count, sums | {"here": total.detach()}

        return self._forward(batch, model, aux_scale=aux_scale), reduce

    def _reduce(self, sums: list[dict[str, Tensor]], by_response: bool) -> dict[str, float]:
        """Sum the step's metrics over microbatches and replicas, divide, and tell every stage."""
        reduced: list[dict[str, float]] = [{}]
        if self.mesh.is_last_stage:
            names = [name for name in sums[0] if name != "here"]
            totals = torch.stack([sum(part[name] for part in sums).double() for name in names])
            dist.all_reduce(totals, group=self.mesh.groups.dp_cp)
            total = dict(zip(names, totals.tolist(), strict=True))
            count, tokens, loss = total.pop("count"), total.pop("tokens"), total.pop("loss")
            means = {name: value / max(count if by_response else tokens, 1) for name, value in total.items()}
            reduced = [means | {"loss": loss / max(count, 1), "tokens": tokens}]
        if self.mesh.pp_size > 1:
            dist.broadcast_object_list(reduced, self.mesh.last_stage_rank, group=self.mesh.pp_group)
        return reduced[0]

    def _finite(self, loss: float) -> tuple[bool, bool]:
        """Whether the step's loss and gradient are finite numbers on this rank, and on all ranks."""
        buffers = [b for chunk in self.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        gradients = sum(buffer.grad_data.sum().float() for buffer in buffers)
        finite = bool(torch.isfinite(gradients)) and math.isfinite(loss)
        flag = torch.tensor([not finite], dtype=torch.int, device=self.mesh.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return finite, not flag.item()

    def _computed_again(
        self, batches: list[MicroBatch], loss: Loss, by_response: bool, aux_scale: float
    ) -> tuple[bool, list[str]]:
        """The step a second time: whether it is finite now, on all ranks; and the samples whose own loss is not."""
        names: list[str] = []

        def watched(logps: Tensor, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
            per_token, metrics = loss(logps, batch)
            bad = ~torch.isfinite(per_token) & batch.loss_mask
            spans = zip(batch.samples, batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)
            names.extend(sample.name for sample, start, end in spans if bad[start:end].any())
            return per_token, metrics

        self._forget_gradients()
        sums = self._forward_and_backward(batches, watched, by_response, aux_scale)
        _, everywhere = self._finite(self._reduce(sums, by_response)["loss"])
        return everywhere, names

    def _poison(
        self, loss: float, own: bool, finite: bool, samples: list[Sample], transient: bool, names: list[str]
    ) -> NonFiniteError:
        """This rank's reason to refuse the update. ``own``, ``finite``: whether its own samples' part of the loss is a
        finite number, and its gradient."""
        where = "gradient finite here" if finite else NonFiniteError.HERE
        where = where if own else NonFiniteError.OWN
        listed = "; ".join(names[:4] or [sample.name for sample in samples[:4]]) or "no samples"
        if len(names or samples) > 4:
            listed += f" and {len(names or samples) - 4} more"
        whose = "not finite is the loss of" if names else f"this replica trained on {len(samples)} samples:"
        what = "persistent: computed again, it is the same. Look at rewards and rollout_logps, or lower optimizer.lr"
        if transient:
            what = "transient: computed again, it is finite. Should a rank's name come back here, suspect its device"
        return NonFiniteError(
            f"rank {self.mesh.rank}: loss {loss}, {where}; the update was refused on all ranks; {whose} {listed}. "
            f"{what}"
        )


def _nothing() -> Sample:
    """A sequence without a response. It has every field a loss may ask for, so that all replicas report the same
    metrics."""
    empty = torch.empty(0)
    logps = {"rollout_logps": empty, "old_logps": empty, "ref_logps": empty}
    return Sample("(none)", 0, [0, 0], prompt_length=2, **logps, values=empty, returns=empty, score=0.0, desirable=True)
