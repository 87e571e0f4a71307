"""Environments, with an engine that reads its turns from a list: what the policy reads, what counts as its own, and
where a conversation ends."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megarl.config import load
from megarl.data.grid import main, parse, problems, shortest
from megarl.data.prompts import Prompt
from megarl.data.reading import RecordError
from megarl.data.records import Sample
from megarl.environments import ENVIRONMENTS
from megarl.environments.bm25 import Document, Index
from megarl.environments.dialogue import Dialogue
from megarl.environments.episode import EpisodeLimits
from megarl.environments.grid import World
from megarl.environments.making import EnvironmentProblem, conversation_of, make
from megarl.rewards.countdown import countdown_reward
from megarl.rewards.measure import measure_reward
from megarl.rollout.conversation import AsyncEngine, Completion, Transcript, single_turn
from megarl.sandbox import SandboxError, run
from tests.byte_tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_token_id
CHAT = Dialogue(TOKENIZER, use_chat_template=True)
PLAIN = Dialogue(TOKENIZER, use_chat_template=False)
NO_LIMITS = EpisodeLimits()
BETWEEN = "\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"  # what CHATML has behind a turn's EOS


def encoded(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


class Scripted:
    """Gives the listed texts in turn, each with EOS; a number is a turn that takes so many seconds. ``away``: seconds
    before each turn in which there is no engine."""

    def __init__(self, *turns: str | float, max_tokens: int = 1000, away: float = 0.0) -> None:
        self.away = away
        self.turns, self.max_tokens = list(turns), max_tokens
        self.read: list[str] = []
        self.rooms: list[int] = []

    async def ready(self) -> None:
        await asyncio.sleep(self.away)

    async def generate(self, tokens: list[int], max_tokens: int, *, stop_token_ids: Sequence[int] = ()) -> Completion:
        self.read.append(TOKENIZER.decode(tokens))
        self.rooms.append(max_tokens)
        turn = self.turns.pop(0)
        if not isinstance(turn, str):
            await asyncio.sleep(turn)
            turn = "late"
        whole = [*encoded(turn), EOS]
        stops = [i + 1 for i, token in enumerate(whole) if token in (EOS, *stop_token_ids)]
        sampled = whole[: min(max_tokens, stops[0])]
        logps = [-1.0 - len(self.read)] * len(sampled)
        return Completion(sampled, logps, "stop" if len(sampled) == stops[0] else "length")


def prompt(text: str = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n", **fields: Any) -> Prompt:
    return Prompt("train.jsonl:7", encoded(text), text, None, fields)


def talk(
    name: str, engine: Scripted, asked: Prompt | None = None, dialogue: Dialogue = CHAT, limits=NO_LIMITS, **args: Any
) -> Sample:
    return asyncio.run(make(name, args, dialogue, limits)(engine, asked or prompt()))


def pieces(sample: Sample) -> list[tuple[str, bool]]:
    """(text, whether the policy wrote it) of a response, in turn."""
    response = sample.tokens[sample.prompt_length :]
    mask = [True] * len(response) if sample.loss_mask is None else sample.loss_mask.tolist()
    out: list[tuple[list[int], bool]] = []
    for token, wrote in zip(response, mask, strict=True):
        if not out or out[-1][1] != wrote:
            out.append(([], wrote))
        out[-1][0].append(token)
    return [(TOKENIZER.decode(tokens), wrote) for tokens, wrote in out]


def test_a_tool_call_and_an_answer_by_hand() -> None:
    """Two turns; between them the end of the template's message, the result and the head of the next turn."""
    engine = Scripted("<calculator>(1 + 2) / 4</calculator>", "It is 0.75")
    sample = talk("calculator", engine)
    observed = BETWEEN.format("<result>0.75</result>")
    assert pieces(sample) == [
        ("<calculator>(1 + 2) / 4</calculator><|im_end|>", True),
        (observed, False),
        ("It is 0.75<|im_end|>", True),
    ]
    first, second = len(encoded("<calculator>(1 + 2) / 4</calculator>")) + 1, len(encoded("It is 0.75")) + 1
    between = len(encoded(observed))
    assert sample.loss_mask.tolist() == [True] * first + [False] * between + [True] * second
    assert sample.rollout_logps.tolist() == [-2.0] * first + [0.0] * between + [-3.0] * second
    assert engine.rooms == [1000, 1000 - first - between]
    assert engine.read[1] == TOKENIZER.decode(sample.tokens[:-second])  # the very tokens that were sampled before
    assert sample.measures == {"num_turns": 2, "tool_calls": 1, "tool_failures": 0}
    assert (sample.finish_reason, sample.prompt_length) == ("stop", len(prompt().tokens))


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("1/3", "0.3333333333"),
        ("-1/8*(-1)", None),
        ("1/8", "0.125"),
        ("12345678901/2", "6172839450"),
        ("9" * 350 + "/7", "1.428571429e+349"),
        ("(" * 399, None),
    ],
)
def test_what_a_calculator_says(expression: str, result: str | None) -> None:
    """Ten significant digits, of numbers that no float holds too; what is not arithmetic is told, however odd it is."""
    engine = Scripted(f"<calculator>{expression}</calculator>", "well")
    sample = talk("calculator", engine)
    assert sample.measures["tool_failures"] == (result is None)
    assert f"<result>{result or 'error: '}" in engine.read[1]


def test_failures_are_told_and_counted() -> None:
    engine = Scripted("<calculator>1/0</calculator>", "<calculator>2 ** 3</calculator>", "never mind")
    sample = talk("calculator", engine)
    assert "<result>error: division by zero</result>" in engine.read[1]
    assert "<result>error: " in engine.read[2][len(engine.read[1]) :]
    assert sample.measures == {"num_turns": 3, "tool_calls": 2, "tool_failures": 2}


def test_plain_text_with_a_token_that_ends_turns() -> None:
    """Without a chat template the observation is the text alone, and a turn may end at a token of the environment's."""
    engine = Scripted("7*6=", "42")
    sample = talk("calculator", engine, prompt("?"), PLAIN, pattern=r"([0-9*]+)=", reply="{result};", stop=["="])
    assert pieces(sample) == [("7*6=", True), ("42;", False), ("42<|im_end|>", True)]
    with pytest.raises(EnvironmentProblem, match="'==' is 2 tokens"):
        make("calculator", {"stop": ["=="]}, PLAIN, NO_LIMITS)
    with pytest.raises(EnvironmentProblem, match="needs one group"):
        make("calculator", {"pattern": "x"}, PLAIN, NO_LIMITS)


def test_templates_are_only_used_for_what_is_between_turns() -> None:
    cut = Completion(encoded("unfinished"), [0.0] * 10, "length")
    assert TOKENIZER.decode(CHAT.says("x", cut)) == "<|im_end|>" + BETWEEN.format("x")
    assert TOKENIZER.decode(CHAT.says("x", Completion([EOS], [0.0], "stop"))) == BETWEEN.format("x")
    refuses = byte_tokenizer("{{ raise_exception('no two in a row') }}")
    with pytest.raises(RecordError, match="no two in a row"):
        Dialogue(refuses, use_chat_template=True)
    drops = byte_tokenizer("{% for m in messages %}{% if m.role != 'tool' %}{{ m.content }}{% endif %}{% endfor %}")
    with pytest.raises(ValueError, match="leaves out messages of the role 'tool'"):
        Dialogue(drops, use_chat_template=True, role="tool")


def test_the_python_tool_runs_in_the_sandbox() -> None:
    try:
        run("")
    except SandboxError as error:
        pytest.skip(str(error))
    engine = Scripted("<python>print(6 * 7)</python>", "<python>1 / 0</python>", "<python>while 1: 0</python>", "42")
    sample = talk("python", engine, wall_s=0.5)
    assert "<output>\n42\n</output>" in engine.read[1]
    assert "ZeroDivisionError: division by zero\n</output>" in engine.read[2]
    assert "<output>\nerror: stopped after 0.5 s</output>" in engine.read[3]
    assert sample.measures == {"num_turns": 4, "tool_calls": 3, "tool_failures": 2}


def test_search_finds_by_words(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    texts = ["Paris is the capital of France.", "Berlin is the capital of Germany.", "The cat sat on the mat."]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    engine = Scripted("<search>capital of Germany?</search>", "<search>zebra</search>", "Berlin")
    sample = talk("search", engine, corpus=str(corpus), results=2, characters=6)
    assert "<information>\n1. Berlin\n2. Paris \n</information>" in engine.read[1]
    assert "nothing is found for 'zebra'" in engine.read[2]
    assert sample.measures["tool_failures"] == 1
    corpus.write_text('{"text": "a"}\n{"title": "b"}\n')
    with pytest.raises(ValueError, match=r"corpus.jsonl:2: a document is an object with a text"):
        Index.read(str(corpus))


def test_bm25_by_hand() -> None:
    """Three documents of 2, 4 and 6 words: the mean is 4. "b" is in two of three: ln(1 + 1.5 / 2.5) = 0.470."""
    documents = [Document(str(i), text) for i, text in enumerate(("a b", "b b c d", "e f g h i j"))]
    index = Index(documents)
    rare, common = 0.98083, 0.47000  # ln(1 + 2.5 / 1.5), ln(1 + 1.5 / 2.5)
    first = common * 2.5 / (1 + 1.5 * (0.25 + 0.75 * 2 / 4))
    second = common * 2 * 2.5 / (2 + 1.5 * (0.25 + 0.75 * 4 / 4))
    assert second > first and [d.id for d in index.best("B", 3)] == ["1", "0"]
    first += rare * 2.5 / (1 + 1.5 * (0.25 + 0.75 * 2 / 4))
    assert first > second and [d.id for d in index.best("a, b!", 3)] == ["0", "1"]
    assert index.best("zebra", 3) == []


COUNTDOWN = {"nums": [3, 5, 2], "target": 13}


def test_countdown_says_what_an_answer_makes() -> None:
    engine = Scripted("<answer>3 + 5 + 2</answer>", "<answer>3 + 5 * 3</answer>", "<answer>3 + 5 * 2</answer>")
    sample = talk("countdown", engine, prompt(**COUNTDOWN))
    assert BETWEEN.format("That makes 10, not 13. Attempts left: 2.") in engine.read[1]
    used = "That makes 18, but with the numbers 3, 5, 3; use 3, 5, 2, each once. Attempts left: 1."
    assert BETWEEN.format(used) in engine.read[2]
    assert sample.measures == {"num_turns": 3, "attempts": 3, "solved": 1}
    texts = "".join(text for text, wrote in pieces(sample) if wrote)
    assert countdown_reward([texts], nums=[COUNTDOWN["nums"]], target=[COUNTDOWN["target"]]) == [1.0]


@pytest.mark.parametrize(
    ("turns", "measures"),
    [
        (["<answer>3 + 5 * 2 = 13</answer>"], {"num_turns": 1, "attempts": 1, "solved": 1}),
        (["<answer>1</answer>"] * 3, {"num_turns": 3, "attempts": 3, "solved": 0}),
        (["I give up"], {"num_turns": 1, "attempts": 0, "solved": 0}),
        (["<answer>3 +</answer>", "no"], {"num_turns": 2, "attempts": 1, "solved": 0}),
        (["<answer>3 + 5 * 2 = 14</answer>", "no"], {"num_turns": 2, "attempts": 1, "solved": 0}),
    ],
)
def test_countdown_ends(turns: list[str], measures: dict[str, float]) -> None:
    assert talk("countdown", Scripted(*turns, "unread"), prompt(**COUNTDOWN)).measures == measures


MAP = ["P_O", "#_G"]  # down is a wall, right right a hole; right, down, right leads to the goal


@pytest.mark.parametrize(
    ("turns", "measures"),
    [
        (["I go right", "down", "Up? No: RIGHT."], {"success": 1, "steps": 3, "invalid_steps": 0}),
        (["right", "right"], {"success": 0, "steps": 2, "invalid_steps": 0}),
        (["down", "left", "north", "right"], {"success": 0, "steps": 4, "invalid_steps": 3}),
    ],
)
def test_a_walk_on_the_grid(turns: list[str], measures: dict[str, float]) -> None:
    engine = Scripted(*turns)
    sample = talk("grid", engine, prompt(grid=MAP), max_steps=4)
    assert sample.measures == measures | {"num_turns": len(turns)}
    if "down" == turns[0]:
        assert BETWEEN.format("That leads nowhere.\nP_O\n#_G\n") in engine.read[1]
    else:
        assert BETWEEN.format("_PO\n#_G\n") in engine.read[1]


def test_maps_have_a_way_and_depend_on_the_seed_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shortest(MAP) == 3 and shortest(["PO", "OG"]) is None
    rows = list(problems(seed=1, count=20))
    assert rows == list(problems(seed=1, count=25))[:20] and rows != list(problems(seed=2, count=20))
    for row in rows:
        assert int(row["answer"]) == shortest(row["grid"]) >= 1 and str(World.of(row["grid"])) in row["prompt"]
    monkeypatch.setattr("sys.argv", ["grid", str(tmp_path / "maps.jsonl"), "--count", "3", "--seed", "1"])
    main()
    assert [json.loads(line) for line in (tmp_path / "maps.jsonl").read_text().splitlines()] == rows[:3]
    for wrong, said in ((["P_", "G"], "the same length"), (["PP", "G_"], "one P"), (["Px", "G_"], "else O, # and _")):
        with pytest.raises(ValueError, match=said):
            parse(wrong)
    monkeypatch.setattr("megarl.data.grid.MAX_TRIES", 0)
    with pytest.raises(ValueError, match="no map with a way in 0 tries: take fewer holes"):
        list(problems(seed=0, count=1))


# ---- limits ----

CALL = "<calculator>1+1</calculator>"


def test_turns_end_a_conversation() -> None:
    sample = talk("calculator", Scripted(CALL, CALL, CALL), limits=EpisodeLimits(max_turns=2))
    assert (sample.finish_reason, sample.measures) == ("turns", {"num_turns": 2, "tool_calls": 2, "tool_failures": 0})
    assert pieces(sample)[-1] == (f"{CALL}<|im_end|>", True)  # the observation that no turn followed is left out


def test_tokens_end_a_conversation_within_the_limit() -> None:
    turn, between = len(encoded(CALL)) + 1, len(encoded(BETWEEN.format("<result>2</result>")))
    for more, reason, length in ((between + 5, "length", turn + between + 5), (between, "length", turn)):
        engine = Scripted(CALL, CALL, max_tokens=turn + more)
        sample = talk("calculator", engine)
        assert (sample.finish_reason, sample.response_length) == (reason, length)
        assert sample.response_length <= engine.max_tokens


def test_a_slow_turn_ends_a_conversation_and_a_quick_one_starts_the_clock_anew() -> None:
    started = time.monotonic()
    sample = talk("calculator", Scripted(CALL, 60.0), limits=EpisodeLimits(turn_timeout_s=0.2))
    assert (sample.finish_reason, sample.measures["num_turns"]) == ("timeout", 1)
    assert pieces(sample) == [(f"{CALL}<|im_end|>", True)]
    three = Scripted(0.15, 0.15, 0.15)
    sample = talk("calculator", three, limits=EpisodeLimits(turn_timeout_s=5.0, max_turns=3), pattern="(late)")
    assert (sample.finish_reason, sample.measures["num_turns"]) == ("turns", 3)
    assert time.monotonic() - started < 30


def test_a_slow_tool_counts_for_its_turn_and_the_episode_has_an_end_of_its_own() -> None:
    def waits(dialogue: Dialogue, seconds: float):
        async def conversation(episode, prompt):
            while True:
                await episode.turn()
                await asyncio.sleep(seconds)

        return conversation

    from megarl.environments.episode import within

    for limits, seconds in ((EpisodeLimits(turn_timeout_s=0.2), 60), (EpisodeLimits(episode_timeout_s=0.3), 0.05)):
        engine = Scripted(*["x"] * 50)
        sample = asyncio.run(within(limits, waits(CHAT, seconds))(engine, prompt()))
        assert sample.finish_reason == "timeout" and 1 <= sample.measures["num_turns"] < 20


def test_no_turns_time_begins_before_there_is_an_engine() -> None:
    """Before each turn there is none for 0.5 s: turns stay within their 0.3 s, and episodes take what they take."""
    turns = ("<calculator>1+1</calculator>", 0.1, "well")
    sample = talk("calculator", Scripted(*turns, away=0.5), limits=EpisodeLimits(turn_timeout_s=0.3))
    assert (sample.finish_reason, sample.measures["num_turns"]) == ("stop", 2)
    sample = talk("calculator", Scripted(CALL, CALL, "well", away=0.5), limits=EpisodeLimits(episode_timeout_s=1.2))
    assert (sample.finish_reason, sample.measures["num_turns"]) == ("timeout", 2)


def test_a_tools_own_timeout_is_an_error_and_so_is_a_conversation_without_a_word() -> None:
    from megarl.environments.episode import within

    async def raises(episode, prompt):
        await episode.turn()
        raise TimeoutError("the tool's")

    with pytest.raises(TimeoutError, match="the tool's"):
        asyncio.run(within(NO_LIMITS, raises)(Scripted("x"), prompt()))
    with pytest.raises(ValueError, match=r"train.jsonl:7: a conversation ended without a token"):
        talk("calculator", Scripted(60.0), limits=EpisodeLimits(turn_timeout_s=0.1))


def test_tokens_that_were_tokenised_again_are_refused() -> None:
    """A conversation of the plain protocol that renders its history anew."""
    from megarl.environments.episode import within

    async def again(engine: AsyncEngine, asked: Prompt) -> Sample:
        transcript = Transcript(asked)
        transcript.wrote(await engine.generate(transcript.tokens, 10))
        rendered = encoded(TOKENIZER.decode(transcript.tokens).replace("x", "y"))
        await engine.generate(rendered, 10)
        return transcript.sample()

    async def other(engine: AsyncEngine, asked: Prompt) -> Sample:
        transcript = Transcript(asked)
        await engine.generate(transcript.tokens, 10)
        transcript.wrote(Completion([1, 2], [0.0, 0.0], "stop"))
        return transcript.sample()

    at = len(prompt().tokens)
    with pytest.raises(ValueError, match=f"differ from the transcript at position {at} "):
        asyncio.run(within(NO_LIMITS, again)(Scripted("x", "x"), prompt()))
    with pytest.raises(ValueError, match="has other tokens than were sampled"):
        asyncio.run(within(NO_LIMITS, other)(Scripted("x"), prompt()))


def test_a_single_turn_is_an_environment_too() -> None:
    sample = talk("single_turn", Scripted("4"))
    assert pieces(sample) == [("4<|im_end|>", True)] and sample.measures == {"num_turns": 1}


def test_many_conversations_wait_side_by_side() -> None:
    """A hundred, each with turns that take 0.2 s: not 40 s one after another."""

    async def all_of_them() -> list[Sample]:
        conversation = make("calculator", {"pattern": "(late)", "reply": "{result}"}, CHAT, EpisodeLimits(max_turns=2))
        return await asyncio.gather(*(conversation(Scripted(0.2, 0.2), prompt()) for _ in range(100)))

    started = time.monotonic()
    assert [sample.measures["num_turns"] for sample in asyncio.run(all_of_them())] == [2] * 100
    assert time.monotonic() - started < 10


def test_what_cannot_be_used_is_said_at_once() -> None:
    for name, args, said in (
        ("calculater", {}, "unknown environment 'calculater' .did you mean 'calculator'"),
        ("no.such:thing", {}, "importing it failed: No module named 'no'"),
        ("megarl.environments.grid:gird", {}, "has no 'gird'"),
        ("grid", {"max_step": 3}, "got an unexpected keyword argument 'max_step'"),
        ("search", {}, "missing a required argument: 'corpus'"),
    ):
        with pytest.raises(EnvironmentProblem, match=said):
            make(name, args, CHAT, NO_LIMITS)
    for name in ENVIRONMENTS:
        if name != "search":
            make(name, {}, CHAT, NO_LIMITS)


def test_the_reward_of_a_measure() -> None:
    assert measure_reward(["a", "b"], field="success", scale=2.0, success=[1.0, 0.0]) == [2.0, 0.0]
    assert measure_reward(["a", "b"], field="success", default=-1.0, success=[1.0, None]) == [1.0, -1.0]
    with pytest.raises(ValueError, match=r"no .success. .field. was measured; there are steps"):
        measure_reward(["a"], steps=[1])


def test_the_conversation_of_a_config() -> None:
    """One turn needs nothing of the chat template; several need one that takes an observation."""
    recipe = ["examples/agentic/cpu_calculator.yaml", "model.path=x", "data.path=y", "data.apply_chat_template=true"]
    refuses = byte_tokenizer("{{ raise_exception('no two in a row') }}")
    one = load(["examples/cpu_gsm8k.yaml", "data.path=x", "data.apply_chat_template=true"], check_model=False)
    assert conversation_of(one, refuses) is single_turn
    several = load(recipe, check_model=False)
    sample = asyncio.run(conversation_of(several, TOKENIZER)(Scripted("2+3=", "5"), prompt()))
    told = [text for text, wrote in pieces(sample) if not wrote]
    assert told == ["<|im_end|>" + BETWEEN.format("5 ")]  # a turn that the environment ended lacks its last token
    with pytest.raises(EnvironmentProblem, match=r"rollout.observation_role = 'user': the chat template refuses"):
        conversation_of(several, refuses)
