"""What follows a call, for every way in which templates write calls."""

from __future__ import annotations

import json
import re

import pytest

from tests.conftest import CHAT_TEMPLATE, build_tokenizer
from tests.data.test_tool_formats import TEMPLATES, TEXT_ARGUMENTS, tokenizer_of
from tests.rollouts.helpers import TEMPLATE, build_tool_tokenizer
from trl.data.tool_formats import add_response_schema, parse_response
from trl.rollouts.tool_templates import prepare_for_tools, tool_suffix


def tool_suffix_ids(*args, **kwargs):
    return tool_suffix(*args, **kwargs).ids


QUESTION = {"role": "user", "content": "the sky?"}
RESULT = {"role": "tool", "name": "get_weather", "content": "blue"}
# What ends a turn in the templates of the tests, where something does.
ENDS = {
    "fenced_json": "<｜end▁of▁sentence｜>",
    "separated_json": "<｜end▁of▁sentence｜>",
    "braced": "<turn|>",
    "channels": "<|call|>",
}


def call_message(name, text_arguments=False):
    arguments = {"city": "Rome"}
    function = {"name": "get_weather", "arguments": json.dumps(arguments) if text_arguments else arguments}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "weather01", "type": "function", "function": function}],
    }


def encode(tokenizer, messages, add_generation_prompt=False):
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "tagged_keys"])
def test_prompt_call_and_suffix_are_what_the_template_renders(name):
    tokenizer = add_response_schema(tokenizer_of(TEMPLATES[name]))
    eos = tokenizer.convert_tokens_to_ids(ENDS.get(name, "<|im_end|>"))
    call = call_message(name, name in TEXT_ARGUMENTS)
    asked = encode(tokenizer, [QUESTION, call])
    stream = asked[: len(asked) - asked[::-1].index(eos)]  # the policy stops at the end of its turn
    prompt = encode(tokenizer, [QUESTION], add_generation_prompt=True)
    begin = min(len(prompt), len(asked))
    parsed = parse_response(tokenizer, stream[begin:], prefix=stream[:begin])
    parsed = parsed if parsed.get("tool_calls") else call
    suffix = tool_suffix_ids(tokenizer, parsed, [RESULT], {eos}, last_id=stream[-1])
    expected = encode(tokenizer, [QUESTION, call, {**RESULT, "tool_call_id": "weather01"}], True)
    assert stream + suffix == expected
    assert "blue" in tokenizer.decode(suffix)


def test_a_turn_that_nothing_ends_hands_over_by_the_next_head():
    """The policy stops with the tool turn's head, which is sampled already; another stop is not taken for it."""
    tokenizer = add_response_schema(tokenizer_of(TEMPLATES["tagged_keys"]))
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|tool|>", "<|user|>", "<|assistant|>"]})
    tool_head, user_head = tokenizer.convert_tokens_to_ids(["<|tool|>", "<|user|>"])
    call = call_message("tagged_keys")
    asked = encode(tokenizer, [QUESTION, call])
    expected = encode(tokenizer, [QUESTION, call, RESULT], True)

    suffix = tool_suffix_ids(tokenizer, call, [RESULT], {tool_head, user_head}, last_id=tool_head)
    assert [*asked, tool_head, *suffix] == expected
    whole = tool_suffix_ids(tokenizer, call, [RESULT], {tool_head, user_head}, last_id=7)
    assert asked + whole == expected


def test_several_results_follow_in_order():
    tokenizer = build_tool_tokenizer()
    call = call_message("tagged_json")
    call["tool_calls"] *= 2
    suffix = tool_suffix_ids(tokenizer, call, [RESULT, {**RESULT, "content": "green"}], {tokenizer.eos_token_id})
    assert re.findall("blue|green|assistant", tokenizer.decode(suffix)) == ["blue", "green", "assistant"]


def test_a_template_that_demands_ids_gets_them():
    """Models that write no ids into their calls have none in their messages either."""
    demanding = TEMPLATE.replace(
        "{% if m.role == 'tool' %}",
        "{% if m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}{{ raise_exception('id!') }}{% endif %}",
    )
    tokenizer = tokenizer_of(demanding)
    call = call_message("tagged_json")
    del call["tool_calls"][0]["id"]
    assert tool_suffix_ids(tokenizer, call, [RESULT], {tokenizer.eos_token_id})
    assert "id" not in call["tool_calls"][0]


class TestPrefixes:
    # Writes a call in another way as soon as its result follows.
    REWRITING = TEMPLATE.replace(
        "{{ m.content }}",
        "{% if loop.nextitem is defined and loop.nextitem.role == 'tool' %}{{ '.' }}{% endif %}{{ m.content }}",
    )

    def test_a_template_that_rewrites_the_call_is_refused(self):
        tokenizer = tokenizer_of(self.REWRITING)
        with pytest.raises(ValueError, match="renders a tool call in another way once its result follows"):
            tool_suffix_ids(tokenizer, call_message("tagged_json"), [RESULT], {tokenizer.eos_token_id})

    def test_preparing_derives_one_that_does_not(self):
        tokenizer = tokenizer_of(self.REWRITING)
        template = prepare_for_tools(tokenizer)
        assert template is not None
        eos = {tokenizer.eos_token_id}
        suffix = tool_suffix_ids(tokenizer, call_message("tagged_json"), [RESULT], eos, chat_template=template)
        assert "blue" in tokenizer.decode(suffix)
        assert tokenizer.chat_template == self.REWRITING

    def test_a_good_template_is_kept(self):
        tokenizer = tokenizer_of(TEMPLATE)
        assert prepare_for_tools(tokenizer) is None
        assert tokenizer.response_template is not None


def test_a_template_without_tools_is_refused():
    with pytest.raises(ValueError, match="loses the tool's name"):
        prepare_for_tools(build_tokenizer(CHAT_TEMPLATE))


def test_a_schema_of_old_is_replaced_with_a_warning():
    tokenizer = tokenizer_of(TEMPLATE)
    tokenizer.response_schema = {"type": "object"}
    with pytest.warns(FutureWarning, match="response_schema"):
        prepare_for_tools(tokenizer)
    assert tokenizer.response_template is not None
