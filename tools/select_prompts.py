"""Which prompts to train on, from a run that wrote down its rewards (reward.save_scores=true).

    .venv/bin/python tools/select_prompts.py RUN/rewards.jsonl OUT.jsonl [--limr]

OUT.jsonl has a line for each prompt, {"id", "pass_rate"}, for data.pass_rates of another run: its data.min_pass_rate
and data.max_pass_rate choose by the mean reward, which has to be in [0, 1]. With --limr the number is LIMR's score in
place of the pass rate (2502.11886): how well a prompt's rewards, epoch after epoch, follow those of all prompts;
data.min_pass_rate=0.6 is the paper's choice. A score below 0 counts as 0. A prompt's k-th step is its epoch k, and an
epoch that a prompt lacks, as where the run ended within it, is left out for all.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from megarl.data.curriculum import impact_scores, trajectories

Sample = tuple[int, str, float]  # epoch, prompt id, reward


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rewards", type=Path, help="rewards.jsonl of a run")
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_argument("--limr", action="store_true", help="LIMR's scores in place of pass rates")
    args = parser.parse_args()
    rewards = by_epoch(args.rewards)
    if bad := [(prompt, reward) for _, prompt, reward in rewards if not 0 <= reward <= 1]:
        sys.exit(f"{args.rewards}: the reward {bad[0][1]} of {bad[0][0]} is outside [0, 1], so it is no pass rate")
    numbers = limr(complete_epochs(rewards, args.rewards)) if args.limr else pass_rates(rewards)
    rows = [json.dumps({"id": prompt, "pass_rate": number}) + "\n" for prompt, number in numbers.items()]
    args.out.write_text("".join(rows), encoding="utf-8")
    print(f"{len(numbers)} prompts, {len(rewards)} samples: {args.out}")
    return 0


def by_epoch(path: Path) -> list[Sample]:
    """Every sample, with how many steps before its own its prompt was in."""
    seen: dict[str, list[int]] = {}
    samples = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        steps = seen.setdefault(row["id"], [])
        if row["step"] not in steps:
            steps.append(row["step"])
        samples.append((steps.index(row["step"]), row["id"], float(row["reward"])))
    return samples


def pass_rates(rewards: list[Sample]) -> dict[str, float]:
    """The mean reward of each prompt's samples."""
    of_prompt: dict[str, list[float]] = {}
    for _, prompt, reward in rewards:
        of_prompt.setdefault(prompt, []).append(reward)
    return {prompt: sum(values) / len(values) for prompt, values in of_prompt.items()}


def complete_epochs(rewards: list[Sample], path: Path) -> list[Sample]:
    """The samples of the epochs that every prompt was in. That one is over shows when a prompt comes again."""
    visits: dict[str, int] = {}
    for epoch, prompt, _ in rewards:
        visits[prompt] = max(visits.get(prompt, 0), epoch + 1)
    if max(visits.values(), default=0) < 2:
        sys.exit(
            f"{path}: no prompt was sampled in two steps, so that not one epoch is complete; LIMR follows rewards "
            "over epochs: let the run go on, with a larger run.max_num_epochs"
        )
    epochs = min(visits.values())
    return [sample for sample in rewards if sample[0] < epochs]


def limr(rewards: list[Sample]) -> dict[str, float]:
    """LIMR's scores, at least 0."""
    epochs = max((epoch for epoch, _, _ in rewards), default=0) + 1
    return {prompt: max(score, 0.0) for prompt, score in impact_scores(trajectories(rewards, epochs)).items()}


if __name__ == "__main__":
    sys.exit(main())
