"""The package. Versions live in megarl/pins.py; tools/setup.sh installs everything in the right order."""

import runpy
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
PINS = runpy.run_path(str(ROOT / "megarl" / "pins.py"))
README = ROOT / "README.md"
VERSION = (ROOT / "megarl" / "__init__.py").read_text().rpartition('__version__ = "')[2].rstrip().rstrip('"')

setup(
    name="megarl",
    version=VERSION,
    description="LLM post-training with Megatron-core policies and vLLM rollouts in one SPMD program",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=PINS["PYTHON"],
    packages=find_packages(include=["megarl", "megarl.*"]),
    install_requires=PINS["REQUIREMENTS"],
    extras_require=PINS["EXTRAS"],
    entry_points={"console_scripts": ["megarl = megarl.cli:main"]},
)
