"""Prompts become tokens once: one template, one BOS, nothing cut, nothing guessed."""

from typing import Any

import pytest
import tiny
import torch
from architectures import BOS

from probes import HookedModel
from probes.prompts import Template, choose_template, pad, prompts_hash

TALK = [
    {"role": "user", "content": "w1 w2"},
    {"role": "assistant", "content": "w3"},
    {"role": "user", "content": "w4 w5"},
]


def template(tokenizer: Any, **options: Any) -> Template:
    given = {"template": None, "arguments": None, "max_length": None, **options}
    return choose_template(tokenizer, "a model", **given)


def decoded(tokenizer: Any, ids: Any) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(list(ids)))


def test_the_template_is_applied_once(tokenizer: Any) -> None:
    r = template(tokenizer).render("w1 w2")
    assert r.text == ("<|system|> you are helpful <|end|>\n<|user|> w1 w2 <|end|>\n<|assistant|> ")
    assert decoded(tokenizer, r.ids) == (
        "<|system|> you are helpful <|end|> <|user|> w1 w2 <|end|> <|assistant|>"
    )
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": "w1 w2"}], add_generation_prompt=True
    )["input_ids"]
    assert list(r.ids) == expected
    assert r.n_prompt == len(r.ids)
    assert r.text[slice(*r.content)] == "w1 w2"


def test_bos_is_never_doubled_by_a_template(bos_tokenizer: Any) -> None:
    r = template(bos_tokenizer).render("w1")
    assert r.text.startswith("<s><|system|>")
    assert r.ids.count(BOS) == 1
    assert r.ids[0] == BOS
    # the control: encoding that text the usual way doubles it
    assert bos_tokenizer(r.text)["input_ids"].count(BOS) == 2


def test_without_a_template_bos_is_added_once(bos_tokenizer: Any) -> None:
    plain = template(bos_tokenizer, template="none")
    for text in ("w1 w2", "<s> w1 w2", "<s>w1 w2"):
        r = plain.render(text)
        assert r.ids.count(BOS) == 1
        assert r.ids[0] == BOS
        assert r.text == text
        assert list(r.ids[1:]) == bos_tokenizer("w1 w2")["input_ids"][1:]
    with_answer = plain.render("w1 w2", "w3")
    assert with_answer.ids.count(BOS) == 1


def test_template_none_takes_strings_as_they_are(tokenizer: Any) -> None:
    r = template(tokenizer, template="none").render("w1 w2")
    assert r.text == "w1 w2"
    assert list(r.ids) == tokenizer("w1 w2")["input_ids"]
    assert r.content == (0, 5)


def test_no_template_is_a_sentence_that_names_both_ways_out() -> None:
    bare = tiny.tokenizer(template=None)
    with pytest.raises(ValueError, match="a model has no chat template") as caught:
        template(bare)
    assert "template='none'" in str(caught.value)
    assert "template=other.template.source" in str(caught.value)
    bare.chat_template = {"default": "{{ messages[0]['content'] }}", "tools": "x"}
    assert template(bare).render("w1").text == "w1"


def test_a_given_template_wins(tokenizer: Any) -> None:
    r = template(tokenizer, template="{{ messages[-1]['content'] }} ?").render("w1")
    assert r.text == "w1 ?"


def test_conversations(tokenizer: Any) -> None:
    chat = template(tokenizer)
    r = chat.render(TALK)
    assert r.text.count("<|system|>") == 1
    assert r.text.endswith("<|user|> w4 w5 <|end|>\n<|assistant|> ")
    assert r.text[slice(*r.content)] == "w4 w5"
    system = chat.render([{"role": "system", "content": "w9"}, *TALK])
    assert system.text.startswith("<|system|> w9 <|end|>")
    # a conversation that ends with the assistant asks for nothing more
    assert chat.render(TALK[:2]).text.endswith("<|assistant|> w3 <|end|>\n")
    assert chat.render([TALK[0]]).ids == chat.render("w1 w2").ids


@pytest.mark.parametrize(
    "request_text",
    ["user", "assistant", "a", "helpful", "w3", " w3 ", "end", "|", "you are helpful"],
)
def test_the_request_is_found_where_it_stands(tokenizer: Any, request_text: str) -> None:
    """Also when its words occur in the template, before or behind it."""
    chat = template(tokenizer)
    head = "<|system|> you are helpful <|end|>\n<|user|> "
    r = chat.render(request_text)
    start, stop = r.content
    assert start == len(head)
    assert r.text[start:stop] == request_text.strip()
    talk = [*TALK[:2], {"role": "user", "content": request_text}]
    r = chat.render([*talk, {"role": "assistant", "content": request_text}])
    start, stop = r.content
    assert r.text[:start].endswith("<|user|> ")
    assert r.text[stop:].startswith(" <|end|>\n<|assistant|> ")
    assert chat.render(request_text, "user user").content == chat.render(request_text).content


def test_an_empty_request_has_no_content(tokenizer: Any) -> None:
    start, stop = template(tokenizer).render("").content
    assert start == stop


def test_answers_are_encoded_apart(tokenizer: Any) -> None:
    chat = template(tokenizer)
    alone, both = chat.render("w1"), chat.render("w1", "w2 w3")
    assert both.ids[: both.n_prompt] == alone.ids
    assert both.n_prompt == len(alone.ids)
    assert decoded(tokenizer, both.ids[both.n_prompt :]) == "w2 w3"
    assert [both.text[a:b] for a, b in both.offsets[both.n_prompt :]] == ["w2", "w3"]
    assert both.key != alone.key
    plain = template(tokenizer, template="none")
    one, two = plain.render("w1", "w2 w3"), plain.render("w1 w2", "w3")
    assert one.ids == two.ids
    assert one.key != two.key  # their answers begin elsewhere


def test_arguments_reach_the_template_and_its_hash(tokenizer: Any) -> None:
    default = template(tokenizer)
    off = template(tokenizer, arguments={"enable_thinking": False})
    assert default.render("w1").text + "<think> </think> " == off.render("w1").text
    hashes = {
        default.hash,
        off.hash,
        template(tokenizer, arguments={"enable_thinking": True}).hash,
        template(tokenizer, template="none").hash,
        template(tokenizer, template=tiny.TEMPLATE + " ").hash,
    }
    assert len(hashes) == 5
    assert template(tokenizer, arguments={"enable_thinking": False}).hash == off.hash
    assert template(tokenizer, arguments={}).hash == default.hash


def test_too_long_is_an_error_never_a_cut(tokenizer: Any) -> None:
    chat = template(tokenizer, max_length=12)
    assert len(chat.render("w1 w2 w3 w4").ids) == 12
    with pytest.raises(ValueError, match="has 13 tokens, the model's context is 12: shorten it"):
        chat.render("w1 w2 w3 w4 w5")
    with pytest.raises(ValueError, match="has 14 tokens"):
        chat.render("w1 w2 w3 w4", "w5 w6")
    assert HookedModel(tiny.hooked().model, tokenizer).template.max_length == 128


def test_sets(tokenizer: Any) -> None:
    chat = template(tokenizer)
    with pytest.raises(ValueError, match="the prompt set is empty: give at least one prompt"):
        chat.render_all([])
    with pytest.raises(ValueError, match="1 answers for 2 prompts"):
        chat.render_all(["w1", "w2"], ["w3"])
    one, two = chat.render_all(["w1", "w2"])
    assert prompts_hash([one, two]) != prompts_hash([two, one])
    assert prompts_hash([one]) != prompts_hash([one, one])
    assert prompts_hash(chat.render_all(["w1", "w2"])) == prompts_hash([one, two])


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([], "a conversation is a list of"),
        ([{"role": "user"}], "{'role': ..., 'content': ...} messages"),
    ],
)
def test_what_is_no_prompt(tokenizer: Any, prompt: Any, said: str) -> None:
    with pytest.raises(ValueError, match="cannot read the prompt") as caught:
        template(tokenizer).render(prompt)
    assert said in str(caught.value)


def test_conversations_need_a_template(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="a conversation needs a chat template"):
        template(tokenizer, template="none").render(TALK)


def test_an_empty_prompt_without_template_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="the prompt '' has no tokens"):
        template(tokenizer, template="none").render("")


def test_what_a_template_refuses_is_one_sentence(tokenizer: Any) -> None:
    strict = template(tokenizer, template="{{ raise_exception('System role not supported') }}")
    with pytest.raises(ValueError, match="refuses a conversation of user: System role not supp"):
        strict.render("w1")


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side: str) -> None:
    batch = pad([[5, 6, 7], [8]], 0, side)
    assert batch.ids.tolist() == [[5, 6, 7], [0, 0, 8] if side == "left" else [8, 0, 0]]
    assert batch.mask.tolist() == [[1, 1, 1], [0, 0, 1] if side == "left" else [1, 0, 0]]
    real = batch.mask.bool()
    assert batch.positions[real].tolist() == [0, 1, 2, 0]


def test_the_tokenizer_is_left_as_it_was(tokenizer: Any) -> None:
    before = tokenizer.backend_tokenizer.to_str(), tokenizer.padding_side, tokenizer.chat_template
    chat = template(tokenizer)
    chat.render(TALK, "w1")
    template(tokenizer, template="none").render("w1")
    after = tokenizer.backend_tokenizer.to_str(), tokenizer.padding_side, tokenizer.chat_template
    assert before == after


def test_the_real_tokenizer(base: HookedModel) -> None:
    r = base.template.render("How do I bake bread?")
    assert r.text[slice(*r.content)] == "How do I bake bread?"
    own = base.tokenizer.apply_chat_template(
        [{"role": "user", "content": "How do I bake bread?"}], add_generation_prompt=True
    )["input_ids"]
    assert list(r.ids) == own
    assert base.tokenizer.decode([r.ids[i] for i in r.tokens_in(*r.content)]) == (
        "How do I bake bread?"
    )
    assert isinstance(base.batch([r]).ids, torch.Tensor)
