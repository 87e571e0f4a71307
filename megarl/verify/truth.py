"""What a layout is held against: one rank, one sequence at a time, and the formulas as they are written.

Nothing of the engine is in it: no packing, no padding, no microbatches, no schedule, no reduction, no recomputation, no
chunked head. It shares the layers with it, whose logits `references` compares with transformers', and the loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megarl.config import Config
from megarl.data.records import MicroBatch, Sample
from megarl.model.attention import packed_layout
from megarl.model.build import build_model
from megarl.model.family import ModelSpec, read_spec
from megarl.parallel.mesh import Mesh
from megarl.verify.cases import Case, anchored
from megarl.verify.measure import Measured, model_path
from megarl.weights.load import load_hf
from megarl.weights.stream import WeightStream


def compute(cfg: Config, mesh: Mesh, case: Case) -> Measured:
    """Of a mesh of one rank."""
    path = model_path(cfg, case)
    spec = read_spec(path).without_mtp()
    spec = spec.with_scalar_head() if case.scalar_head else spec
    with mesh.platform():
        model = build_model(cfg, spec, mesh, temperature=1.0)
        load_hf(model, spec, mesh, path)
        with torch.no_grad():
            outputs = [_of_response(s, _forward(model, spec, s, case.temperature, mesh)[0]) for s in case.samples]
        samples = anchored(case, outputs, cfg.run.seed)
        losses, masks = [], []
        for at in range(0, len(samples), case.together):
            unit = samples[at : at + case.together]
            found = [_forward(model, spec, sample, case.temperature, mesh) for sample in unit]
            batch = _laid_end_to_end(unit, [entropy for _, entropy in found], mesh.device)
            per_token, _ = case.loss(torch.cat([x for x, _ in found]), batch)
            sizes = [len(x) for x, _ in found]
            losses += per_token.split(sizes)
            masks += batch.loss_mask.split(sizes)
        mode, longest = case.loss_agg_mode, cfg.rollout.max_response_length
        loss = aggregate(losses, masks, mode, longest)
        terms = aggregate([each.detach().abs() for each in losses], masks, mode, longest)
        loss.backward()
        stream = WeightStream(model, spec, mesh, 64 << 20, value=_gradient)
        gradients = {name: tensor.cpu().clone() for name, tensor in stream}
    norm = torch.stack([gradient.double().square().sum() for gradient in gradients.values()]).sum().sqrt()
    return Measured(loss.item(), norm.item(), outputs, gradients, terms.item())


def aggregate(losses: list[Tensor], masks: list[Tensor], mode: str, longest: int) -> Tensor:
    """The loss of a step from those of its sequences' tokens, after the papers' formulas. Sequences without response
    tokens do not count.

    Args:
        losses, masks: [L - 1] a sequence.
        longest: response tokens, of ``seq-mean-token-sum-norm``.
    """
    kept = [loss[mask] for loss, mask in zip(losses, masks, strict=True) if mask.any()]
    if mode == "token-mean":
        return torch.cat(kept).mean()
    of_sequences = {
        "seq-mean-token-mean": [loss.mean() for loss in kept],
        "seq-mean-token-sum": [loss.sum() for loss in kept],
        "seq-mean-token-sum-norm": [loss.sum() / longest for loss in kept],
    }[mode]
    return torch.stack(of_sequences).mean()


def _of_response(sample: Sample, x: Tensor) -> Tensor:
    """[L - 1] -> [response], on the host; 0 in its holes, which no head computes."""
    response = x[sample.prompt_length - 1 :].cpu()
    return response if sample.loss_mask is None else torch.where(sample.loss_mask, response, 0)


def _forward(
    model: torch.nn.Module, spec: ModelSpec, sample: Sample, temperature: float, mesh: Mesh
) -> tuple[Tensor, Tensor]:
    """Log-probability of every next token, and the entropy; or values, and zeros: each [L - 1]."""
    tokens = torch.tensor(sample.tokens, device=mesh.device)
    read, target = tokens[:-1], tokens[1:]
    layout = packed_layout([0, len(read)], mesh.device, transformer_engine=False)
    positions = torch.arange(len(read), device=mesh.device)
    if spec.scalar_head:
        everything = torch.ones_like(target, dtype=torch.bool)
        inputs = {"labels": target[None], "loss_mask": everything[None], "packed_seq_params": layout}
        values, zeros = model(read[None], positions[None], None, **inputs)
        return values, zeros
    logits = model(read[None], positions[None], None, packed_seq_params=layout)[0, :, : spec.vocab_size]
    logps = (logits.float() / temperature).log_softmax(-1)
    return logps.gather(-1, target[:, None])[:, 0], -(logps.exp() * logps).sum(-1)


def _laid_end_to_end(samples: list[Sample], entropies: list[Tensor], device: torch.device) -> MicroBatch:
    """What a loss is given, of whole sequences without padding."""
    sizes = [len(sample.tokens) - 1 for sample in samples]
    starts = torch.tensor([0, *sizes]).cumsum(0).tolist()

    def laid(of: list[Tensor | None]) -> Tensor | None:
        if of[0] is None:
            return None
        parts = [
            torch.cat([x.new_zeros(sample.prompt_length - 1), x])
            for sample, x in zip(samples, of, strict=True)
            if x is not None
        ]
        return torch.cat(parts).to(device)

    responses = [torch.ones(sample.response_length) for sample in samples]
    masks = [one.bool() if s.loss_mask is None else s.loss_mask for one, s in zip(responses, samples, strict=True)]
    mask = laid(list(masks))
    assert mask is not None, "every sample has a mask"
    advantages = [one if s.advantages is None else s.advantages for one, s in zip(responses, samples, strict=True)]
    laid_advantages = laid(list(advantages))
    assert laid_advantages is not None, "every sample has advantages"
    return MicroBatch(
        samples=samples,
        cu_seqlens=starts,
        tokens=torch.cat([torch.tensor(sample.tokens[:-1]) for sample in samples]).to(device),
        targets=torch.cat([torch.tensor(sample.tokens[1:]) for sample in samples]).to(device),
        positions=torch.cat([torch.arange(size) for size in sizes]).to(device),
        loss_mask=mask,
        sequence=torch.cat([torch.full((size,), i) for i, size in enumerate(sizes)]).to(device),
        weights=mask.float(),
        count=int(mask.sum()),
        fresh=mask,
        advantages=laid_advantages,
        rollout_logps=laid([sample.rollout_logps for sample in samples]),
        old_logps=laid([sample.old_logps for sample in samples]),
        ref_logps=laid([sample.ref_logps for sample in samples]),
        old_values=laid([sample.values for sample in samples]),
        returns=laid([sample.returns for sample in samples]),
        entropy=torch.cat(entropies),
    )


def _gradient(parameter: Tensor) -> Tensor:
    """An expert that no token was sent to has none; nor have routers' expert biases, which are buffers."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
