"""Checks of the data section: which prompts to take, and in which order."""

from pathlib import Path

import pytest

from megarl.config import ConfigError, load


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {path: m}\ndata: {path: d.jsonl}\n")
    return [str(recipe)]


def test_selection_by_pass_rate_is_fine_with_one_source_of_rates(base: list[str]) -> None:
    between = ["data.pass_rate_key=rate", "data.min_pass_rate=0.1", "data.max_pass_rate=0.9"]
    cfg = load([*base, *between], check_model=False)
    assert (cfg.data.min_pass_rate, cfg.data.max_pass_rate) == (0.1, 0.9)
    order = ["data.pass_rates=rates.jsonl", "data.order=easiest_first", "data.shuffle=false"]
    assert load([*base, *order], check_model=False).data.order == "easiest_first"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.min_pass_rate=0.1"], "data.min_pass_rate = 0.1 needs pass rates: set data.pass_rate_key or"),
        (["data.max_pass_rate=1.5"], "data.max_pass_rate = 1.5 is outside [0, 1]"),
        (["data.pass_rate_key=r", "data.pass_rates=r.jsonl"], "both say how hard a prompt is"),
        (
            ["data.pass_rate_key=r", "data.min_pass_rate=0.5", "data.max_pass_rate=0.4"],
            "data.min_pass_rate = 0.5 is above data.max_pass_rate = 0.4",
        ),
        (
            ["data.pass_rate_key=r", "data.order=hardest_first"],
            "data.order = hardest_first would be undone by data.shuffle = true",
        ),
        (
            ["algorithm=sft", "data.pass_rate_key=r", "data.min_pass_rate=0.5"],
            "algorithm = sft reads examples, not prompts, so that data.min_pass_rate = 0.5 would do nothing",
        ),
    ],
)
def test_settings_that_do_not_fit_each_other(base: list[str], overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load([*base, *overrides], check_model=False)
    assert words in str(caught.value)


def test_a_missing_file_of_pass_rates_is_named(base: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"data.pass_rates = 'rates.jsonl': there is no such file"):
        load([*base, "data.pass_rates=rates.jsonl", "data.min_pass_rate=0.1"])
