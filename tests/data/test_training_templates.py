"""Templates derived for training: the text of the tokenizer's own template, with the assistant's words marked."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.conftest import CHAT_TEMPLATE, build_tokenizer
from trl.data.chat_templates import tokenize_conversation
from trl.data.template_checks import is_chat_template_prefix_preserving, is_chat_template_stop_token_trained
from trl.data.template_rendering import has_generation_markers
from trl.data.tool_formats import supports_tool_calling
from trl.data.training_templates import get_training_chat_template

# One mechanism each, as families of models use them.
MARKED_CHAT_TEMPLATE = CHAT_TEMPLATE
PLAIN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALLS = (
    "{% for call in m.tool_calls or [] %}{{ '<call>' + call.function.name + (call.function.arguments | tojson) + '</call>' }}"
    "{% endfor %}"
)
WITH_TOOLS = PLAIN.replace("m.content + '<|im_end|>\n' }}", "m.content }}" + CALLS + "{{ '<|im_end|>\n' }}")
# Empty thoughts are shown in the last message only, thoughts of earlier turns are dropped.
DROPS_THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}{% if loop.last or m.reasoning_content %}"
    "{{ '<think>' + (m.reasoning_content or '') + '</think>\n' }}{% endif %}{% endif %}{{ m.content }}" + CALLS + ""
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think></think>\n' }}{% endif %}{% endif %}"
)
OPENS_THINKING = PLAIN.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}")
ENDS_THE_TEXT = PLAIN.replace("{% endif %}", "{% else %}{{ '<|endoftext|>' }}{% endif %}")
OTHER_LAST_END = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content | trim }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
BLOCKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for part in m.content %}{% if part.type == 'text' %}"
    "{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}\n"
)
MOVES_SYSTEM = (
    "{%- macro turn(role, text) -%}{{ '<|im_start|>' + role + '\n' + text | trim + '<|im_end|>' }}{%- endmacro -%}\n"
    "{%- if messages[0].role == 'system' -%}{%- set first = messages[0].content + '\n\n' -%}\n"
    "{%- set messages = messages[1:] -%}{%- else -%}{%- set first = '' -%}{%- endif -%}\n"
    "{%- for m in messages -%}\n    {{- turn(m.role, (first if loop.first else '') + m.content) -}}\n{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n{% endif -%}"
)
NO_PROMPT = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s> {% endif %}{% endfor %}"
)
MECHANISMS = {
    "plain": PLAIN,
    "with_tools": WITH_TOOLS,
    "drops_thinking": DROPS_THINKING,
    "opens_thinking": OPENS_THINKING,
    "ends_the_text": ENDS_THE_TEXT,
    "other_last_end": OTHER_LAST_END,
    "no_end": NO_END,
    "blocks": BLOCKS,
    "moves_system": MOVES_SYSTEM,
    "no_prompt": NO_PROMPT,
}
SPECIAL = re.compile(r"<[|｜][^|｜\s]+[|｜]>|<[a-z_|]+\|?>|</[a-z_]+>|\[/?[A-Z_]+\]")

USER, ANSWER = {"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "I am well."}
SYSTEM = {"role": "system", "content": "Be brief."}
MORE = [{"role": "user", "content": "And the sky?"}, {"role": "assistant", "content": "It is blue."}]
QUOTE = {"role": "user", "content": "<|im_start|>assistant\nfoo<|im_end|>\n<|assistant|>"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "id": "call00001", "function": {"name": "add", "arguments": {"a": "1"}}}],
}
RESULT = {"role": "tool", "name": "add", "tool_call_id": "call00001", "content": "3"}
CONVERSATIONS = {
    "question": [USER],
    "answer": [USER, ANSWER],
    "turns": [USER, ANSWER, *MORE],
    "system": [SYSTEM, USER, ANSWER, *MORE],
    "thoughts": [USER, {**ANSWER, "reasoning_content": "Hm."}, MORE[0], {**MORE[1], "reasoning_content": "Well."}],
    "quote": [QUOTE, ANSWER, *MORE],
}


def vendor_templates() -> list[Path]:
    folder = os.environ.get("TRL_TEST_CHAT_TEMPLATES")
    return sorted(Path(folder).glob("*.jinja")) if folder else []


def tokenizer_of(template: str):
    tokenizer = build_tokenizer(template)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.add_tokens(sorted(set(SPECIAL.findall(template))), special_tokens=True)
    return tokenizer


def with_training_template(template: str):
    """Two tokenizers, one with the template and one with what is derived from it."""
    own, training = tokenizer_of(template), tokenizer_of(template)
    derived = get_training_chat_template(own)
    training.chat_template = template if derived is None else derived
    return own, training


def in_blocks(messages: list[dict]) -> list[dict]:
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


every_template = pytest.mark.parametrize(
    "template",
    [pytest.param(text, id=name) for name, text in MECHANISMS.items()]
    + [pytest.param(path.read_text(), id=path.stem) for path in vendor_templates()],
)


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
@every_template
def test_text_stays_and_marks_are_where_the_turns_are(template, conversation):
    own, training = with_training_template(template)
    for opened in (False, True):
        options = {"add_generation_prompt": opened, "assistant_mask": True}
        try:
            expected = tokenize_conversation(own, conversation, **options)
        except Exception:  # the vendor's template refuses the conversation, e.g. a system message
            assert template not in MECHANISMS.values()
            pytest.skip("the template does not render this conversation")
        assert tokenize_conversation(training, conversation, **options) == expected
        answers = sum(message["role"] == "assistant" for message in conversation)
        starts = [a > b for a, b in zip(expected["assistant_masks"], [0, *expected["assistant_masks"]], strict=False)]
        assert sum(starts) == answers or "<|start|>" in template


@every_template
def test_derived_templates_are_fit_for_training(template):
    _, training = with_training_template(template)
    assert has_generation_markers(training.chat_template)
    assert get_training_chat_template(training) is None
    if supports_tool_calling(training):
        assert is_chat_template_prefix_preserving(training)


@every_template
def test_stop_token_is_trained(template):
    if template == NO_END or "[gMASK]" in template:
        pytest.skip("nothing ends the assistant's turn in this template")
    assert is_chat_template_stop_token_trained(with_training_template(template)[1])


def test_transformers_own_mask_sees_the_marks():
    """`apply_chat_template(return_assistant_tokens_mask=True)` gives exactly the words and the end-of-turn token."""
    _, training = with_training_template(WITH_TOOLS)
    row = training.apply_chat_template(
        [USER, ANSWER, *MORE], return_assistant_tokens_mask=True, return_dict=True, tokenize=True
    )
    written = [token for token, mask in zip(row["input_ids"], row["assistant_masks"], strict=True) if mask]
    assert training.decode(written) == "I am well.<|im_end|>It is blue.<|im_end|>"


def test_a_message_can_be_continued():
    own, training = with_training_template(WITH_TOOLS)
    options = {"tokenize": False, "continue_final_message": True}
    text = training.apply_chat_template([USER, ANSWER], **options)
    assert text == own.apply_chat_template([USER, ANSWER], **options)
    assert text.endswith("I am well.")


def test_tool_results_leave_the_call_as_it_was_generated():
    own, training = with_training_template(DROPS_THINKING)
    assert not is_chat_template_prefix_preserving(own)

    def render(tokenizer, messages, opened=False):
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)

    call = render(training, [USER, CALL])
    assert call == render(own, [USER, CALL])
    assert render(training, [USER, CALL, RESULT], opened=True).startswith(call)
    # A new question still drops the thinking of the turns before it, as in inference.
    thoughts = CONVERSATIONS["thoughts"]
    assert render(training, thoughts) == render(own, thoughts)
    assert "Hm." not in render(training, thoughts)


def test_variables_and_tools_reach_the_original():
    own, training = with_training_template(DROPS_THINKING)
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    text = training.apply_chat_template([USER], **options)
    assert text == own.apply_chat_template([USER], **options)
    assert text.endswith("<think></think>\n")


def test_a_marked_template_is_fit_already():
    assert get_training_chat_template(build_tokenizer(MARKED_CHAT_TEMPLATE)) is None


def test_marks_alone_do_not_do_with_tools():
    """A template with marks that changes a call when its result follows gets another one."""
    marked = DROPS_THINKING.replace(
        "{{ m.content }}" + CALLS + "{{ '<|im_end|>\n' }}",
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        + CALLS
        + "{{ '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}",
    )
    _, training = with_training_template(marked)
    assert training.chat_template != marked
    assert is_chat_template_prefix_preserving(training)


def test_underivable_templates_say_why():
    counting = "{{ messages | length }}" + WITH_TOOLS
    with pytest.raises(ValueError, match="changes when tool results follow"):
        get_training_chat_template(build_tokenizer(counting))
    silent = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="does not render"):
        get_training_chat_template(build_tokenizer(silent))


def test_no_template_is_an_error():
    with pytest.raises(ValueError, match="no chat template"):
        get_training_chat_template(build_tokenizer(None))


def test_arguments():
    tokenizer = build_tokenizer(PLAIN)
    with pytest.warns(FutureWarning, match="processing_class"):
        assert get_training_chat_template(tokenizer=tokenizer) == get_training_chat_template(tokenizer)
    with pytest.raises(TypeError, match="neither"):
        get_training_chat_template()
    with pytest.raises(TypeError, match="both"):
        get_training_chat_template(tokenizer, tokenizer=tokenizer)
