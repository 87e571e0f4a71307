"""What stands between two turns of the policy, in tokens.

Contract: `says(text, turn)` is everything that follows a turn up to where the next one begins. With a chat template it
is what the template puts between two answers, the text as a message of `role` among it; a piece of the template that
the policy has already written (the token that ends its turn) is left out. Without one it is the text alone. Turns are
never rendered or tokenised again: only the observation is.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from megarl.data import chat
from megarl.rollout.conversation import Completion

SPOKEN, SAID = "=-spoken-=", "=-said-="  # stand-ins whose places show what the template puts around them


class Dialogue:
    """The tokenizer's side of an environment."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, use_chat_template: bool, role: str = "user") -> None:
        """Raises RecordError where the chat template refuses a message of `role` after an answer."""
        self.tokenizer = tokenizer
        self._before, self._behind = "", ""
        if use_chat_template:
            asked = {"role": "user", "content": "?"}
            messages = [asked, {"role": "assistant", "content": SPOKEN}, {"role": role, "content": SAID}]
            text = chat.prompt_text(tokenizer, messages, None, True)
            self._before, found, self._behind = text.partition(SPOKEN)[2].partition(SAID)
            if not found:
                raise ValueError(
                    f"the chat template leaves out messages of the role {role!r} after an answer: {text!r}"
                )

    def text(self, tokens: Sequence[int]) -> str:
        """What a turn says."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)

    def says(self, text: str, turn: Completion) -> list[int]:
        """What the policy reads after `turn`."""
        ending = self.tokenizer.decode(turn.tokens[-1:])
        before = self._before.removeprefix(ending) if turn.finish_reason == "stop" else self._before
        return self.tokenizer.encode(before + text + self._behind, add_special_tokens=False)

    def token(self, text: str) -> int:
        """The one token that `text` is. Raises ValueError where it is several."""
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        if len(tokens) != 1:
            raise ValueError(f"{text!r} is {len(tokens)} tokens of this tokenizer; a turn can end at a single one only")
        return tokens[0]
