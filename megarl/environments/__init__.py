"""Environments: what a policy talks with, one plain file each.

Contract: an environment is a function `def make(dialogue, **options) -> conversation`, called once a run (twice where
groups go on from step to step: a validation then has a conversation of its own), and a conversation is
`async def conversation(episode, prompt) -> Sample`, called once a sample (`megarl.rollout.conversation`); many of them
run side by side, in one thread. `dialogue` knows the tokenizer and puts what the environment says between two turns;
`episode` is the engine, within limits, and keeps the transcript:

    async def conversation(episode, prompt):
        while True:
            turn = await episode.turn()                    # the policy writes
            said = await look_up(dialogue.text(turn.tokens))
            if said is None:
                return episode.sample()
            episode.observe(dialogue.says(said, turn))     # the policy reads

Tokens in, tokens out: nothing is tokenised twice, and what the policy did not write is outside of the loss. What a
conversation learns about itself (`episode.measures`) are columns for rewards, and metrics. Environments know no engine
and no process group; an exception in one costs its group and names its prompt.
"""

SINGLE_TURN = "single_turn"
ENVIRONMENTS = {
    SINGLE_TURN: "megarl.environments.making:only_one_turn",
    "calculator": "megarl.environments.tools:calculator",
    "python": "megarl.environments.tools:python",
    "search": "megarl.environments.tools:search",
    "countdown": "megarl.environments.countdown:countdown",
    "grid": "megarl.environments.grid:grid",
}
