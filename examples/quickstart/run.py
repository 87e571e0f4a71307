"""The quickstart: a small model learns arithmetic by SFT, then learns by GRPO to work problems out instead of guessing.

    python examples/quickstart/run.py [--layout tp2|dp2|pp2|1] [--seed N] [--root runs/quickstart]

Nothing is downloaded: problems, tokenizer and model are made here. Two runs of `megarl train` follow, each over two
ranks with a real megatron-core model; the second samples with real vLLM engines in the same processes. See README.md.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
LAYOUTS = {
    "tp2": ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
    "dp2": [],
    "pp2": ["parallel.pipeline_model_parallel_size=2"],
    "1": ["cluster.gpus_per_node=1"],
}


def main() -> int:
    args = parse()
    started = time.monotonic()
    model, data = args.root / "model", args.root / "data"
    say("1 of 3: problems, tokenizer and an untrained model")
    for script, out in (("problems.py", data), ("make_model.py", model)):
        subprocess.run([sys.executable, str(HERE / script), str(out), "--seed", str(args.seed)], check=True)
    say("2 of 3: SFT on worked problems and on guesses")
    code = train(args, "sft", [f"model.path={model}", f"data.path={data / 'sft.jsonl'}"])
    if code:
        return code
    say("3 of 3: GRPO; the reward is 1 for a right answer, 0 for a wrong one")
    files = [f"data.path={data / 'train.jsonl'}", f"data.val_path={data / 'held_out.jsonl'}"]
    code = train(args, "grpo", [f"model.path={args.root / 'sft' / 'hf' / 'final'}", *files])
    if code:
        return code
    final = args.root / "grpo" / "hf" / "final"
    show_answers(final, data / "held_out.jsonl")
    say(f"model (transformers and vLLM load it): {final}")
    say(f"metrics.jsonl, TensorBoard, reward.png: {args.root / 'grpo'}")
    say(f"{time.monotonic() - started:.0f} s in all")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layout", choices=LAYOUTS, default="tp2", help="how the model is laid over two ranks")
    parser.add_argument("--seed", type=int, default=1, help="of problems, weights, shuffling and sampling")
    parser.add_argument("--root", type=Path, default=Path("runs/quickstart"), help="folder of everything that is made")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings for both runs: run.max_num_steps=3")
    return parser.parse_args()


def train(args: argparse.Namespace, recipe: str, settings: list[str]) -> int:
    """`megarl train`, as a user would call it."""
    common = [f"run.root={args.root}", f"run.seed={args.seed}", *LAYOUTS[args.layout], *args.overrides]
    command = [sys.executable, "-m", "megarl", "train", str(HERE / f"{recipe}.yaml"), *settings, *common]
    return subprocess.run(command, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"}).returncode


def show_answers(model_path: Path, problems: Path, count: int = 3) -> None:
    """Answer a few held-out problems with transformers: the exported model needs nothing of megarl."""
    import json

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    for line in problems.read_text().splitlines()[:count]:
        problem = json.loads(line)
        inputs = tokenizer(problem["prompt"], return_tensors="pt", return_token_type_ids=False)
        out = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"  {problem['prompt']}{answer}    (right: {problem['answer']})")


def say(text: str) -> None:
    print(f"quickstart: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
