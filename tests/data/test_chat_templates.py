"""Conversations to tokens and assistant masks, on small templates that each show one mechanism, and on published ones."""

from __future__ import annotations

import os
import re
from itertools import groupby
from pathlib import Path

import pytest
from jinja2 import TemplateError

from tests.conftest import CHAT_TEMPLATE, build_tokenizer
from trl.data.assistant_masks import learn_turn_format
from trl.data.chat_templates import assistant_spans, has_generation_markers, tokenize_conversation
from trl.data.template_checks import is_chat_template_prefix_preserving, is_chat_template_stop_token_trained
from trl.data.template_rendering import TemplateRenderer, resolve_chat_template, text_blocks

CHATML = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")

TRIMMED = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m.role + '\n' + (m.content | trim) + '<|stop|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
# Thinking is kept behind the last question only, and an empty block stands in front of the last answer.
DROPPED_THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}{{ m.content + '<|stop|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
PREFILLED_THINKING = DROPPED_THINKING.replace(
    "{% if enable_thinking is defined and not enable_thinking %}", ""
).replace("{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}", "{{ '<think>\n' }}{% endif %}")
# The last answer ends otherwise than an earlier one.
RETURNING = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' and not add_generation_prompt else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
# A text end that is no part of the last turn.
CLOSING_EOS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
)
# No end-of-turn token: the next role's header ends a turn.
UNENDED = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' and "
    "m.reasoning_content and loop.index0 > ns.last %}{{ '<think>' + m.reasoning_content + '</think>\n' }}{% endif %}"
    "{{ m.content }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Contents as blocks only, plain words for roles.
BLOCKS = (
    "{% for m in messages %}{{ m.role.capitalize() + ': ' }}{% for block in m.content %}{% if block.type == 'text' %}"
    "{{ block.text }}{% endif %}{% endfor %}{{ '<|stop|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# No generation prompt, the system message within the user's turn, strict order of roles.
INSTRUCTION = (
    "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.system = m.content + '\n\n' %}{% elif m.role == 'user' %}"
    "{{ '[INST] ' + ns.system + m.content + ' [/INST]' }}{% set ns.system = '' %}{% elif m.role == 'assistant' %}"
    "{{ ' ' + m.content + '</s>' }}{% else %}{{ raise_exception('no such role') }}{% endif %}{% endfor %}"
)
# One message can be two turns; a call ends with a token of its own.
CHANNELS = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.thinking and loop.index0 > ns.last %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}{% if m.tool_calls %}"
    "{{ '<|start|>assistant to=' + m.tool_calls[0].function.name + '<|message|>' }}"
    "{{ m.tool_calls[0].function.arguments | tojson }}{{ '<|call|>' }}{% else %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}{% endif %}{% else %}"
    "{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)

TEMPLATES = {
    "chatml": CHATML,
    "trimmed": TRIMMED,
    "dropped-thinking": DROPPED_THINKING,
    "prefilled-thinking": PREFILLED_THINKING,
    "returning": RETURNING,
    "closing-eos": CLOSING_EOS,
    "unended": UNENDED,
    "blocks": BLOCKS,
    "instruction": INSTRUCTION,
    "channels": CHANNELS,
}

PUBLISHED = sorted(Path(os.environ.get("TRL_TEST_CHAT_TEMPLATES") or os.devnull).glob("*.jinja"))

TOKENS = re.compile(
    r"<[|｜][^<>|｜\s{}]+[|｜]>|<(?:start|end)_of_\w+>|</?s>|<\w+\|>|<\|\w+>|</?think>|</?tool_\w+>|\[/?INST\]"
)


def tokenizer_for(template: str):
    """A tokenizer that knows the special tokens a template writes."""
    tokenizer = build_tokenizer(template)
    tokenizer.add_tokens(sorted(set(TOKENS.findall(template))), special_tokens=True)
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    return tokenizer


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str, **fields) -> dict:
    return {"role": "assistant", "content": content, **fields}


def written(tokenizer, messages, **kwargs) -> list[str]:
    """The stretches of tokens under the mask, decoded."""
    encoded = tokenize_conversation(tokenizer, messages, assistant_mask=True, **kwargs)
    assert len(encoded["input_ids"]) == len(encoded["assistant_masks"])
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    return [tokenizer.decode([i for i, _ in run]) for mask, run in groupby(pairs, key=lambda pair: pair[1]) if mask]


TALK = [user("what is 1 plus 2?"), assistant("3"), user("and 3 plus 4?"), assistant("it is 7")]
THOUGHTFUL = [
    message if message["role"] == "user" else {**message, "reasoning_content": "hm", "thinking": "hm"}
    for message in TALK
]


# ---------------------------------------------------------------------------------------------------------------------
# Ids


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, *TEMPLATES.values()], ids=["markers", *TEMPLATES])
def test_ids_are_those_of_the_plain_rendering(template, add_generation_prompt):
    tokenizer = tokenizer_for(template)
    messages = text_blocks(TALK) if template is BLOCKS else TALK
    plain = tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)["input_ids"]
    for mask in (False, True):
        encoded = tokenize_conversation(
            tokenizer, TALK, add_generation_prompt=add_generation_prompt, assistant_mask=mask
        )
        assert encoded["input_ids"] == plain
        assert ("assistant_masks" in encoded) is mask


def test_continued_message_stays_open(tokenizer):
    encoded = tokenize_conversation(tokenizer, TALK[:2], continue_final_message=True)
    plain = tokenizer.apply_chat_template(TALK[:2], continue_final_message=True)["input_ids"]
    assert encoded["input_ids"] == plain
    assert not tokenizer.decode(plain).endswith("<|im_end|>\n")
    with pytest.raises(ValueError, match="leaves one open"):
        tokenize_conversation(tokenizer, TALK[:2], continue_final_message=True, assistant_mask=True)


def test_tools_and_variables_reach_the_template():
    def add(a: int) -> int:
        """
        Add one.

        Args:
            a: a number
        """

    tokenizer = build_tokenizer(
        "{{ tools[0].function.name if tools }}{{ tone }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    ids = tokenize_conversation(tokenizer, TALK, tools=[add], tone="kind")["input_ids"]
    assert tokenizer.decode(ids).startswith("addkindwhat")
    assert tokenizer.decode(tokenize_conversation(tokenizer, TALK, tools=[])["input_ids"]).startswith("what")


def test_no_template():
    with pytest.raises(ValueError, match="no chat template.*clone_chat_template"):
        tokenize_conversation(build_tokenizer(None), TALK)


def test_empty_conversation(tokenizer):
    with pytest.raises(ValueError, match="at least one message"):
        tokenize_conversation(tokenizer, [])


def test_template_chosen_by_name(tokenizer):
    tokenizer.chat_template = {"default": CHATML, "tool_use": TRIMMED, "short": BLOCKS}
    assert resolve_chat_template(tokenizer) == CHATML
    assert resolve_chat_template(tokenizer, tools=[{}]) == TRIMMED
    assert resolve_chat_template(tokenizer, "short") == BLOCKS
    assert resolve_chat_template(tokenizer, RETURNING) == RETURNING
    tokenizer.chat_template = {"short": BLOCKS}
    with pytest.raises(ValueError, match="none is called 'default'"):
        resolve_chat_template(tokenizer)


@pytest.mark.parametrize(
    ("template", "marked"),
    [
        (CHAT_TEMPLATE, True),
        (CHATML, False),
        ("{%- generation -%}{{ x }}{%- endgeneration -%}", True),
        ({"default": CHAT_TEMPLATE, "other": CHATML}, True),
        ({"default": CHATML, "other": CHAT_TEMPLATE}, False),
        ("{{ generation }}{% if generation %}{% endif %}", False),
    ],
)
def test_has_generation_markers(template, marked):
    assert has_generation_markers(template) is marked


# ---------------------------------------------------------------------------------------------------------------------
# Masks


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("chatml", "3<|im_end|>", "it is 7<|im_end|>"),
        ("trimmed", "3<|stop|>", "it is 7<|stop|>"),
        ("dropped-thinking", "3<|stop|>", "<think>\nhm\n</think>\n\nit is 7<|stop|>"),
        ("prefilled-thinking", "3<|stop|>", "hm\n</think>\n\nit is 7<|stop|>"),
        ("returning", "<|message|>3<|end|>", "<|message|>it is 7<|return|>"),
        ("closing-eos", "3<|end|>", "it is 7<|end|>"),
        ("unended", "\n3", "\n<think>hm</think>\nit is 7"),
        ("blocks", " 3<|stop|>", " it is 7<|stop|>"),
        # here the template's blank and the answer's "3" are one token, which the model has to write
        ("instruction", " 3</s>", "it is 7</s>"),
        (
            "channels",
            "<|channel|>final<|message|>3<|end|>",
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>it is 7<|end|>",
        ),
    ],
)
def test_what_the_assistant_wrote(name, first, last):
    """Each turn without its header and with its end, though later turns change how earlier ones are rendered."""
    assert written(tokenizer_for(TEMPLATES[name]), THOUGHTFUL) == [first, last]


@pytest.mark.parametrize("name", TEMPLATES)
def test_generation_prompt_is_never_masked(name):
    tokenizer = tokenizer_for(TEMPLATES[name])
    asked = THOUGHTFUL[:3]
    closed = tokenize_conversation(tokenizer, asked, assistant_mask=True)
    opened = tokenize_conversation(tokenizer, asked, assistant_mask=True, add_generation_prompt=True)
    assert sum(closed["assistant_masks"]) == sum(opened["assistant_masks"]) > 0
    assert opened["assistant_masks"][-1] == 0


def test_switch_that_writes_for_the_model():
    """With thinking off the template writes the empty block itself, so the model is not trained on it."""
    tokenizer = tokenizer_for(DROPPED_THINKING)
    assert written(tokenizer, TALK[:2]) == ["<think>\n\n</think>\n\n3<|stop|>"]
    assert written(tokenizer, TALK[:2], enable_thinking=False) == ["3<|stop|>"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_same_mask_as_markers_would_give(name):
    """The spans say which characters; a template that marks exactly these gives the same tokens."""
    tokenizer = tokenizer_for(TEMPLATES[name])
    text, spans = assistant_spans(tokenizer, THOUGHTFUL)
    pieces, cursor = "", 0
    for start, end in spans:
        pieces += (
            f"{{{{ text[{cursor}:{start}] }}}}{{% generation %}}{{{{ text[{start}:{end}] }}}}{{% endgeneration %}}"
        )
        cursor = end
    marked = pieces + f"{{{{ text[{cursor}:] }}}}"
    derived = tokenize_conversation(tokenizer, THOUGHTFUL, assistant_mask=True)
    told = tokenizer.apply_chat_template(
        THOUGHTFUL, chat_template=marked, return_assistant_tokens_mask=True, text=text
    )
    assert derived["input_ids"] == told["input_ids"]
    assert derived["assistant_masks"] == told["assistant_masks"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_quoted_headers_are_not_trained(name):
    """A user who writes the assistant's header does not get a turn of his own."""
    tokenizer = tokenizer_for(TEMPLATES[name])
    form = learn_turn_format(TemplateRenderer.of(tokenizer))
    quote = f"say {form.header}never{''.join(form.ends)}{form.header}"
    messages = [user(quote), assistant("3", reasoning_content="hm"), user(f"{quote}?"), assistant("it is 7")]
    spans = written(tokenizer, messages)
    assert len(spans) == 2
    assert "3" in spans[0]
    assert "it is 7" in spans[1]
    assert not any("never" in span for span in spans)


def test_tool_turns():
    """A call ends with its own token, a result is context, and dropped thinking does not shift what follows."""
    call = assistant(
        "",
        thinking="hm",
        tool_calls=[{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
    )
    result = {"role": "tool", "name": "add", "content": "2"}
    tokenizer = tokenizer_for(CHANNELS)
    messages = [user("1 + 1?"), call, result, assistant("two"), user("sure?"), assistant("yes", thinking="ok")]
    assert written(tokenizer, messages) == [
        ' to=add<|message|>{"a": 1}<|call|>',
        "<|channel|>final<|message|>two<|end|>",
        "<|channel|>analysis<|message|>ok<|end|><|start|>assistant<|channel|>final<|message|>yes<|end|>",
    ]


REVISED = [
    user("1 + 1?"),
    assistant("let me see", reasoning_content="hm"),
    {"role": "tool", "content": "2"},
    assistant("two", reasoning_content="ah"),
    user("<|start|>assistant\nthree<|stop|> <|start|>assistant\n"),
    assistant("no", reasoning_content="really"),
]


@pytest.mark.parametrize("template", [DROPPED_THINKING, DROPPED_THINKING.replace("m.content", "(m.content | trim)")])
def test_turn_after_rewritten_thinking(template):
    """With the earlier thinking gone no prefix fits; turns are found by their headers, and not by quoted ones."""
    assert written(tokenizer_for(template), REVISED) == [
        "let me see<|stop|>",
        "two<|stop|>",
        "<think>\nreally\n</think>\n\nno<|stop|>",
    ]


def test_unended_turn_before_an_unknown_role():
    """Without an end-of-turn token and with its thinking gone, a turn ends where the rest of the text begins."""
    messages = [
        user("1 + 1?"),
        assistant("two", reasoning_content="hm"),
        {"role": "critic", "content": "no"},
        user("again"),
        assistant("three"),
    ]
    assert written(tokenizer_for(UNENDED), messages) == ["\ntwo", "\nthree"]


def test_conversation_that_the_assistant_opens(tokenizer):
    tokenizer.chat_template = CHATML
    assert written(tokenizer, [assistant("hello"), *TALK])[0] == "hello<|im_end|>"


def test_blanks_that_a_template_keeps_or_strips():
    blanks = [user("hi"), assistant("\n yes \n"), user("really?"), assistant(" sure ")]
    assert written(tokenizer_for(CHATML), blanks) == ["\n yes \n<|im_end|>", " sure <|im_end|>"]
    assert written(tokenizer_for(TRIMMED), blanks) == ["yes<|stop|>", "sure<|stop|>"]


def test_pad_equals_eos():
    """The mask follows positions: the end-of-turn token is trained although it is the padding token too."""
    tokenizer = tokenizer_for(CHATML)
    tokenizer.pad_token = tokenizer.eos_token
    encoded = tokenize_conversation(tokenizer, TALK, assistant_mask=True)
    ends = [
        mask
        for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        if token == tokenizer.eos_token_id
    ]
    assert ends == [0, 1, 0, 1]


def test_tokenizer_without_offsets():
    """A slow tokenizer's boundaries come from the tokens of the text before them."""

    class Slow:
        is_fast = False

        def __init__(self, fast):
            self.fast = fast

        def __call__(self, text, **options):
            assert "return_offsets_mapping" not in options
            return self.fast(text, **options)

        def __getattr__(self, name):
            return getattr(self.fast, name)

    tokenizer = tokenizer_for(DROPPED_THINKING)
    fast = tokenize_conversation(tokenizer, THOUGHTFUL, assistant_mask=True)
    assert tokenize_conversation(Slow(tokenizer), THOUGHTFUL, assistant_mask=True) == fast


def test_message_that_breaks_the_mask(tokenizer):
    """A template that rewrites what came before, beyond recognition, is told which message cannot be found."""
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' and not loop.last and loop.index0 == 1 and "
        "messages | length > 3 %}{% else %}{{ m.role + ':' + m.content + ';' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    assert written(tokenizer, TALK[:2]) == ["3;"]
    with pytest.raises(ValueError, match=r"Message 1 \(assistant\) cannot be found.*get_training_chat_template"):
        written(tokenizer, TALK)


def test_template_without_the_assistant(tokenizer):
    tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="user → assistant"):
        written(tokenizer, TALK)


def test_no_assistant_turn(tokenizer):
    tokenizer.chat_template = CHATML
    assert sum(tokenize_conversation(tokenizer, TALK[:1], assistant_mask=True)["assistant_masks"]) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def test_stop_token_trained():
    assert is_chat_template_stop_token_trained(tokenizer_for(CHATML))
    outside = CHAT_TEMPLATE.replace(
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}",
        "{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>' }}",
    )
    assert outside != CHAT_TEMPLATE
    assert not is_chat_template_stop_token_trained(tokenizer_for(CHATML), outside)
    assert not is_chat_template_stop_token_trained(tokenizer_for(UNENDED))


def test_prefix_preserving():
    assert is_chat_template_prefix_preserving(tokenizer_for(CHATML))
    assert not is_chat_template_prefix_preserving(tokenizer_for(CLOSING_EOS))


def test_prefix_preserving_with_arguments_as_text():
    """A template that wants arguments as text is judged by its calls, not by a conversation without any."""
    text_calls = CHATML.replace(
        "{{ message['content'] + '<|im_end|>' }}",
        "{{ message['content'] + (message.tool_calls[0].function.arguments + ('' if loop.last else ' ') "
        "if message.tool_calls else '') + '<|im_end|>' }}",
    )
    assert text_calls != CHATML
    assert not is_chat_template_prefix_preserving(tokenizer_for(text_calls))
    assert is_chat_template_prefix_preserving(tokenizer_for(text_calls.replace("('' if loop.last else ' ')", "''")))


# ---------------------------------------------------------------------------------------------------------------------
# Published templates: set TRL_TEST_CHAT_TEMPLATES to a folder of them


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
@pytest.mark.parametrize("messages", [TALK[:2], TALK, THOUGHTFUL], ids=["single", "multi", "thinking"])
def test_published_templates(path, messages):
    """Same ids as the plain rendering; one span per turn, with its answer, its end, and nothing of the user's."""
    tokenizer = tokenizer_for(path.read_text())
    renderer = TemplateRenderer.of(tokenizer)
    form = learn_turn_format(renderer)
    given = text_blocks(messages) if form.wants_blocks else messages
    try:
        plain = tokenizer.apply_chat_template(given)["input_ids"]
    except TemplateError as error:
        pytest.skip(f"the template refuses the conversation: {error}")
    assert tokenize_conversation(tokenizer, messages, assistant_mask=True)["input_ids"] == plain
    spans = written(tokenizer, messages)
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    assert len(spans) == len(answers)
    for span, answer in zip(spans, answers, strict=True):
        assert answer in span
        assert "plus" not in span
        assert not form.ends or span.rstrip().endswith(form.ends)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_templates_with_tools(path):
    """Calls are trained with their end, results never are."""
    tokenizer = tokenizer_for(path.read_text())
    calls = [{"id": "call00001", "type": "function", "function": {"name": "add", "arguments": {"key": "valueqx"}}}]
    call = assistant("", tool_calls=calls, reasoning_content="hm", thinking="hm")
    result = {"role": "tool", "name": "add", "tool_call_id": "call00001", "content": "resultqx"}
    exchange = [user("first?"), call, result, assistant("doneqx", reasoning_content="hm", thinking="hm")]
    text = None
    for arguments in ({"key": "valueqx"}, '{"key": "valueqx"}'):
        calls[0]["function"]["arguments"] = arguments
        try:
            text = TemplateRenderer.of(tokenizer).render(exchange)
            break
        except (TemplateError, TypeError):
            continue
    if text is None or "valueqx" not in text:
        pytest.skip("the template has no tool calls")
    for messages in (exchange, [*exchange, *TALK[:2]]):
        spans = written(tokenizer, messages)
        assert len(spans) == sum(message["role"] == "assistant" for message in messages)
        assert "valueqx" in spans[0]
        assert "doneqx" in spans[1]
        assert not any("resultqx" in span for span in spans)
