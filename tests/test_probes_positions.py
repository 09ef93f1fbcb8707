"""Position rules pick the tokens their names say."""

from typing import Any

import pytest
from tiny import tokenizer

from probes.positions import Positions, parse
from probes.prompts import Rendered, Template, choose_template


def chat(**arguments: Any) -> Template:
    return choose_template(tokenizer(), "a model", None, arguments, None)


def chosen(rule: str | Positions, r: Rendered) -> str:
    tokens = tokenizer().convert_ids_to_tokens(list(r.ids))
    return " ".join(tokens[i] for i in parse(rule).indices(r))


PLAIN = chat().render("w1 w2 . w3")
ANSWERED = chat().render("w1 w2", "w3 w4")
THOUGHT = chat().render("w1", "<think> w2 w3 </think> w4 w5")
ENDLESS = chat().render("w1", "<think> w2 w3")
TALK = chat().render(
    [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2"},
        {"role": "user", "content": "w3 w4"},
    ]
)


@pytest.mark.parametrize(
    ("rule", "r", "tokens"),
    [
        ("last", PLAIN, "<|assistant|>"),
        ("last", ANSWERED, "<|assistant|>"),  # of the prompt, not of the answer
        (
            "all",
            ANSWERED,
            "<|system|> you are helpful <|end|> <|user|> w1 w2 <|end|> <|assistant|> w3 w4",
        ),
        ("content", PLAIN, "w1 w2 . w3"),
        ("content", ANSWERED, "w1 w2"),
        ("content", TALK, "w3 w4"),
        ("instruction_end", PLAIN, "<|end|> <|assistant|>"),
        ("instruction_end", ANSWERED, "<|end|> <|assistant|>"),
        ("generated", ANSWERED, "w3 w4"),
        ("after:w1", PLAIN, "w2"),
        ("after:w2 .", PLAIN, "w3"),
        ("after:<|end|>", PLAIN, "<|assistant|>"),  # the last occurrence
        ("after::", chat().render("w1 : w2"), "w2"),
        ("thinking", THOUGHT, "w2 w3"),
        ("after_thinking", THOUGHT, "w4 w5"),
        ("thinking", ENDLESS, "w2 w3"),
        ("tokens:0:2", PLAIN, "<|system|> you"),
        ("tokens:-2:", PLAIN, "<|end|> <|assistant|>"),
        ("tokens::1", PLAIN, "<|system|>"),
        ("tokens:-1:", ANSWERED, "w4"),
    ],
)
def test_rules(rule: str, r: Rendered, tokens: str) -> None:
    assert chosen(rule, r) == tokens
    assert chosen(f"mean:{rule}", r) == tokens
    assert parse(f"mean:{rule}").mean
    assert not parse(rule).mean
    assert parse(rule).text == rule


def test_an_empty_think_span_of_the_template_has_no_tokens() -> None:
    r = chat(enable_thinking=False).render("w1", "w2")
    with pytest.raises(ValueError, match="'thinking' picks no token"):
        parse("thinking").indices(r)
    assert chosen("after_thinking", r) == "w2"


@pytest.mark.parametrize(
    ("rule", "r"),
    [
        ("generated", PLAIN),
        ("after:w9", PLAIN),
        ("after:<|assistant|> ", PLAIN),
        ("thinking", PLAIN),
        ("after_thinking", ENDLESS),
        ("tokens:50:", PLAIN),
        ("content", chat().render("")),
    ],
)
def test_a_rule_that_picks_nothing_is_an_error(rule: str, r: Rendered) -> None:
    with pytest.raises(
        ValueError, match=rf"position '{rule}' picks no token of the prompt".replace("|", "\\|")
    ):
        parse(rule).indices(r)


@pytest.mark.parametrize(
    "rule", ["", "first", "mean:", "mean", "after:", "tokens:", "tokens:1", "tokens:a:b", "LAST"]
)
def test_unknown_rules(rule: str) -> None:
    with pytest.raises(ValueError, match="unknown position .*: choose one of last, all, content"):
        parse(rule)


def test_a_rule_of_ones_own() -> None:
    rule = Positions("every second", lambda r: [*range(0, len(r.ids), 2), 0])
    assert parse(rule) is rule
    assert rule.indices(PLAIN) == [0, 2, 4, 6, 8, 10]
    with pytest.raises(ValueError, match="picks token 99, but the prompt .* has 12 tokens"):
        Positions("far", lambda r: [99]).indices(PLAIN)


class Slow:
    """A tokenizer that cannot say which characters a token covers."""

    is_fast = False
    bos_token = "<s>"

    def __init__(self) -> None:
        self.inner = tokenizer()

    def __call__(self, text: str, return_offsets_mapping: bool, **options: Any) -> Any:
        assert not return_offsets_mapping, "slow tokenizers raise here"
        return {"input_ids": self.inner(text, **options)["input_ids"]}

    def apply_chat_template(self, *args: Any, **options: Any) -> Any:
        return self.inner.apply_chat_template(*args, **options)


def test_without_offsets_only_counting_rules_work() -> None:
    source = tokenizer().chat_template
    r = Template(Slow(), source).render("w1 w2", "w3")
    assert r.ids == chat().render("w1 w2", "w3").ids
    for rule in ("last", "all", "generated", "tokens:0:3"):
        assert chosen(rule, r) == chosen(rule, chat().render("w1 w2", "w3"))
    for rule in ("content", "instruction_end", "after:w1"):
        with pytest.raises(ValueError, match="does not say which characters a token covers"):
            parse(rule).indices(r)


def test_special_tokens_without_characters_are_no_text() -> None:
    added = choose_template(tokenizer(bos=True), "a model", "none", None, None).render("w1 w2")
    assert added.offsets[0] == (0, 0)
    assert chosen("content", added) == "w1 w2"
    between = Rendered("w1 w2", (5, 6, 7), ((0, 2), (2, 2), (3, 5)), 3, (0, 5))
    assert between.tokens_in(0, 5) == [0, 2]
