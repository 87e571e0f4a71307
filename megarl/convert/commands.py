"""``megarl convert``: arguments, and what is printed. The work is imported when a command runs.

Exit codes: 0 done, 1 the work failed or checkpoints differ, 2 the command is wrong (nothing was started).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megarl.convert.sources import Source

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
_OLDEST_CORE, _NEWEST_CORE = (0, 16), (0, 19)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give ``megarl convert`` its commands."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=run, convert=command)
        return sub

    _hf2mcore_arguments(add("hf2mcore", hf2mcore, "write a Megatron checkpoint (torch_dist) from a Hugging Face one"))
    _mcore2hf_arguments(add("mcore2hf", mcore2hf, "write a Hugging Face directory from a Megatron checkpoint"))
    _verify_arguments(add("verify", verify, "compare two checkpoints of either format bit by bit"))
    sub = add("inspect", inspect, "say what a checkpoint of either format holds")
    sub.add_argument("path", metavar="DIR", type=Path)
    sub.add_argument("--json", action="store_true", help="print JSON")
    _add_config_from(sub)


def _hf2mcore_arguments(sub: argparse.ArgumentParser) -> None:
    _add_common(sub, "Hugging Face directory", "folder to be; the checkpoint is release/ in it")
    sub.add_argument("--iteration", type=int, help="write iter_NNNNNNN/ instead of release/")
    sub.add_argument("--layers", choices=("te", "local"), default="te", help="whose names: Transformer Engine's layers")
    keys = sub.add_mutually_exclusive_group()
    keys.add_argument("--per-layer-keys", action="store_true", help="a key for each layer, also of a dense model")
    keys.add_argument("--stacked-keys", action="store_true", help="one for all layers, also of a model with experts")
    sub.add_argument("--core-version", type=_core_version, default=(0, 16), help="megatron-core that is to read it")
    sub.add_argument("--make-vocab-size-divisible-by", type=int, help="times the TP size, the vocabulary's multiple")
    sub.add_argument("--target-tensor-parallel-size", type=int, default=1, help="TP that the vocabulary is padded for")


def _mcore2hf_arguments(sub: argparse.ArgumentParser) -> None:
    _add_common(sub, "Megatron checkpoint: its root, or one iteration's folder", "Hugging Face directory to be")
    _add_config_from(sub)
    sub.add_argument("--from-master", action="store_true", help="the optimizer's fp32 weights instead of the model's")
    sub.add_argument("--part", metavar="NAME", help="of a training run's checkpoint another model, such as critic")
    sub.add_argument("--quantize", choices=("fp8",), help="write linear weights as FP8 in blocks of 128 x 128")
    sub.add_argument("--max-file-size", type=_size, default=5 << 30, help="bytes, or such as 5G (default 5 GiB)")


def _verify_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("a", metavar="A", type=Path)
    sub.add_argument("b", metavar="B", type=Path, nargs="?", help="left out: A is compared with its manifest only")
    _add_config_from(sub)
    sub.add_argument("--mtp", choices=("keep", "drop"), default="keep", help="drop: compare without MTP layers")
    sub.add_argument("--dtype", choices=DTYPES, help="cast both sides before they are compared")
    sub.add_argument("--logits", action="store_true", help="compare logits too, with transformers and megatron-core")
    sub.add_argument("--first-layers", type=int, default=2, metavar="K", help="layers that --logits runs (2)")


def _add_common(sub: argparse.ArgumentParser, source: str, target: str) -> None:
    sub.add_argument("source", metavar="SRC", type=Path, help=source)
    sub.add_argument("target", metavar="DST", type=Path, help=target)
    sub.add_argument("--dtype", choices=DTYPES, help="default: each tensor keeps its own")
    sub.add_argument("--mtp", choices=("keep", "drop"), default="keep", help="multi-token-prediction layers")
    sub.add_argument("--workers", type=int, default=1, help="processes; each takes whole layers")
    sub.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    sub.add_argument("--overwrite", action="store_true", help="replace what an earlier conversion wrote")


def _add_config_from(sub: argparse.ArgumentParser) -> None:
    text = "Hugging Face directory that describes a Megatron checkpoint without hf/ beside it"
    sub.add_argument("--config-from", type=Path, metavar="HF_DIR", help=text)


def _core_version(text: str) -> tuple[int, int]:
    match = re.match(r"0\.(\d+)(\.|$)", text)
    if not match or not _OLDEST_CORE <= (0, int(match[1])) <= _NEWEST_CORE:
        raise argparse.ArgumentTypeError(f"{text!r}: 0.16 to 0.19 are known")
    return 0, int(match[1])


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMG]?)B?", text.upper())
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 5G or 500M")
    return int(match[1]) * _UNITS[match[2]]


def run(args: argparse.Namespace) -> int:
    """Do one command; what is wrong with the files is printed, not raised."""
    from megarl.convert.files import TargetError
    from megarl.model.family import UnsupportedModel
    from megarl.weights.hf_files import CheckpointError

    try:
        return int(args.convert(args))
    except (TargetError, UnsupportedModel) as error:
        print(f"megarl convert: {error}", file=sys.stderr)
        return 2
    except (CheckpointError, OSError) as error:
        print(f"megarl convert: {error}", file=sys.stderr)
        return 1


def hf2mcore(args: argparse.Namespace) -> int:
    from megarl.convert.hf2mcore import ToMegatron, convert_to_megatron
    from megarl.weights.shard import VOCAB_MULTIPLE

    divisor = args.make_vocab_size_divisible_by or VOCAB_MULTIPLE
    job = ToMegatron(
        args.source,
        args.target,
        dtype=_dtype(args.dtype),
        keep_mtp=args.mtp == "keep",
        flavour=args.layers,
        stacked=args.stacked_keys or (False if args.per_layer_keys else None),
        core_version=args.core_version,
        vocab_multiple=divisor * args.target_tensor_parallel_size,
        iteration=args.iteration,
    )
    manifest = convert_to_megatron(job, workers=args.workers, resume=args.resume, overwrite=args.overwrite)
    print(f"{args.target}: {len(manifest.tensors)} tensors")
    return 0


def mcore2hf(args: argparse.Namespace) -> int:
    from megarl.convert.mcore2hf import ToHF, convert_to_hf

    job = ToHF(
        args.source,
        args.target,
        config_from=args.config_from,
        dtype=_dtype(args.dtype),
        keep_mtp=args.mtp == "keep",
        from_master=args.from_master,
        fp8=args.quantize == "fp8",
        max_file_bytes=args.max_file_size,
        part=args.part,
    )
    manifest = convert_to_hf(job, workers=args.workers, resume=args.resume, overwrite=args.overwrite)
    print(f"{args.target}: {len(manifest.tensors)} tensors")
    return 0


def verify(args: argparse.Namespace) -> int:
    from megarl.convert.files import TargetError
    from megarl.convert.sources import open_source, refuse
    from megarl.convert.verify import compare_logits

    if args.logits and not args.b:
        raise TargetError("--logits compares two checkpoints; give a second one")
    with contextlib.ExitStack() as opened:
        sources = []
        for path in (args.a, args.b) if args.b else (args.a,):
            sources.append(open_source(path, args.config_from, keep_mtp=args.mtp == "keep"))
            opened.callback(sources[-1].close)
            refuse(f"{path} is not whole:", sources[-1].problems())
        if not args.b and sources[0].manifest is None:
            raise TargetError(f"{args.a} has no manifest; give a second checkpoint")
        differences = _differences(sources, args)
    for line in differences:
        print(line)
    if args.logits:
        layers = min(args.first_layers, *(source.spec.num_layers for source in sources))
        logits = compare_logits(args.a, args.b, layers, args.config_from)
        print(json.dumps(logits.__dict__))
        if not logits.equal:
            differences.append("logits")
    count = len(sources[0].spec.tensors())
    print(f"{len(differences)} differences" if differences else f"equal: {count} tensors, bit for bit")
    return 1 if differences else 0


def _differences(sources: list[Source], args: argparse.Namespace) -> list[str]:
    """Of each checkpoint to its manifest, and of the two. A manifest says nothing of a model with layers left out."""
    from megarl.convert.progress import ProgressBar
    from megarl.convert.verify import check_manifest, compare, nbytes

    differences: list[str] = []
    manifests = [source.manifest for source in sources if source.manifest and args.mtp == "keep"]
    total = sum(manifest.nbytes for manifest in manifests) + (nbytes(sources[0]) if args.b else 0)
    with ProgressBar("comparing", total) as bar:
        moved = _counter(bar)
        for source in sources if args.mtp == "keep" else ():
            differences += check_manifest(source, moved)
        if args.b:
            differences += compare(*sources, dtype=_dtype(args.dtype), moved=moved)
    return differences


def inspect(args: argparse.Namespace) -> int:
    from megarl.convert.inspect import describe_checkpoint

    facts = describe_checkpoint(args.path, args.config_from)
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        for name, value in facts.items():
            print(f"{name:>18}  {_shown(value)}")
    return 0


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{count} {name}" for name, count in value.items())
    if isinstance(value, list):
        return "\n".join(str(each) for each in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _dtype(name: str | None) -> Any:
    import torch

    return getattr(torch, DTYPES[name]) if name else None


def _counter(bar: Any) -> Callable[[int], None]:
    def moved(nbytes: int) -> None:
        bar.to(bar.done + nbytes)

    return moved
