"""Reading back what chat templates write: small templates of our own, one for every way of writing a call.

With `TRL_TEST_CHAT_TEMPLATES=<folder>` the same round trips run on every `*.jinja` file of that folder.
"""

from __future__ import annotations

import json
import os
import re
from copy import deepcopy
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError

from tests.conftest import build_tokenizer
from trl.data.templating import common_prefix_length
from trl.data.tool_formats import (
    add_response_schema,
    derive_response_template,
    parse_response,
    supports_tool_calling,
)
from trl.data.tool_syntaxes import TOOL_CALL_SYNTAXES, parse_pythonic_calls

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "celsius": {"type": "boolean"},
                "scale": {"type": "number"},
                "hours": {"type": "array", "items": {"type": "integer"}},
                "code": {"type": "string"},
            },
        },
    },
}
ARGUMENTS = {"city": 'Köln, "Deutz"\nHafen', "days": 3, "celsius": True, "scale": 0.5, "hours": [6, 12], "code": "7"}


def chat(
    call: str,
    thinking: str | None = "reasoning_content",
    head: str = "<|im_start|>{role}\n",
    end: str = "<|im_end|>",
    prompt: str | None = None,
    between: str = "\n",
    think: tuple[str, str] = ("<think>\n", "\n</think>\n\n"),
) -> str:
    """A chat template that writes a call as `call` does, with `name` and `arguments` at hand."""
    opening = _literal_head(head, "m.role")
    reasoning = ""
    if thinking is not None:
        reasoning = (
            f"{{% if m.{thinking} is defined and m.{thinking} %}}{{{{ {think[0]!r} ~ m.{thinking} ~ {think[1]!r} }}}}"
            "{% endif %}"
        )
    return (
        "{% for m in messages %}" + opening + "{% if m.role == 'tool' %}{{ '<tool_response>' ~ m.content ~ "
        "'</tool_response>' }}{% else %}" + reasoning + "{{ m.content }}{% endif %}"
        "{% for c in m.tool_calls or [] %}{% set name = c.function.name %}{% set arguments = c.function.arguments %}"
        f"{{% if m.content or not loop.first %}}{{{{ {between!r} }}}}{{% endif %}}{call}{{% endfor %}}"
        f"{{{{ {end!r} ~ '\\n' }}}}{{% endfor %}}{{% if add_generation_prompt %}}"
        + (_literal_head(head, "'assistant'") if prompt is None else f"{{{{ {prompt!r} }}}}")
        + "{% endif %}"
    )


def _literal_head(head: str, role: str) -> str:
    before, after = head.split("{role}")
    return f"{{{{ {before!r} ~ {role} ~ {after!r} }}}}"


PARAMETERS = (
    "{% for k, v in arguments.items() %}{{ '<parameter=' ~ k ~ '>\n' ~ (v if v is string else (v | tojson if v is "
    "sequence or v is mapping else v | string)) ~ '\n</parameter>\n' }}{% endfor %}"
)
BRACED_VALUES = (
    "{% macro value(v) %}{% if v is string %}{{ '<|\"|>' ~ v ~ '<|\"|>' }}{% else %}{{ v | tojson }}{% endif %}"
    "{% endmacro %}"
)
TEMPLATES = {
    "tagged_json": chat(
        "{{ '<tool_call>\n{\"name\": \"' ~ name ~ '\", \"arguments\": ' ~ (arguments | tojson) ~ '}\n</tool_call>' }}",
        prompt="<|im_start|>assistant\n<think>\n",
    ),
    "tagged_json_parameters": chat(
        "{{ '<tool_call>{\"name\": \"' ~ name ~ '\", \"parameters\": ' ~ (arguments | tojson) ~ '}</tool_call>' }}"
    ),
    "tagged_function": chat(
        "{{ '<tool_call>\n<function=' ~ name ~ '>\n' }}" + PARAMETERS + "{{ '</function>\n</tool_call>' }}"
    ),
    "tagged_keys": chat(
        "{{ '<tool_call>' ~ name ~ '\n' }}{% for k, v in arguments.items() %}{{ '<arg_key>' ~ k ~ '</arg_key>\n"
        "<arg_value>' ~ (v if v is string else v | tojson(ensure_ascii=False)) ~ '</arg_value>\n' }}{% endfor %}"
        "{{ '</tool_call>' }}",
        head="<|{role}|>\n",
        end="",
    ),
    # This one concatenates, as its family does: arguments must be JSON text.
    "fenced_json": chat(
        "{{ '<｜tool▁calls▁begin｜>' if loop.first else '' }}{{ '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + name + "
        "'\n```json\n' + arguments + '\n```<｜tool▁call▁end｜>' }}{{ '<｜tool▁calls▁end｜>' if loop.last else '' }}",
        head="<｜{role}｜>",
        end="<｜end▁of▁sentence｜>",
    ),
    "separated_json": chat(
        "{{ '<｜tool▁calls▁begin｜>' if loop.first else '' }}{{ '<｜tool▁call▁begin｜>' + name + '<｜tool▁sep｜>' ~ "
        "(arguments | tojson) ~ '<｜tool▁call▁end｜>' }}{{ '<｜tool▁calls▁end｜>' if loop.last else '' }}",
        head="<｜{role}｜>",
        end="<｜end▁of▁sentence｜>",
        between="",
    ),
    "braced": BRACED_VALUES
    + chat(
        "{{ '<|tool_call>call:' ~ name ~ '{' }}{% for k, v in arguments.items() %}{{ ',' if not loop.first else '' }}"
        "{{ k ~ ':' ~ value(v) }}{% endfor %}{{ '}<tool_call|>' }}",
        thinking="reasoning",
        head="<|turn>{role}\n",
        end="<turn|>",
        think=("<|channel>thought\n", "\n<channel|>"),
    ),
    "pythonic": chat(
        "{{ '<|tool_call_start|>[' if loop.first else ', ' }}{{ name ~ '(' }}{% for k, v in arguments.items() %}"
        "{{ ', ' if not loop.first else '' }}{{ k ~ '=' ~ (v | tojson if v is string else v | string) }}{% endfor %}"
        "{{ ')' }}{{ ']<|tool_call_end|>' if loop.last else '' }}",
        thinking="thinking",
        between="",
    ),
    "listed_json": chat(
        "{{ '[TOOL_CALLS][' if loop.first else ', ' }}{{ '{\"name\": \"' ~ name ~ '\", \"arguments\": ' ~ "
        "(arguments | tojson) ~ '}' }}{{ ']' if loop.last else '' }}",
        thinking=None,
        between="",
    ),
    "named_json": chat("{{ '[TOOL_CALLS]' ~ name ~ '[ARGS]' ~ (arguments | tojson) }}", thinking=None, between=""),
    "channels": (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% if m.thinking %}{{ '<|start|>assistant<|channel|>analysis<|message|>' ~ m.thinking ~ '<|end|>' }}{% endif %}"
        "{% if m.tool_calls %}{% set f = m.tool_calls[0].function %}{{ '<|start|>assistant to=functions.' ~ f.name ~ "
        "'<|channel|>commentary json<|message|>' ~ (f.arguments | tojson) ~ '<|call|>' }}"
        "{% else %}{{ '<|start|>assistant<|channel|>final<|message|>' ~ m.content ~ '<|return|>' }}{% endif %}"
        "{% else %}{{ '<|start|>' ~ m.role ~ '<|message|>' ~ m.content ~ '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
    ),
    "bare_json_parameters": chat(
        "{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
        "{{ '{\"name\": \"' ~ name ~ '\", \"parameters\": ' ~ (arguments | tojson) ~ '}' }}",
        thinking=None,
    ),
    "bare_json": chat(
        "{{ '{\"name\": \"' ~ name ~ '\", \"arguments\": ' ~ (arguments | tojson) ~ '}' }}", thinking=None, between=""
    ),
}
SINGLE_CALL = {"channels", "bare_json_parameters", "bare_json"}
TEXT_ARGUMENTS = {"fenced_json"}

_folder = os.environ.get("TRL_TEST_CHAT_TEMPLATES")
VENDORS = {path.stem: path.read_text() for path in sorted(Path(_folder).glob("*.jinja"))} if _folder else {}


def tokenizer_of(template: str):
    tokenizer = build_tokenizer(template)
    marks = re.findall(r"<\|[^|<>\s]+\|>|<\|[a-z_]+>|<[a-z_]+\|>|</?[a-z_]+>|<｜[^｜]+｜>", template)
    tokenizer.add_special_tokens({"extra_special_tokens": sorted(set(marks))})
    return tokenizer


def call(arguments, name: str = "get_weather") -> dict:
    return {"id": "weather01", "type": "function", "function": {"name": name, "arguments": arguments}}


def answer(tokenizer, message: dict, text_arguments: bool = False) -> tuple[list[int], list[int]]:
    """The tokens of the prompt and of an assistant message, cut where the template lets the assistant begin."""
    message = deepcopy(message)
    for one in message.get("tool_calls", []) if text_arguments else []:
        one["function"]["arguments"] = json.dumps(one["function"]["arguments"])
    user = {"role": "user", "content": "hello"}
    text = tokenizer.apply_chat_template([user, message], tokenize=False)
    prompt = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    # In common only, where the prompt opens reasoning that this message does not have.
    start = common_prefix_length(ids, prompt_ids)
    return ids[:start], ids[start:]


def calls_of(message: dict) -> list[tuple]:
    return [(one["function"]["name"], one["function"]["arguments"]) for one in message.get("tool_calls", [])]


@pytest.fixture(scope="module", params=TEMPLATES)
def case(request):
    name = request.param
    return name, add_response_schema(tokenizer_of(TEMPLATES[name]))


def test_every_syntax_has_a_template_and_is_recognised():
    assert set(TEMPLATES) == set(TOOL_CALL_SYNTAXES)
    for syntax, template in TEMPLATES.items():
        found = derive_response_template(tokenizer_of(template))["fields"]["tool_calls"]
        expected = TOOL_CALL_SYNTAXES[syntax]
        assert {key: found[key] for key in expected} == expected, syntax


def test_one_call_reads_back(case):
    name, tokenizer = case
    message = {"role": "assistant", "content": "", "tool_calls": [call(ARGUMENTS)]}
    prompt, ids = answer(tokenizer, message, name in TEXT_ARGUMENTS)
    parsed = parse_response(tokenizer, ids, prefix=prompt, tools=[TOOL])
    expected = [{"type": "function", "function": {"name": "get_weather", "arguments": ARGUMENTS}}]
    assert parsed == {"role": "assistant", "content": "", "tool_calls": expected}


def test_calls_between_words_and_reasoning_read_back(case):
    name, tokenizer = case
    fields = tokenizer.response_template["fields"]
    message = {"role": "assistant", "content": "", "tool_calls": [call({"city": "Rome"})]}
    if name not in SINGLE_CALL:
        message["tool_calls"] += [call({}, "get_time"), call({"days": 2})]
        message["content"] = "let me see,\nok"
    field = next(iter(fields.keys() - {"content", "tool_calls"}), None)
    if field is not None:
        message[field] = "the sky is blue"
    prompt, ids = answer(tokenizer, message, name in TEXT_ARGUMENTS)
    parsed = parse_response(tokenizer, ids, prefix=prompt, tools=[TOOL])
    assert calls_of(parsed) == calls_of(message)
    assert parsed["content"] == message["content"]
    if field is not None:
        assert parsed[field] == "the sky is blue"


def test_an_answer_without_calls_is_its_text(case):
    _, tokenizer = case
    prompt, ids = answer(tokenizer, {"role": "assistant", "content": "beautiful is better\n\nthan {ugly}"})
    parsed = parse_response(tokenizer, ids, prefix=prompt)
    assert parsed == {"role": "assistant", "content": "beautiful is better\n\nthan {ugly}"}


def test_a_call_that_was_cut_off_becomes_text(case):
    name, tokenizer = case
    message = {"role": "assistant", "content": "", "tool_calls": [call({"city": "Rome", "days": 3})]}
    prompt, ids = answer(tokenizer, message, name in TEXT_ARGUMENTS)
    text = tokenizer.decode(ids)
    ids = tokenizer(text[: text.index("days")], add_special_tokens=False)["input_ids"]
    parsed = parse_response(tokenizer, ids, prefix=prompt)
    assert parsed == {"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)}
    assert "Rome" in parsed["content"]


def test_calls_of_the_prompt_are_not_the_answers(case):
    name, tokenizer = case
    arguments = {"city": "Rome"}
    history = [
        {"role": "user", "content": "hello"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [call(json.dumps(arguments) if name in TEXT_ARGUMENTS else arguments)],
        },
        {"role": "tool", "name": "get_weather", "tool_call_id": "weather01", "content": "blue"},
    ]
    prompt = tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=True)
    if "<think>" in prompt:
        prompt = prompt.removesuffix("<think>\n")
    final = "<|channel|>final<|message|>the sky" if name == "channels" else "the sky"
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    assert parse_response(tokenizer, encode(final), prefix=encode(prompt)) == {
        "role": "assistant",
        "content": "the sky",
    }


@pytest.mark.parametrize("name", ["braced", "fenced_json"])
def test_a_turn_that_goes_on_after_a_result_starts_there(name):
    template = TEMPLATES[name].replace(
        "{% if add_generation_prompt %}", "{% if add_generation_prompt and messages[-1].role != 'tool' %}"
    )
    tokenizer = add_response_schema(tokenizer_of(template))
    assert len(tokenizer.response_template["start_anchor"]) == 2
    asked = call('{"city": "Rome"}' if name in TEXT_ARGUMENTS else {"city": "Rome"})
    history = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "", "tool_calls": [asked]},
        {"role": "tool", "name": "get_weather", "content": "blue"},
    ]
    prompt = tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=True)
    parsed = parse_response(tokenizer, tokenizer("the sky")["input_ids"], prefix=tokenizer(prompt)["input_ids"])
    assert parsed == {"role": "assistant", "content": "the sky"}


def test_reasoning_that_the_prompt_opened_needs_the_prefix():
    tokenizer = add_response_schema(tokenizer_of(TEMPLATES["tagged_json"]))
    prompt = tokenizer("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n<think>\n")["input_ids"]
    ids = tokenizer("the sea is deep\n</think>\n\n42.<|im_end|>")["input_ids"]
    parsed = parse_response(tokenizer, ids, prefix=prompt)
    assert parsed == {"role": "assistant", "reasoning_content": "the sea is deep", "content": "42."}


def test_arguments_are_typed_by_the_tool_or_else_by_json():
    tokenizer = add_response_schema(tokenizer_of(TEMPLATES["tagged_keys"]))
    text = (
        "<tool_call>get_weather\n<arg_key>code</arg_key>\n<arg_value>7</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>"
    )
    ids = tokenizer(text)["input_ids"]
    assert calls_of(parse_response(tokenizer, ids, tools=[TOOL])) == [("get_weather", {"code": "7", "days": 3})]
    assert calls_of(parse_response(tokenizer, ids)) == [("get_weather", {"code": 7, "days": 3})]


def test_a_call_without_arguments_gets_empty_ones_and_one_without_a_name_is_text():
    tokenizer = add_response_schema(tokenizer_of(TEMPLATES["tagged_json"]))
    nameless, bare = (
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "get_time"}</tool_call><|im_end|>',
    )
    assert calls_of(parse_response(tokenizer, tokenizer(bare)["input_ids"])) == [("get_time", {})]
    assert parse_response(tokenizer, tokenizer(nameless)["input_ids"]) == {
        "role": "assistant",
        "content": '{"arguments": {}}',
    }


def test_end_marks_are_not_content():
    template = TEMPLATES["tagged_json"] + "{{ '<|endoftext|>' if not add_generation_prompt }}"
    tokenizer = add_response_schema(tokenizer_of(template))
    for eos in ("<|im_end|>", "<|endoftext|>"):
        tokenizer.eos_token = eos
        for end in ("", "<|im_end|>", "<|im_end|><|endoftext|>", "<|im_end|><|im_end|>"):
            assert parse_response(tokenizer, tokenizer("42." + end)["input_ids"])["content"] == "42.", (eos, end)


def test_json_that_is_no_call_stays_text_where_calls_are_bare_json():
    tokenizer = add_response_schema(tokenizer_of(TEMPLATES["bare_json_parameters"]))
    for text in ('{"name": "Bob"}', 'the name: {"name": "Bob", "parameters": {}}', "{"):
        assert parse_response(tokenizer, tokenizer(text)["input_ids"]) == {"role": "assistant", "content": text}


def test_channels_as_the_model_writes_them():
    tokenizer = add_response_schema(tokenizer_of(TEMPLATES["channels"] + "{# <|constrain|> #}"))
    text = (
        "<|channel|>analysis<|message|>hello<|end|><|start|>assistant<|channel|>commentary<|message|>let me see<|end|>"
        '<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"days": 2}<|call|>'
    )
    prefix = tokenizer("<|start|>user<|message|>hello<|end|><|start|>assistant")["input_ids"]
    parsed = parse_response(tokenizer, tokenizer(text)["input_ids"], prefix=prefix)
    assert (parsed["thinking"], parsed["content"]) == ("hello", "let me see")
    assert calls_of(parsed) == [("get_weather", {"days": 2})]
    unmarked = parse_response(tokenizer, tokenizer("42.")["input_ids"], prefix=prefix)
    assert unmarked == {"role": "assistant", "content": "42."}


def test_the_template_is_saved_with_the_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = add_response_schema(tokenizer_of(TEMPLATES["tagged_function"]))
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.response_template == tokenizer.response_template
    prompt, ids = answer(loaded, {"role": "assistant", "content": "", "tool_calls": [call({"days": 2})]})
    assert loaded.parse_response(ids, prefix=prompt)["tool_calls"][0]["function"] == {
        "name": "get_weather",
        "arguments": {"days": 2},
    }


def test_a_processor_passes_it_on_to_its_tokenizer():
    class Processor:
        def __init__(self, tokenizer):
            self.tokenizer, self.chat_template = tokenizer, tokenizer.chat_template

    processor = Processor(tokenizer_of(TEMPLATES["tagged_json"]))
    assert add_response_schema(processor) is processor
    assert processor.tokenizer.response_template["fields"].keys() == {"content", "tool_calls", "reasoning_content"}


def test_of_several_templates_the_one_for_tools_counts():
    tokenizer = tokenizer_of(TEMPLATES["tagged_json"])
    tokenizer.chat_template = {"default": build_tokenizer().chat_template, "tool_use": TEMPLATES["tagged_json"]}
    assert supports_tool_calling(tokenizer)
    add_response_schema(tokenizer)


def test_templates_that_write_no_calls(tokenizer):
    assert not supports_tool_calling(tokenizer)
    with pytest.raises(ValueError, match="does not write tool calls"):
        add_response_schema(tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no tools') }}"
    assert not supports_tool_calling(tokenizer)
    tokenizer.chat_template = None
    assert not supports_tool_calling(tokenizer)
    with pytest.raises(ValueError, match="no chat template"):
        add_response_schema(tokenizer)


@pytest.mark.parametrize("lost", ["c.function.name", "c.function.arguments", "m.content"])
def test_a_template_that_loses_a_part_does_not_support_tools(tokenizer, lost):
    call_text = "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
    whole = "{% for m in messages %}{{ m.role ~ m.content }}" + call_text + "{% endfor %}"
    tokenizer.chat_template = whole
    assert supports_tool_calling(tokenizer)
    without = whole.replace(lost, "'' if m.role != 'user' else m.content") if lost == "m.content" else None
    tokenizer.chat_template = without or whole.replace(lost, "''")
    assert not supports_tool_calling(tokenizer)


def test_an_unknown_syntax_is_shown(tokenizer):
    tokenizer.chat_template = chat("{{ 'CALL ' ~ name ~ ' WITH ' ~ (arguments | tojson) }}")
    with pytest.raises(ValueError, match="CALL probe_function WITH"):
        add_response_schema(tokenizer)


def test_parsing_needs_a_response_template(tokenizer):
    with pytest.raises(AttributeError, match="add_response_schema"):
        parse_response(tokenizer, [1, 2])


def test_pythonic_calls_read_literals_and_nothing_else():
    text = "ok <|tool_call_start|>[a.b(x='it\\'s', y=None, z=[True, {'k': 1}]), c(d={\"e\": true})]<|tool_call_end|>"
    functions = [one["function"] for one in parse_pythonic_calls(text)]
    assert functions == [
        {"name": "a.b", "arguments": {"x": "it's", "y": None, "z": [True, {"k": 1}]}},
        {"name": "c", "arguments": {"d": {"e": True}}},
    ]
    for bad in ("[f(1)]", "[f(x=g())]", "[f(x='it's')]", "[1]", "["):
        assert parse_pythonic_calls(f"<|tool_call_start|>{bad}<|tool_call_end|>") is None


def test_pythonic_values_keep_their_types_without_the_tools():
    tokenizer = add_response_schema(tokenizer_of(TEMPLATES["pythonic"]))
    text = "<|tool_call_start|>[f(a=True, b=None, c='7', d='it\\'s', e=[1, 'x'])]<|tool_call_end|><|im_end|>"
    parsed = parse_response(tokenizer, tokenizer(text)["input_ids"])
    assert calls_of(parsed) == [("f", {"a": True, "b": None, "c": "7", "d": "it's", "e": [1, "x"]})]


def test_pythonic_text_that_is_not_python_is_still_read():
    tokenizer = add_response_schema(tokenizer_of(TEMPLATES["pythonic"]))
    text = "<|tool_call_start|>[f(x=12, y=one two), g(z='deep, blue')]<|tool_call_end|><|im_end|>"
    parsed = parse_response(tokenizer, tokenizer(text)["input_ids"])
    assert calls_of(parsed) == [("f", {"x": 12, "y": "one two"}), ("g", {"z": "deep, blue"})]


@pytest.fixture(scope="module")
def tagged_json():
    return add_response_schema(tokenizer_of(TEMPLATES["tagged_json"]))


@settings(max_examples=60, deadline=None)
@given(
    arguments=st.dictionaries(
        st.text(min_size=1, max_size=5),
        st.recursive(
            st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=8),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
            max_leaves=5,
        ),
        max_size=4,
    )
)
def test_any_json_arguments_read_back(tagged_json, arguments):
    message = {"role": "assistant", "content": "ok", "tool_calls": [call(arguments)]}
    prompt, ids = answer(tagged_json, message)
    parsed = parse_response(tagged_json, ids, prefix=prompt)
    assert (parsed["content"], calls_of(parsed)) == ("ok", [("get_weather", arguments)])


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 260), max_size=40))
def test_any_tokens_give_a_message(tagged_json, ids):
    parsed = parse_response(tagged_json, ids)
    assert parsed["role"] == "assistant"
    assert isinstance(parsed["content"], str)


@pytest.mark.skipif(not VENDORS, reason="set TRL_TEST_CHAT_TEMPLATES to a folder of chat templates")
@pytest.mark.parametrize("vendor", VENDORS)
def test_round_trip_on_published_templates(vendor):
    tokenizer = tokenizer_of(VENDORS[vendor])
    if not supports_tool_calling(tokenizer):
        with pytest.raises(ValueError):
            add_response_schema(tokenizer)
        pytest.skip("writes no tool calls")
    fields = add_response_schema(tokenizer).response_template["fields"]
    simple = {"city": "Rome", "days": 3}
    text_arguments = "'function']['arguments'] + " in VENDORS[vendor]
    # What the arguments hold is harder where a template escapes it: quotes end strings that are not escaped.
    full = simple if fields["tool_calls"]["open_pattern"].find("tool_call_start") >= 0 else ARGUMENTS
    for arguments in (simple, full, {}):
        message = {"role": "assistant", "content": "", "tool_calls": [call(arguments)]}
        prompt, ids = answer(tokenizer, message, text_arguments)
        parsed = parse_response(tokenizer, ids, prefix=prompt, tools=[TOOL])
        assert calls_of(parsed) == [("get_weather", arguments)]
        assert parsed["content"] == ""
    several = {"role": "assistant", "content": "ok:", "tool_calls": [call(simple), call({"days": 1}, "get_time")]}
    try:
        prompt, ids = answer(tokenizer, several, text_arguments)
    except TemplateError:
        pass  # one call at a time
    else:
        parsed = parse_response(tokenizer, ids, prefix=prompt, tools=[TOOL])
        if "get_time" in tokenizer.decode(ids):
            assert [name for name, _ in calls_of(parsed)] == ["get_weather", "get_time"]
            assert parsed["content"] == "ok:"
    field = next(iter(fields.keys() - {"content", "tool_calls"}), None)
    message = {"role": "assistant", "content": "beautiful", **({field: "the sky"} if field else {})}
    prompt, ids = answer(tokenizer, message)
    parsed = parse_response(tokenizer, ids, prefix=prompt)
    assert parsed["content"] == "beautiful"
    if field and "the sky" in tokenizer.decode(ids):
        assert parsed[field] == "the sky"
