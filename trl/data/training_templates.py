"""
Chat templates fit for training, derived from the tokenizer's own.

Training asks two things of a template. It must mark the assistant's words with generation blocks, and a finished
assistant turn must keep its tokens when tool results follow (prefix preservation), or a rollout could not be trained
as it was sampled. Most published templates lack one or both.

`derive_training_template` makes such a template in two steps, each checked by rendering probes against the original.
If tool results change an earlier turn, the conditions on a message's position that cause it are fixed, as few as
possible. Then the template is wrapped: it is rendered as before, as a macro, and the text is cut where the
assistant's turns begin and end. So the text stays the same by construction, and only the marks are new.
"""

from __future__ import annotations

import itertools
import json
import re
import warnings
from collections.abc import Iterator
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from .assistant_masks import (
    FENCE,
    RENDER_ERRORS,
    TurnFormat,
    assistant_spans,
    learn_turn_format,
    probe_call,
    probe_messages,
    try_render,
)
from .template_checks import is_chat_template_prefix_preserving
from .template_rendering import (
    Messages,
    ProcessingClass,
    Span,
    TemplateRenderer,
    has_generation_markers,
    text_blocks,
)
from .tool_formats import supports_tool_calling

POSITION_TEST = re.compile(r"(\{%[-+]?\s*(?:if|elif)\b)((?:(?!%\}).)*?\bloop\.(?:(?!%\}).)*?)([-+]?%\})", re.DOTALL)
MAX_FIXED_TESTS = 2

# The original, callable on any beginning of the conversation. The line break behind the first tag is Jinja's, not text.
AS_MACRO = """\
{%- macro trl_render(messages, add_generation_prompt) %}
ORIGINAL{%+ endmacro -%}
{%- set trl_open = add_generation_prompt | default(false) -%}
{%- set trl_text = trl_render(messages, trl_open) -%}
"""

# What the generation prompt writes behind the header, with the variables of this very rendering.
GENERATION_PROMPT = """\
{%- set trl_given = trl_render([trl_question], true).split(trl_header) | last if trl_prompts else '' -%}
{%- set trl_prompt = trl_header ~ trl_given if trl_prompts else '' -%}
"""

# Cut the text at headers. `trl_marks` is the text with quoted headers fenced off, `trl_given` what the generation prompt
# writes behind the header, `stop` where the assistant's words end within a piece. FENCED stands for the filters that write
# a quoted token in fence characters.
CUT_AT_HEADERS = """\
{%- set trl_quote = namespace(messages=messages, found=false) -%}
{%- for message in messages -%}
{%- set fenced = message.content FENCED if message.content is string else '' -%}
{%- if fenced and fenced != message.content -%}
{%- set trl_quote.messages = trl_quote.messages[:loop.index0] + [dict(message, content=fenced)] -%}
{%- set trl_quote.messages = trl_quote.messages + messages[loop.index:] -%}
{%- set trl_quote.found = true -%}
{%- endif -%}
{%- endfor -%}
{%- set trl_marks = trl_render(trl_quote.messages, trl_open) if trl_quote.found else trl_text -%}
{%- set trl_marks = trl_marks if trl_marks | length == trl_text | length else trl_text -%}
{%- set trl_at = namespace(begin=0, stop=0, rest=' ') -%}
{%- for piece in trl_marks.split(trl_header) -%}
{%- set body = trl_text[trl_at.begin:trl_at.begin + piece | length] -%}
{%- if loop.first -%}
{{- body -}}
{%- elif loop.last and trl_open and piece == trl_given -%}
{{- trl_header ~ body -}}
{%- else -%}
{%- set trl_at.stop = piece | length -%}
{%- for token, kept in trl_closing -%}
{%- set found = piece.find(token) -%}
{%- if found >= 0 and found + kept < trl_at.stop -%}{%- set trl_at.stop = found + kept -%}{%- endif -%}
{%- endfor -%}
{%- if trl_repeats and trl_at.rest == '' -%}
{%- generation -%}{{- trl_header ~ body[:trl_at.stop] -}}{%- endgeneration -%}
{%- else -%}
{%- set given = trl_given | length if piece.startswith(trl_given) else 0 -%}
{{- trl_header ~ body[:given] -}}
{%- generation -%}{{- body[given:trl_at.stop] -}}{%- endgeneration -%}
{%- endif -%}
{%- set trl_at.rest = body[trl_at.stop:] -%}
{{- trl_at.rest -}}
{%- endif -%}
{%- set trl_at.begin = trl_at.begin + piece | length + trl_header | length -%}
{%- endfor -%}
"""

# Measure each turn by the growing conversation: it begins where the messages before it, opened for an answer, end.
CUT_AT_PREFIXES = """\
{%- set trl_limit = trl_text | length -%}
{%- if trl_open and trl_prompt and trl_text.endswith(trl_prompt) -%}
{%- set trl_limit = trl_limit - trl_prompt | length -%}
{%- endif -%}
{%- set trl_at = namespace(done=0, begin=0, stop=0, found=false) -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' and not loop.first -%}
{%- set turn = loop.index -%}
{%- set before = trl_render(messages[:turn - 1], true) -%}
{%- set given = trl_prompt != '' and before.endswith(trl_prompt) -%}
{%- set trl_at.begin = -1 -%}
{%- set trl_at.stop = -1 -%}
{%- if trl_text.startswith(before) -%}
{%- set trl_at.begin = before | length -%}
{%- set found = trl_text.find(trl_header, [before | length - trl_header | length, 0] | max) -%}
{%- if trl_header and not given and 0 <= found and found <= trl_at.begin -%}
{%- set trl_at.begin = found + trl_header | length -%}
{%- endif -%}
{%- elif given and trl_text.startswith(before[:before | length - trl_prompt | length] ~ trl_header) -%}
{%- set trl_at.begin = before | length - trl_prompt | length + trl_header | length -%}
{%- endif -%}
{%- for ending in [true, false] if trl_at.begin >= trl_at.done -%}
{%- set closed = trl_render(messages[:turn], ending) -%}
{%- set size = closed | length -%}
{%- if ending and trl_prompt and closed.endswith(trl_prompt) -%}
{%- set size = size - trl_prompt | length -%}
{%- endif -%}
{%- if trl_at.stop < 0 and trl_at.begin <= size <= trl_limit and trl_text.startswith(closed[:size]) -%}
{%- set trl_at.stop = size -%}
{%- set words = trl_text[trl_at.begin:size].rstrip() -%}
{%- if trl_ends and words.endswith(trl_ends) -%}
{%- set trl_at.stop = trl_at.begin + words | length -%}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- set trl_at.found = trl_at.stop >= 0 -%}
{%- for token, kept in trl_closing if trl_at.begin >= trl_at.done and not trl_at.found -%}
{%- set found = trl_text.find(token, trl_at.begin, trl_limit) -%}
{%- if found >= 0 and (trl_at.stop < 0 or found + kept < trl_at.stop) -%}{%- set trl_at.stop = found + kept -%}{%- endif -%}
{%- endfor -%}
{%- if trl_at.stop >= 0 -%}
{{- trl_text[trl_at.done:trl_at.begin] -}}
{%- generation -%}{{- trl_text[trl_at.begin:trl_at.stop] -}}{%- endgeneration -%}
{%- set trl_at.done = trl_at.stop -%}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{{- trl_text[trl_at.done:] -}}
"""


def get_training_chat_template(
    processing_class: ProcessingClass | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> str | None:
    """
    A chat template fit for training, derived from the tokenizer's own.

    It marks the assistant's words, end-of-turn token included, with generation blocks; and where the template has
    tools, a finished turn keeps its text when tool results follow. Everything else is rendered as before.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer or processor with a chat template; it is not changed.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Deprecated name of `processing_class`.

    Returns:
        `str` or `None`: the template, or `None` where the tokenizer's own is fit for training already.

    Raises:
        `TypeError`: both arguments are given, or none.
        `ValueError`: there is no template, or none could be derived that passes every probe.

    Example:

    ```python
    >>> template = get_training_chat_template(tokenizer)
    >>> if template is not None:
    ...     tokenizer.chat_template = template
    ```
    """
    if (processing_class is None) == (tokenizer is None):
        given = "neither" if tokenizer is None else "both"
        raise TypeError(f"get_training_chat_template() takes either `processing_class` or `tokenizer`, got {given}.")
    if tokenizer is not None:
        warnings.warn(
            "The argument `tokenizer` of get_training_chat_template() is deprecated and will be removed in version "
            "2.0.0. Pass it as `processing_class`.",
            FutureWarning,
            stacklevel=2,
        )
        processing_class = tokenizer
    renderer = TemplateRenderer.of(processing_class)
    tools_supported = supports_tool_calling(processing_class)
    if has_generation_markers(renderer.template) and (
        not tools_supported or is_chat_template_prefix_preserving(processing_class)
    ):
        return None
    return derive_training_template(renderer, tools_supported=tools_supported)


def derive_training_template(renderer: TemplateRenderer, *, tools_supported: bool) -> str:
    """
    A template that renders the same text, marks the assistant's words and, with tools, preserves prefixes.

    Args:
        renderer: the tokenizer's own template, with its special tokens.
        tools_supported: whether the template renders tool calls and results; otherwise prefixes do not matter.

    Returns:
        The template's text.

    Raises:
        ValueError: none was found whose rendering passes every probe.
    """
    variables = tuple(sorted((k, v) for k, v in renderer.variables.items() if isinstance(v, str)))
    return _derive(renderer.template, variables, tools_supported)


@lru_cache(maxsize=64)
def _derive(template: str, variables: tuple, tools_supported: bool) -> str:
    original = TemplateRenderer(template, dict(variables))
    form = learn_turn_format(original)
    failure = (
        "a finished assistant turn changes when tool results follow, and no condition on the message's position was "
        "found in it that could be made constant to prevent that"
    )
    for fixed in _prefix_preserving_sources(original) if tools_supported else [template]:
        if has_generation_markers(fixed):
            return fixed
        source = TemplateRenderer(fixed, original.variables)
        for wrapped in _wrappings(source, form):
            failure = _difference(source, TemplateRenderer(wrapped, original.variables), form)
            if failure is None:
                return wrapped
    raise ValueError(
        f"No chat template for training could be derived from the tokenizer's own: {failure}. Mark the assistant's "
        "words in the template with {% generation %} … {% endgeneration %} by hand and set `tokenizer.chat_template`."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Marks


def _wrappings(source: TemplateRenderer, form: TurnFormat) -> Iterator[str]:
    """The template as a macro, its text cut in one way or the other; the cheaper way first."""
    head = AS_MACRO.replace("ORIGINAL", source.template.removesuffix("\n"))
    constants = _constants(form)
    # Without a generation prompt, headers may belong to a user's turn that nobody answered.
    ways = [CUT_AT_HEADERS, CUT_AT_PREFIXES] if form.generation_prompt else [CUT_AT_PREFIXES]
    fenced = "".join(f"| replace({_literal(token)}, {_literal(FENCE * len(token))}) " for token in form.tokens)
    for way in ways:
        yield head + constants + GENERATION_PROMPT + way.replace("FENCED ", fenced)


def _constants(form: TurnFormat) -> str:
    """What was learned about the template, as assignments at the head of the code that cuts its text."""
    question = probe_messages("x", blocks=form.wants_blocks)[0]
    values = {
        "header": form.header,
        "prompts": bool(form.generation_prompt),
        "ends": tuple(form.ends),
        "closing": [(token, len(token)) for token in form.ends] + [(token, 0) for token in form.openers],
        "repeats": form.repeats_header,
        "question": question,
    }
    return "".join(f"{{%- set trl_{name} = {_literal(value)} -%}}\n" for name, value in values.items())


def _literal(value: object) -> str:
    """Jinja's spelling of a value; strings in ASCII, with escapes."""
    if isinstance(value, tuple):
        return "(" + "".join(f"{_literal(item)}, " for item in value) + ")"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value)


# ---------------------------------------------------------------------------------------------------------------------
# Prefix preservation


def tool_exchanges(renderer: TemplateRenderer) -> Iterator[tuple[Messages, Messages]]:
    """Conversations that end with tool calls, and the same with the results, in every form the template accepts."""
    results = [
        {"role": "tool", "name": "qxprobe", "tool_call_id": f"call0000{number}", "content": f"result {number}"}
        for number in (1, 2)
    ]
    reasoning = {"reasoning_content": "A thought.", "thinking": "A thought."}
    for arguments in ({"key": "value"}, '{"key": "value"}'):
        question = probe_messages("Question?")
        if try_render(renderer, question) is None:
            question = text_blocks(question)
        call = probe_call(arguments)
        second = {**call, "tool_calls": [{**call["tool_calls"][0], "id": "call00002"}]}
        rounds = [
            ([*question, call], results[:1]),
            ([*question, {**call, **reasoning}], results[:1]),
            ([*question, call, results[0], second], results[1:]),
            ([*question, {**call, **reasoning}, results[0], {**second, **reasoning}], results[1:]),
            ([*question, {**call, "tool_calls": call["tool_calls"] + second["tool_calls"]}], results),
        ]
        accepted = [
            (before, [*before, *after])
            for before, after in rounds
            if try_render(renderer, before) is not None and try_render(renderer, [*before, *after], True) is not None
        ]
        if accepted:
            yield from accepted
            return


def _keeps_prefixes(renderer: TemplateRenderer) -> bool:
    return all(
        renderer.render(after, True).startswith(renderer.render(before)) for before, after in tool_exchanges(renderer)
    )


def _prefix_preserving_sources(original: TemplateRenderer) -> Iterator[str]:
    """The template itself if it preserves prefixes, else with few conditions on a message's position made constant."""
    if _keeps_prefixes(original):
        yield original.template
        return
    tests = list(POSITION_TEST.finditer(original.template))
    for count in range(1, MAX_FIXED_TESTS + 1):
        for chosen in itertools.combinations(tests, count):
            for values in itertools.product(("true", "false"), repeat=count):
                fixed = _fix_tests(original.template, dict(zip(chosen, values, strict=True)))
                candidate = TemplateRenderer(fixed, original.variables)
                if _same_current_turn(original, candidate) and _keeps_prefixes_safely(candidate):
                    yield fixed


def _fix_tests(template: str, values: dict[re.Match, str]) -> str:
    for test, value in sorted(values.items(), key=lambda item: -item[0].start()):
        template = f"{template[: test.start()]}{test[1]} {value} {test[3]}{template[test.end() :]}"
    return template


def _keeps_prefixes_safely(renderer: TemplateRenderer) -> bool:
    try:
        return _keeps_prefixes(renderer)
    except RENDER_ERRORS:
        return False


def _same_current_turn(original: TemplateRenderer, fixed: TemplateRenderer) -> bool:
    """Whether prompts, and answers that nothing follows, are rendered as before, save calls that results changed."""
    return all(
        try_render(original, messages, opened) == try_render(fixed, messages, opened)
        or _results_change_calls(original, messages, opened)
        for messages, opened in _current_turns(original)
    )


def _results_change_calls(renderer: TemplateRenderer, messages: Messages, opened: bool) -> bool:
    text = try_render(renderer, messages, opened) or ""
    calls = (messages[:index] for index, message in enumerate(messages) if message["role"] == "tool")
    return any(not text.startswith(try_render(renderer, call) or "") for call in calls)


def _current_turns(renderer: TemplateRenderer) -> Iterator[tuple[Messages, bool]]:
    for messages in _probes(learn_turn_format(renderer)):
        roles = [message["role"] for message in messages]
        # Only what follows a tool call may change; the call itself, as the end of a conversation, may not.
        if "user" in roles[-2:]:
            yield messages, roles[-1] != "assistant"


# ---------------------------------------------------------------------------------------------------------------------
# Probes


def _probes(form: TurnFormat) -> list[Messages]:
    """Conversations in which templates are known to differ."""
    system = {"role": "system", "content": "Be brief."}
    reasoning = {"reasoning_content": "A thought.", "thinking": "A thought."}
    single, double = probe_messages("One?", "Two."), probe_messages("One?", "Two.", "Three?", "Four.")
    blanks = probe_messages(" One?\n", "\n Two. \n", "Three?", " Four.")
    quoting = probe_messages(f"Say {form.header}!", "No.", f"{''.join(form.ends)}{form.header}", "No.")
    inline = probe_messages("One?", "<think>\nHm.\n</think>\n\nTwo.", "Three?", "<think>\nHm.\n</think>\n\nFour.")
    result = {"role": "tool", "name": "qxprobe", "tool_call_id": "call00001", "content": "result"}
    probes = [
        single,
        double,
        [system, *double],
        blanks,
        quoting,
        inline,
        [{**message, **reasoning} if message["role"] == "assistant" else message for message in double],
        probe_messages("One?", "Two.", "Three?"),
    ]
    for arguments in ({"key": "value", "number": 3}, '{"key": "value", "number": 3}'):
        call = probe_call(arguments)
        for thought in ({}, reasoning):
            asked = [single[0], {**call, **thought}]
            answered = [*asked, result, {"role": "assistant", "content": "Two.", **thought}]
            probes += [asked, [*asked, result], answered, [system, *answered, *double], [*answered, *asked]]
        probes.append([single[0], {**call, "tool_calls": call["tool_calls"] * 2}, result, result, single[1]])
    return [text_blocks(probe) for probe in probes] if form.wants_blocks else probes


def _difference(source: TemplateRenderer, wrapped: TemplateRenderer, form: TurnFormat) -> str | None:
    """In what the two differ on a probe, text or marks; None where they agree on all."""
    tools = [{"type": "function", "function": {"name": "qxprobe", "description": "Probe.", "parameters": {}}}]
    settings = [({}, None), ({"enable_thinking": False}, None), ({"enable_thinking": True}, tools)]
    for probe, opened, (switches, described) in itertools.product(_probes(form), (False, True), settings):
        plain = TemplateRenderer(source.template, {**source.variables, **switches}, described)
        text = try_render(plain, probe, opened)
        if text is None:
            continue
        roles = " → ".join(message["role"] for message in probe)
        marking = TemplateRenderer(wrapped.template, {**source.variables, **switches}, described)
        try:
            marked, spans = marking.render_with_spans(probe, opened)
        except RENDER_ERRORS as error:
            return f"marking a conversation {roles} failed with {error}"
        if marked != text:
            return f"the text of a conversation {roles} changed when it was marked"
        expected = _expected_spans(plain, probe, text, opened)
        if expected is not None and _merged(spans) != expected:
            return f"the marks of a conversation {roles} are not where the assistant's turns begin and end"
    return None


def _expected_spans(renderer: TemplateRenderer, messages: Messages, text: str, opened: bool) -> list[Span] | None:
    """The ranges by growing prefixes; None where the template itself loses track of its turns."""
    try:
        return _merged([span for span in assistant_spans(renderer, messages, text, opened) if span[1] > span[0]])
    except ValueError:
        return None


def _merged(spans: list[Span]) -> list[Span]:
    """Ranges that touch as one."""
    merged: list[Span] = []
    for start, end in spans:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged
