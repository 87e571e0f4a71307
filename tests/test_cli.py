"""The `megarl` command: exit codes, and what it prints where."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megarl import __version__
from megarl.cli import main, multi_node_advice, rank_arguments, torchrun_arguments
from megarl.config import load

LAUNCHERS = ("WORLD_SIZE", "SLURM_PROCID", "MEGARL_LAUNCHER")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "recipe.yaml"
    path.write_text("run: {name: my run}\nmodel: {path: none}\ndata: {path: squad}\n")
    return str(path)


def run_megarl(*args: str) -> subprocess.CompletedProcess[str]:
    """The command as a user starts it."""
    env = {key: value for key, value in os.environ.items() if key not in LAUNCHERS}
    return subprocess.run(
        [sys.executable, "-m", "megarl", *args], env=env, capture_output=True, text=True, timeout=120, check=False
    )


def test_bad_config_starts_nothing_and_exits_2(recipe: str) -> None:
    done = run_megarl("train", recipe, "optimizer.lrr=1", "loss.kl_type=k4", "train.train_global_batch_size=100")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "megarl: 4 problems in the config:",
        "  - command line: unknown key optimizer.lrr; did you mean optimizer.lr?",
        "  - command line: loss.kl_type = 'k4': expected one of k1, k2, k3",
        "  - rollout.num_prompts_per_step 64 x rollout.num_generations_per_prompt 8 = 512 sequences a step do not make "
        "whole updates of train.train_global_batch_size 100 sequences: 512 % 100 = 12",
        "  - model.path = 'none' is not a folder; it takes a Hugging Face directory on this machine",
    ]


def test_usage_errors_exit_2() -> None:
    for argv in ([], ["trian", "x.yaml"], ["train"]):
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        assert stopped.value.code == 2


def test_settings_may_stand_behind_options(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", recipe, "--elsewhere", "rollout.temperature=0.75"]) == 0
    assert "temperature: 0.75" in capsys.readouterr().out
    for strange in ("rollout", "--speed=3"):
        with pytest.raises(SystemExit) as stopped:
            main(["config", recipe, "--elsewhere", "rollout.temperature=0.75", strange])
        assert stopped.value.code == 2
        assert f"unrecognized arguments: {strange}" in capsys.readouterr().err


def test_commands_import_their_work_lazily() -> None:
    """`megarl --version`, and checking a config, must not wait for torch."""
    code = "import sys, megarl.cli, megarl.config; print(sorted({'torch', 'vllm', 'megatron'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, timeout=120) == "[]\n"


def test_checking_a_cpu_recipe_does_not_import_torch(recipe: str) -> None:
    """Neither GPUs nor megatron's settings are worth the seconds that torch takes."""
    code = (
        "import sys\n"
        "from megarl.config import ConfigError, load\n"
        "try: load(sys.argv[1:])\n"
        "except ConfigError as error: print(len(error.problems))\n"
        "print(sorted({'torch', 'vllm', 'megatron.core'} & set(sys.modules)))"
    )
    overrides = ["model.model_overrides.hidden_dropout=0.1", "model.model_overrides.no_such=1", "cluster.device=cpu"]
    command = [sys.executable, "-c", code, recipe, *overrides]
    assert subprocess.check_output(command, text=True, timeout=120) == "2\n[]\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"megarl {__version__}\n"


def test_config_prints_what_load_reads(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--elsewhere", recipe, "rollout.temperature=0.5"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load([str(printed)], check_model=False) == load([recipe, "rollout.temperature=0.5"], check_model=False)


def test_config_names_problems(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", recipe]) == 2
    assert "model.path = 'none' is not a folder" in capsys.readouterr().err


def test_launch_line_of_one_machine(recipe: str) -> None:
    cfg = load([recipe, "cluster.gpus_per_node=3"], check_model=False)
    arguments = torchrun_arguments(cfg, rank_arguments("r.yaml", ["run.seed=1"]))
    assert arguments[:2] == ["-m", "megarl.launch"]
    assert "--nproc-per-node=3" in arguments and "--shutdown-timeout=60" in arguments
    assert arguments[-4:] == ["-m", "megarl.train", "r.yaml", "run.seed=1"]


def test_launch_line_of_several_machines(recipe: str) -> None:
    cfg = load([recipe, "cluster.num_nodes=2", "cluster.gpus_per_node=4"], check_model=False)
    advice = multi_node_advice(cfg, "r.yaml", ["data.system_prompt=be brief"])
    torchrun = "python -m megarl.launch --nnodes=2 --nproc-per-node=4 --shutdown-timeout=60"
    torchrun += " --rdzv-backend=c10d --rdzv-id='my run' --rdzv-endpoint"
    ranks = "-m megarl.train r.yaml 'data.system_prompt=be brief'"
    assert f"  {torchrun}=HEAD:29500 {ranks}\n" in advice
    assert f"  srun --kill-on-bad-exit=1 --nodes=2 --ntasks-per-node=1 {torchrun}=$HEAD:29500 {ranks}" in advice


def test_ranks_learn_the_process_id_of_their_launcher(recipe: str, tmp_path: Path) -> None:
    """`megarl train` becomes torchrun: the id it leaves for the ranks is that of the process they descend from."""
    package = tmp_path / "torch" / "distributed"
    elastic = package / "elastic" / "multiprocessing"
    elastic.mkdir(parents=True)
    for folder in (package.parent, package, package / "elastic", elastic):
        (folder / "__init__.py").touch()
    (elastic / "api.py").write_text("class SignalException(Exception): pass")
    (elastic / "errors.py").write_text("class ChildFailedError(Exception): pass")
    run = "import os\nparse_args = list\ndef run(args): print(os.environ.get('MEGARL_LAUNCHER'), os.getpid())"
    (package / "run.py").write_text(run)
    (tmp_path / "model").mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 64}
    config |= {"intermediate_size": 64, "num_attention_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    env = {key: value for key, value in os.environ.items() if key not in LAUNCHERS} | {"PYTHONPATH": str(tmp_path)}
    settings = [f"model.path={tmp_path}/model", "cluster.device=cpu"]
    command = [sys.executable, "-m", "megarl", "train", recipe, *settings]
    root = Path(__file__).parents[1]
    launcher, own = subprocess.check_output(command, env=env, cwd=root, text=True, timeout=120).split()
    assert launcher == own


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert f"there is no {tmp_path}/metrics.jsonl" in capsys.readouterr().err
    records = [{"step": step, "reward/mean": 0.25 * step, "timing_s/step": 2.0} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert main(["report", str(tmp_path)]) == 0
    assert "0.250 → 0.750" in capsys.readouterr().out
    assert (tmp_path / "reward.png").stat().st_size > 1000


def test_tools_convert_is_the_same_command():
    tool = Path(__file__).parents[1] / "tools" / "convert.py"
    for command in ("hf2mcore", "mcore2hf", "verify", "inspect"):
        shown = subprocess.run([sys.executable, str(tool), command, "--help"], capture_output=True, text=True)
        assert shown.returncode == 0 and f"megarl convert {command}" in shown.stdout, shown.stderr
