"""The house rules that a reader relies on, kept by a test: who may import what, how long a file may be, which habits
are out, and that every recipe still loads."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megarl.config import load

ROOT = Path(__file__).parents[1]
MAX_LINES = 500

# What may be imported only in these folders of megarl.
ONLY_IN = {
    "megatron": ("model", "parallel", "weights", "checkpoint"),
    "vllm": ("rollout",),
}
# Pure parts: they are read and tested without ranks, models or engines.
PURE = ("algorithms", "losses", "advantages", "rewards", "data")
NOT_IN_PURE = ("megatron", "vllm", "torch.distributed")


def files(*patterns: str) -> list[Path]:
    """Files that git tracks or would track, so that build products and virtual environments are left out."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        return [path for name in sorted(listed.stdout.splitlines()) if (path := ROOT / name).is_file()]
    folders = ("megarl", "tests", "tools", "examples", "slurm")  # an unpacked archive has no git
    return sorted(path for folder in folders for pattern in patterns for path in (ROOT / folder).rglob(pattern))


PYTHON = files("*.py")
MEGARL = [path for path in PYTHON if path.is_relative_to(ROOT / "megarl")]
RECIPES = [path for path in files("*.yaml") if path.is_relative_to(ROOT / "examples")]


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported; `from a import b` counts as a.b, which may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def distributed_uses(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """`torch.distributed` reached as an attribute, without an import of its own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield node.lineno, "torch.distributed"


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def test_heavy_libraries_stay_in_their_folders() -> None:
    wrong = []
    for path in MEGARL:
        part = path.relative_to(ROOT / "megarl").parts[0]
        tree = ast.parse(path.read_text())
        forbidden = [library for library, folders in ONLY_IN.items() if part not in folders]
        if part in PURE:
            forbidden += NOT_IN_PURE
        for line, module in [*imports(tree), *distributed_uses(tree)]:
            if any(is_in(module, library) and library in forbidden for library in (*ONLY_IN, "torch.distributed")):
                wrong.append(f"{path.relative_to(ROOT)}:{line} uses {module}")
    assert not wrong, "\n".join(wrong)


def test_no_file_is_long() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in PYTHON}
    wrong = {name: length for name, length in lengths.items() if length > MAX_LINES}
    assert not wrong, f"more than {MAX_LINES} lines, divide them: {wrong}"


def test_every_module_says_its_contract() -> None:
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in MEGARL}
    wrong = [name for name, text in texts.items() if text and not ast.get_docstring(ast.parse(text))]
    assert not wrong, f"modules without a docstring: {wrong}"


def habits(path: Path) -> Iterator[str]:
    """What makes code hard to trust: swallowed exceptions, globals, a config probed for fields it always has."""
    for node in ast.walk(ast.parse(path.read_text())):
        where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Global):
            yield f"{where} global {', '.join(node.names)}"
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            if broad and all(isinstance(statement, ast.Pass | ast.Continue) for statement in node.body):
                yield f"{where} swallows every exception"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            probed = ast.unparse(node.args[0]).split(".")[0]
            if probed == "cfg" or probed.endswith("_cfg"):
                yield f"{where} probes the config: {ast.unparse(node)}"


def test_habits() -> None:
    wrong = [habit for path in MEGARL for habit in habits(path)]
    wrong += [str(path.relative_to(ROOT)) for path in PYTHON if path.name in ("utils.py", "helpers.py", "misc.py")]
    assert not wrong, "\n".join(wrong)


def test_nothing_is_left_for_later() -> None:
    marks = ["TO" + "DO", "FIX" + "ME", "XX" + "X:"]
    wrong = []
    for path in files("*.py", "*.sh", "*.yaml", "*.md", "*.cfg"):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if any(mark in line for mark in marks):
                wrong.append(f"{path.relative_to(ROOT)}:{number} {line.strip()}")
    assert not wrong, "\n".join(wrong)


def test_every_config_field_has_a_sentence() -> None:
    wrong = []
    count = 0
    trees = [ast.parse(path.read_text()) for path in (ROOT / "megarl" / "config").glob("*.py")]
    for node in (node for tree in trees for node in ast.walk(tree)):
        if not isinstance(node, ast.ClassDef) or not node.name.endswith(("Config", "RewardFunction")):
            continue
        for statement, after in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign):
                count += 1
                below = ast.unparse(after).strip("'\"") if isinstance(after, ast.Expr) else ""
                if not (below[:1].isalnum() and below.endswith((".", ".)"))):
                    wrong.append(f"{node.name}.{ast.unparse(statement.target)}")
    assert count > 100
    assert not wrong, f"no sentence under {wrong}"


def keys_of(file: str, name: str) -> list[str]:
    """The keys of a dict that a module defines, without the libraries that importing it would bring."""
    for node in ast.parse((ROOT / "megarl" / file).read_text()).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name and isinstance(node.value, ast.Dict):
            return [ast.literal_eval(key) for key in node.value.keys if key is not None]
    raise AssertionError(f"{file} defines no dict {name}")


def test_readme_has_every_method() -> None:
    """Every loop, loss, estimator and correction by name, and a link to every recipe of examples/methods."""
    names = [
        *keys_of("algorithms/__init__.py", "ALGORITHMS"),
        *keys_of("algorithms/credit.py", "ESTIMATORS"),
        *keys_of("losses/correction.py", "CORRECTIONS"),
        *keys_of("losses/policy.py", "POLICY_LOSSES"),
        *keys_of("losses/preference.py", "PAIR_LOSSES"),
        "kto",
        "bco",
    ]
    section = (ROOT / "README.md").read_text().partition("\n## Methods\n")[2].partition("\n## ")[0]
    settings = set(re.findall(r"[\w-]+", " ".join(re.findall(r"`([^`]*)`", section))))
    assert not [name for name in names if name not in settings]
    links = [f"(examples/methods/{path.name})" for path in RECIPES if path.parent.name == "methods"]
    assert len(links) > 40 and not [link for link in links if link not in section]
    broken = [
        path for path in re.findall(r"\]\(((?:megarl|examples|tools)[^)]*)\)", section) if not (ROOT / path).exists()
    ]
    assert not broken


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_recipe_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the schema and its own arithmetic, with the recipe before it and the settings that its header says to
    give; models and data may be elsewhere."""
    for name in ("WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    name = str(path.relative_to(ROOT))
    pattern = rf"^# .*?((?:examples/\S+\.yaml )?){re.escape(name)}((?: \S+=\S+)*)"
    header = re.search(pattern, path.read_text(), flags=re.MULTILINE)
    assert header, f"{name} does not say how to run it"
    load([str(ROOT / base) for base in header[1].split()] + [str(path), *header[2].split()], check_model=False)
