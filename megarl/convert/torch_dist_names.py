"""Where megatron-core's torch_dist checkpoints keep each canonical tensor.

The canonical tensors (`megarl.weights.rules`) are 1-D or 2-D, one a layer and expert. A checkpoint stacks them: experts
along an axis, and, where all layers are alike ("homogeneous"), layers along another: ``[layers, experts, rows,
columns]``. Layers of several kinds have their number in the key instead. Keys follow the layers the model was built
of: Transformer Engine's ("te") and megatron's own ("local") name some norms differently. Everything here is names and
shapes; nothing is read.

Sources: megatron-core 0.16.1 and 0.19.2, ``sharded_state_dict`` of ``transformer_block.py``, ``transformer_layer.py``,
``mlp.py``, ``moe/experts.py``, ``multi_token_prediction.py``; ``sharded_state_dict_keys_map`` of
``gpt_layer_specs.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megarl.model.family import EMBEDDING, VALUE_HEAD, ModelSpec
from megarl.weights.hf_files import CheckpointError
from megarl.weights.rules import CanonTensor, Shard

_LAYER = re.compile(r"(decoder|mtp)\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"(.*mlp\.experts\.experts\.)(\d+)\.(linear_fc[12]\.(?:weight|bias))")
_GATED = re.compile(r".*\.linear_fc1\.(weight|bias)")
_MTP_CANON = "mtp_model_layer."
_MASTER = re.compile(r"((?!chained_\d)\w+\.)?(?:chained_\d+\.)?optimizer\.state\.(?:fp32_)?param\.(.+)")
_NOT_MODEL = re.compile(r"(\w+\.){0,2}optimizer\.|rng_state|rerun_state_machine_state|common_state")

# Modules whose _extra_state a strict load asks for. Megatron's own linear layers have one, which is empty; Transformer
# Engine's norms and attention have one too (None is accepted by all of them).
_LINEAR = re.compile(r"(?:.*\.)?(linear_(?:qkv|proj|fc1|fc2|q_proj|[qk]v?_(?:down|up)_proj)|eh_proj)\.weight")
_TE_NORM = re.compile(r"(?:.*\.)?(?:pre_mlp_layernorm|input_layernorm|[qk]_layernorm|final_layernorm|[eh]norm)\.weight")


@dataclass(frozen=True)
class Place:
    """Rows ``start`` to ``stop`` of a canonical tensor: all rows of entry ``index`` of the stored tensor ``key``.

    A canonical tensor has one place, except where a checkpoint stores gate and up apart (``singleton_local_shards``).
    """

    key: str
    index: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class StoredNames:
    """How one checkpoint names and stacks the tensors of ``spec``.

    Args:
        flavour: "te" or "local".
        stacked: layers along an axis; only where all decoder layers are of one kind.
        separate: each expert, and gate and up of every gated layer, under a key of its own
            (``singleton_local_shards`` of megatron-core up to 0.18).
        mtp_layer: what a multi-token-prediction layer calls the decoder layer in it. Megatron-core renamed the module
            to ``mtp_model_layer`` in 0.17, and writes and reads GPT models' checkpoints under the older name (0.16.1 to
            0.19.2); by the newer one they are read only.
        prefix: what comes before every key, such as ``model.`` (megatron itself has none), or ``critic.`` of one of
            the models of a training run.
    """

    spec: ModelSpec
    flavour: str = "te"
    stacked: bool = True
    separate: bool = False
    mtp_layer: str = "transformer_layer."
    prefix: str = ""

    def __post_init__(self) -> None:
        if self.flavour not in ("te", "local"):
            raise ValueError(f"flavour {self.flavour!r}: te or local")
        if self.stacked and not homogeneous(self.spec):
            raise ValueError("layers of several kinds cannot be stacked: megatron-core keeps them under numbered keys")

    def stored(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Key and leading indices of the canonical tensor ``name``."""
        match = _LAYER.fullmatch(name)
        if not match:
            return self.prefix + name, ()
        block, number, suffix = match[1], int(match[2]), match[3]
        index: tuple[int, ...] = ()
        if (expert := _EXPERT.fullmatch(suffix)) and not self.separate:
            suffix, index = expert[1] + expert[3], (int(expert[2]),)
        if block == "mtp":
            inner = suffix.startswith(_MTP_CANON)
            suffix = suffix.removeprefix(_MTP_CANON)
            within = self.mtp_layer + self._suffix(suffix, moe=True) if inner else suffix
            return f"{self.prefix}mtp.layers.{number}.{within}", index
        suffix = self._suffix(suffix, moe=self.spec.is_moe(number))
        if self.stacked:
            return f"{self.prefix}decoder.layers.{suffix}", (number, *index)
        return f"{self.prefix}decoder.layers.{number}.{suffix}", index

    def _suffix(self, suffix: str, moe: bool) -> str:
        """The name within a layer. The canonical one is Transformer Engine's."""
        if self.flavour == "te":
            return suffix
        if self.spec.mla is None:
            # Megatron maps its local norm to the fused name whether or not there is such a layer.
            return "mlp.linear_fc1.layer_norm_weight" if suffix == "pre_mlp_layernorm.weight" else suffix
        if suffix == "mlp.linear_fc1.layer_norm_weight":
            return "pre_mlp_layernorm.weight"
        return re.sub(r"linear_(q|kv)_up_proj\.layer_norm_weight", r"\1_layernorm.weight", suffix)

    def places(self, tensor: CanonTensor) -> tuple[Place, ...]:
        """Where the rows of a canonical tensor are, in order."""
        key, index = self.stored(tensor.name)
        rows = tensor.shape[0]
        if self.separate and tensor.stride == 2 and _GATED.fullmatch(key):
            return (Place(key + "_w", index, 0, rows // 2), Place(key + "_v", index, rows // 2, rows))
        return (Place(key, index, 0, rows),)

    def shapes(self, padded_vocab_size: int | None = None) -> dict[str, tuple[int, ...]]:
        """Shape of every stored tensor; embedding and head have ``padded_vocab_size`` rows (None: no padding)."""
        out = {}
        for tensor in self.spec.tensors():
            shape = tensor.shape
            if tensor.shard is Shard.VOCAB and padded_vocab_size:
                shape = (padded_vocab_size, *shape[1:])
            for place in self.places(tensor):
                rows = shape[0] if place.stop == tensor.shape[0] and not place.start else place.stop - place.start
                out[place.key] = (*self._axes(tensor.name, len(place.index)), rows, *shape[1:])
        return out

    def _axes(self, name: str, count: int) -> tuple[int, ...]:
        """Lengths of the leading axes: layers, experts, both, or none."""
        experts = (self.spec.size("num_experts"),) if _EXPERT.fullmatch(name) and not self.separate else ()
        return (self.spec.num_layers, *experts) if count > len(experts) else experts

    def extra_states(self) -> list[str]:
        """Unique keys of the ``_extra_state`` objects that megatron's strict load asks for (their value is None)."""
        out = []
        for tensor in self.spec.tensors():
            key, index = self.stored(tensor.name)
            if not tensor.name.endswith(".weight") or tensor.shard is Shard.VOCAB:
                continue
            if _LINEAR.fullmatch(key) or (self.flavour == "te" and _TE_NORM.fullmatch(key)):
                axes = self._axes(tensor.name, len(index))
                shard = ".".join(map(str, index or (0,))) + "_" + ".".join(map(str, axes or (1,)))
                out.append(f"{key.removesuffix('weight')}_extra_state/shard_{shard}")
                if self.flavour == "te" and key.endswith("self_attention.linear_proj.weight"):
                    out.append(f"{key.removesuffix('linear_proj.weight')}core_attention._extra_state/shard_{shard}")
        return out

    def check(self, stored: Mapping[str, tuple[tuple[int, ...], torch.dtype]], path: Path) -> None:
        """Compare with a checkpoint's tensors. Raises CheckpointError naming what is missing, misshapen or extra."""
        expected = self.shapes()
        vocab = {self.stored(t.name)[0] for t in self.spec.tensors() if t.shard is Shard.VOCAB}
        if missing := sorted(set(expected) - set(stored)):
            raise CheckpointError(f"{path / '.metadata'}: {_some(missing)} missing")
        for key, shape in expected.items():
            found = stored[key][0]
            padded = key in vocab and len(found) == 2 and found[0] >= shape[0] and found[1:] == shape[1:]
            if found != shape and not padded:
                raise CheckpointError(f"{path / '.metadata'}: {key} has shape {found}, the model's is {shape}")
        dropped = self.spec.mtp_in_checkpoint > self.spec.mtp_num_layers
        passed = re.compile(re.escape(self.prefix) + (r"mtp\.layers\." if dropped else r"\Z."))
        own = of_part(model_keys(stored), self.prefix)
        extra = sorted(key for key in own - set(expected) if not passed.match(key))
        if extra:
            raise CheckpointError(f"{path / '.metadata'}: {_some(extra)} no part of a {self.spec.family.name} model")


def homogeneous(spec: ModelSpec) -> bool:
    """Whether all decoder layers are of one kind, so that a checkpoint may stack them."""
    return len({spec.is_moe(i) for i in range(spec.num_layers)}) == 1


def model_keys(keys: Iterable[str]) -> set[str]:
    """Those keys that are weights, not optimizer state or random number generators."""
    return {key for key in keys if not _NOT_MODEL.match(key)}


def parts(keys: Iterable[str]) -> list[str]:
    """What the keys of each language model in a checkpoint begin with, the shortest first; training runs save several
    models side by side, all but the policy under a name of their own."""
    return sorted((key.removesuffix(EMBEDDING) for key in model_keys(keys) if key.endswith(EMBEDDING)), key=len)


def of_part(keys: set[str], prefix: str) -> set[str]:
    """Those keys that are no other model's than that of ``prefix``."""
    others = [other for other in parts(keys) if other != prefix]
    longer = tuple(other for other in others if other.startswith(prefix))
    return {key for key in keys if (not others or key.startswith(prefix)) and not key.startswith(longer or ("\0",))}


def master_keys(keys: Iterable[str]) -> dict[str, str]:
    """For each weight that has one, the key of its fp32 master in the optimizer's state.

    Only a distributed optimizer's, saved as ``fully_reshardable`` (``optimizer.state.param.<key>``) or, by older
    cores, ``fully_sharded_model_space`` (``optimizer.state.fp32_param.<key>``): others do not follow parameters.
    """
    return {(match[1] or "") + match[2]: key for key in keys if (match := _MASTER.fullmatch(key))}


def detect(spec: ModelSpec, keys: Iterable[str], path: Path, part: str | None = None) -> StoredNames:
    """How the checkpoint at ``path`` names the tensors of its model, or of its ``part``, from the keys it has.

    Where the part has a value head in place of the vocabulary's, so has the names' ``spec``. Raises CheckpointError
    where there is no embedding, or no such part, or where layers that differ are stacked. Call `StoredNames.check`
    next.
    """
    own = model_keys(keys)
    found = parts(own)
    if not found:
        raise CheckpointError(f"{path / '.metadata'}: {EMBEDDING} missing: no megatron-core language model")
    prefix = found[0] if part is None else part + "."
    if prefix not in found:
        named = ", ".join(name.removesuffix(".") for name in found if name) or "none with a name"
        raise CheckpointError(f"{path / '.metadata'}: there is no part {part}; these are: {named}")
    own = of_part(own, prefix)
    if prefix + VALUE_HEAD in own:
        spec = spec.with_scalar_head()
    numbered = re.compile(re.escape(prefix) + r"decoder\.layers\.\d+\.")
    stacked = not any(numbered.match(key) for key in own)
    if stacked and not homogeneous(spec):
        raise CheckpointError(f"{path / '.metadata'}: layers are stacked, but the model's layers are of several kinds")
    if spec.mla:
        local = any(key.endswith("self_attention.kv_layernorm.weight") for key in own)
    else:
        local = spec.moe is not None and not any(key.endswith("pre_mlp_layernorm.weight") for key in own)
    return StoredNames(
        spec,
        flavour="local" if local else "te",
        stacked=stacked,
        separate=any(key.endswith("linear_fc1.weight_w") for key in own),
        mtp_layer=_MTP_CANON if any(f".{_MTP_CANON}" in key for key in own) else "transformer_layer.",
        prefix=prefix,
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more + (": these are" if len(names) > 1 else " is")
