"""Training data: where it is, how its records are read, and which of them are taken."""

from dataclasses import dataclass
from typing import Literal

from omegaconf import MISSING


@dataclass(frozen=True)
class DataConfig:
    path: str = MISSING
    """Training data: a .jsonl, .json or .parquet file, or the name of a data set that `datasets` can load."""
    split: str = "train"
    """Split to train on, for a `datasets` name."""
    val_path: str | None = None
    """Held-out data, in the same forms as `path`, for GRPO; null means no validation."""
    val_split: str = "test"
    """Split to validate on, for a `datasets` name."""
    subset: str | None = None
    """Configuration name of a `datasets` data set, such as main for GSM8K."""
    val_subset: str | None = None
    """Configuration name of the held-out data set; null means `subset`."""
    prompt_key: str = "prompt"
    """Field of a record that holds the prompt: text, or a list of chat messages."""
    answer_key: str = "answer"
    """Field of a record that holds the answer which rewards compare with."""
    response_key: str = "response"
    """Field of a record that holds the response which SFT learns, or that has a label; else `completion` is read."""
    reasoning_key: str | None = None
    """Field of a record that holds the reasoning before its response; SFT puts it between think tags."""
    messages_key: str = "messages"
    """Field that holds a conversation, for a record without a prompt or response; else `conversations` is read."""
    chosen_key: str = "chosen"
    """Field of a pair that holds the better response: text, a message, or the whole conversation."""
    rejected_key: str = "rejected"
    """Field of a pair that holds the worse response."""
    chosen_score_key: str = "chosen_score"
    """Field of a pair that holds the chosen response's score; read if it is there."""
    rejected_score_key: str = "rejected_score"
    """Field of a pair that holds the rejected response's score; read if it is there."""
    responses_key: str = "responses"
    """Field that holds several responses to rank: texts, or objects with a score each."""
    scores_key: str = "scores"
    """Field that holds the scores of those responses, as many and in the same order."""
    label_key: str = "label"
    """Field of an unpaired example that says whether its response is desirable: true or false, 1 or 0."""
    reference_prompt_key: str | None = None
    """Field of a pair that holds the prompt which the reference model reads in place of the prompt, for LongPO."""
    ranked_pairs: Literal["best_worst", "all"] = "best_worst"
    """Pairs made of ranked responses: the best with the worst, or every two with different scores."""
    train_on_turns: Literal["all", "last"] = "all"
    """Which of the assistant's turns of a conversation SFT learns."""
    pass_rate_key: str | None = None
    """Field of a record that holds the share of attempts that solved it, in [0, 1]."""
    pass_rates: str | None = None
    """Measured pass rates: a .jsonl, .json or .parquet file of id (`train.jsonl:17`) and pass_rate."""
    min_pass_rate: float = 0.0
    """Leave out prompts with a lower pass rate; 0.01 leaves out what was never solved."""
    max_pass_rate: float = 1.0
    """Leave out prompts with a higher pass rate; 0.99 leaves out what was always solved."""
    order: Literal["file", "easiest_first", "hardest_first"] = "file"
    """Order of prompts without `shuffle`: as read, or by pass rate."""
    adapter: str | None = None
    """Reader for a data set with fields of its own, such as gsm8k; null uses the keys above."""
    system_prompt: str | None = None
    """System message put before every prompt."""
    apply_chat_template: bool = True
    """Render prompts with the tokenizer's chat template; false feeds the text as it stands."""
    shuffle: bool = True
    """Shuffle every epoch anew, by the run's seed."""
    max_prompt_length: int = 1024
    """Longest prompt in tokens."""
    overlong_prompts: Literal["drop", "refuse"] = "drop"
    """What to do with a longer prompt: drop and count it, or end with an error."""
    bad_records: Literal["refuse", "drop"] = "refuse"
    """What to do with a record that cannot be read: end with file:line and the reason, or drop and count it."""
    max_records: int | None = None
    """Read only this many records; null reads all."""
