"""The public path of the chat template functions."""

from __future__ import annotations

import subprocess
import sys

import pytest

import trl
from trl import chat_template_utils
from trl.data import tool_formats


def test_the_functions_are_those_of_their_rooms():
    for name in ("add_response_schema", "parse_response", "supports_tool_calling"):
        assert getattr(chat_template_utils, name) is getattr(tool_formats, name)
    assert trl.add_response_schema is tool_formats.add_response_schema
    assert chat_template_utils._SUPPORTS_RESPONSE_TEMPLATE is True


@pytest.mark.parametrize(
    "name",
    [
        "clone_chat_template",
        "get_training_chat_template",
        "has_generation_markers",
        "is_chat_template_prefix_preserving",
        "is_chat_template_stop_token_trained",
        "tokenize_conversation",
    ],
)
def test_every_public_function_resolves(name):
    assert callable(getattr(chat_template_utils, name))
    assert name in dir(chat_template_utils)


def test_the_import_is_light():
    code = "import sys, trl.chat_template_utils; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


ANSWERS = {
    "deepseek_r1_distill_template": (
        "<think>\nhm\n</think>\n\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n"
        '{"x": 1}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>'
    ),
    "gemma4_template": "<|channel>thought\nhm\n<channel|><|tool_call>call:f{x:1}<tool_call|><turn|>",
    "glm4moe_template": (
        "<think>hm</think>\n<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>1</arg_value>\n</tool_call>"
    ),
    "gptoss_template": (
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant to=functions.f<|channel|>commentary json<|message|>"
        '{"x": 1}<|call|>'
    ),
    "lfm2_2_5_template": "<think>hm</think><|tool_call_start|>[f(x=1)]<|tool_call_end|><|im_end|>",
    "llama3_template": '{"name": "f", "parameters": {"x": 1}}<|eot_id|>',
    "nemotron_3_template": (
        "<think>\nhm\n</think>\n<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>"
    ),
    "qwen3_5_template": (
        "<think>\nhm\n</think>\n\n<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n"
        "</tool_call><|im_end|>"
    ),
    "qwen3_template": (
        '<think>\nhm\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>'
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_the_formats_of_families_read_their_answers(name):
    from transformers.utils.chat_parsing import parse_response

    message = parse_response(ANSWERS[name], getattr(chat_template_utils, name), prefix="")
    assert message.pop("tool_calls") == [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    reasoning = message.pop("thinking", None) or message.pop("reasoning_content", None)
    assert reasoning == (None if name == "llama3_template" else "hm")
    assert message == {"role": "assistant"}
    assert name in dir(chat_template_utils)


def test_names_of_vendors_texts_say_what_to_call_instead():
    for name, instead in {
        "qwen3_training_chat_template": "get_training_chat_template",
        "qwen3_chat_template": "tokenizer.chat_template",
        "qwen3_schema": "add_response_schema",
    }.items():
        with pytest.raises(AttributeError, match=instead):
            getattr(chat_template_utils, name)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        getattr(chat_template_utils, "nonsense")  # noqa: B009
