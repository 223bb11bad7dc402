"""
Which characters of a rendered conversation the assistant wrote, found by rendering.

A template is learned once, from conversations made for the purpose (`learn_turn_format`): what stands in front of the
assistant's words, and what ends them. Each conversation is then measured by its own growing prefixes: turn `i` begins
where the conversation before it, rendered with the generation prompt, ends; it ends, end-of-turn token included, where
the conversation up to it ends. A template that renders earlier turns differently once later ones follow (dropped
thinking, a closing token at the very end) breaks that equality; then the turn is found by its header instead, in a
rendering from which the header's text has been removed wherever a message only quotes it.

A span never holds the header, nor what the generation prompt writes in the assistant's place (an opened or an empty
thinking block), for the model never writes those.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from typing import Any

from jinja2 import TemplateError

from .template_rendering import Messages, Span, TemplateRenderer, text_blocks
from .templating import common_prefix_length

FENCE = "\ue000"
"""Stands, in a second rendering, for each character of a header or end-of-turn token that a message merely quotes."""

FIRST_TAG = re.compile(r"\s*(?:<[^<>]*>|\[[^\[\]\s]*\])?")
FIRST_TAGS = re.compile(r"\s*(?:<[^<>]*>|\[[^\[\]\s]*\])*")
LAST_TAG = re.compile(r"(?:<[^<>]*>|\[[^\[\]\s]*\])\Z")
RENDER_ERRORS = (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError)


@dataclass(frozen=True)
class TurnFormat:
    """What a template puts around the assistant's words."""

    header: str
    """Opens every assistant turn, whatever follows: the generation prompt without what it writes for the model."""
    generation_prompt: str
    """What `add_generation_prompt=True` adds after a user's turn; empty where the template ignores it."""
    ends: tuple[str, ...]
    """What may end a turn, trailing blanks removed: the end-of-turn token, another one after a tool call, …"""
    openers: tuple[str, ...]
    """Where nothing ends a turn: what opens the next message, by which the model hands over."""
    wants_blocks: bool
    """Whether string contents are lost and must be given as lists of text blocks."""
    repeats_header: bool
    """Whether one message can open several turns, e.g. one for its reasoning and one for its answer."""

    @property
    def tokens(self) -> list[str]:
        """All of the above, without blanks at either end, for a template may strip those off a message."""
        return [token.strip() for token in (self.header, *self.ends, *self.openers) if token.strip()]


def probe_messages(*turns: str, blocks: bool = False) -> Messages:
    """A conversation of user and assistant in turn, with these contents."""
    messages = [
        {"role": "assistant" if index % 2 else "user", "content": content} for index, content in enumerate(turns)
    ]
    return _in_blocks(messages, blocks)


def _in_blocks(messages: Messages, blocks: bool) -> Messages:
    return text_blocks(messages) if blocks else messages


def probe_call(arguments: Any, name: str = "qxprobe", call_id: str = "call00001") -> dict[str, Any]:
    """An assistant message that does nothing but call one tool."""
    function = {"name": name, "arguments": arguments}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": call_id, "type": "function", "function": function}],
    }


def try_render(renderer: TemplateRenderer, messages: Messages, add_generation_prompt: bool = False) -> str | None:
    """The rendering, or None where the template refuses the conversation."""
    try:
        return renderer.render(messages, add_generation_prompt)
    except RENDER_ERRORS:
        return None


def learn_turn_format(renderer: TemplateRenderer) -> TurnFormat:
    """
    What the template puts around the assistant's words.

    Raises:
        ValueError: the template does not render the assistant's words at all.
    """
    variables = {key: value for key, value in renderer.variables.items() if isinstance(value, str | bool | int)}
    form = _learn_turn_format(renderer.template, tuple(sorted(variables.items())))
    # Switches (enable_thinking=False, …) change what is written for the model, not where its turn opens.
    texts = {key: value for key, value in variables.items() if isinstance(value, str)}
    if len(texts) < len(variables):
        header = _learn_turn_format(renderer.template, tuple(sorted(texts.items()))).header
        if form.generation_prompt.startswith(header):
            return replace(form, header=header)
    return form


@lru_cache(maxsize=64)
def _learn_turn_format(template: str, variables: tuple) -> TurnFormat:
    renderer = TemplateRenderer(template, dict(variables))
    for blocks in (False, True):
        answer = try_render(renderer, probe_messages("Uqx", "Aqx", blocks=blocks))
        if answer is not None and answer.count("Aqx") == 1 and answer.find("Uqx") < answer.index("Aqx"):
            break
    else:
        raise ValueError(
            "The chat template does not render the conversation user → assistant with both contents in that order, so "
            "what the assistant wrote cannot be found. Check the template, or mark the assistant's text in it with "
            "{% generation %} … {% endgeneration %}."
        )
    header, generation_prompt = _learn_header(renderer, blocks)
    reasoned = {"role": "assistant", "content": "Aqx", "reasoning_content": "Rqx", "thinking": "Rqx"}
    text = try_render(renderer, [*probe_messages("Uqx", blocks=blocks), *_in_blocks([reasoned], blocks)])
    repeats_header = bool(header) and (text or "").count(header) > 1
    ends = _learn_ends(renderer, blocks)
    openers = () if ends else _learn_openers(renderer, blocks)
    return TurnFormat(header, generation_prompt, ends, openers, blocks, repeats_header)


def _learn_header(renderer: TemplateRenderer, blocks: bool) -> tuple[str, str]:
    """Where an assistant's words begin after different users' words, and how far the generation prompt agrees."""
    before = []
    for turns in (("Uqx", "Aqx"), ("Wqy\nz.", "Aqx"), ("Uqx", "Bqx", "Wqy", "Aqx"), ("Uqx", "Aqx", "Wqy")):
        text = try_render(renderer, probe_messages(*turns, blocks=blocks))
        if text is not None and text.count("Aqx") == 1:
            before.append(text[: text.index("Aqx")])
    shared = _common_suffix(before)
    prompt = try_render(renderer, probe_messages("Uqx", blocks=blocks), add_generation_prompt=True)
    plain = try_render(renderer, probe_messages("Uqx", blocks=blocks))
    if prompt is None or plain is None or prompt == plain:
        return shared, ""
    begin = common_prefix_length(prompt, plain)
    if begin < len(plain):  # an end-of-text token stands in the other's place: do not cut through its first characters
        begin -= len(re.search(r"[<\[]?[|/]*\Z", prompt[:begin]).group())
    generation_prompt = prompt[begin:]
    # The same header in front of dropped, empty and given thinking: the shortest agreement of all of them.
    header = generation_prompt
    for text in before:
        header = _common_prefix(header, text[_last_header(text, generation_prompt) :])
    thinking = {"reasoning_content": "Rqx", "thinking": "Rqx"}
    question = probe_messages("Uqx", blocks=blocks)
    for message in ({"role": "assistant", "content": "Aqx", **thinking}, probe_call({"k": "v"})):
        text = try_render(renderer, [*question, *_in_blocks([message], blocks)])
        if text is not None and text.startswith(prompt[:begin]):
            agreed = _common_prefix(header, text[begin:])
            header = agreed if agreed.strip() else header
    return (header or shared), generation_prompt


def _last_header(text: str, generation_prompt: str) -> int:
    """Where in `text` the longest beginning of the generation prompt occurs last."""
    for length in range(len(generation_prompt), 0, -1):
        position = text.rfind(generation_prompt[:length])
        if position >= 0:
            return position
    return len(text)


def _learn_ends(renderer: TemplateRenderer, blocks: bool) -> tuple[str, ...]:
    """What ends the assistant's words: in an earlier turn, in the last one, and after a tool call."""

    def after(content: str, *turns: str, opened: bool = False) -> str:
        text = try_render(renderer, probe_messages(*turns, blocks=blocks), opened) or ""
        return text.partition(content)[2]

    last = after("Aqx", "Uqx", "Aqx")
    inner = after("Aqx", "Uqx", "Aqx", "Wqy").partition("Wqy")[0]
    ends = []
    if last.strip():
        ends.append(_first_tags(_common_prefix(last, inner) if inner else last) or _first_tags(last) or last)
        # Where an earlier turn ends otherwise than the last: by what ends a user's turn too, not by a user's header.
        ends.append(FIRST_TAG.match(_common_prefix(inner, after("Uqx", "Uqx", opened=True))).group())
    for arguments in ({"k": "vqx"}, '{"k": "vqx"}') if ends else ():
        text = try_render(renderer, [*probe_messages("Uqx", blocks=blocks), probe_call(arguments)])
        if text is not None and "vqx" in text and (tag := LAST_TAG.search(text.rstrip())):
            ends.append(tag.group())
            break
    return tuple(dict.fromkeys(end.strip() for end in ends if end.strip()))


def _learn_openers(renderer: TemplateRenderer, blocks: bool) -> tuple[str, ...]:
    """What stands between the assistant's words and the next message's, for each role that may follow."""
    openers = []
    for role in ("user", "tool", "system"):
        follow = _in_blocks([{"role": role, "content": "Wqy", "name": "qxprobe"}], blocks)
        text = try_render(renderer, [*probe_messages("Uqx", "Aqx", blocks=blocks), *follow]) or ""
        between = text.partition("Aqx")[2].partition("Wqy")[0].strip()
        openers.append(FIRST_TAG.match(between).group() or between)
    return tuple(dict.fromkeys(opener for opener in openers if opener))


def _first_tags(text: str) -> str:
    return FIRST_TAGS.match(text).group()


def _common_suffix(texts: Sequence[str]) -> str:
    return reduce(_common_prefix, [text[::-1] for text in texts])[::-1]


def _common_prefix(first: str, second: str) -> str:
    return first[: common_prefix_length(first, second)]


def assistant_spans(
    renderer: TemplateRenderer, messages: Messages, text: str, add_generation_prompt: bool = False
) -> list[Span]:
    """
    The character ranges of a rendered conversation that the assistant wrote.

    Args:
        renderer: the template with its variables and tools.
        messages: the conversation.
        text: its rendering.
        add_generation_prompt: whether `text` ends with a generation prompt; that is never part of a range.

    Returns:
        One range per assistant message, in order, end-of-turn token included.

    Raises:
        ValueError: a turn cannot be found; the message says which.
    """
    if not any(message.get("role") == "assistant" for message in messages):
        return []
    finder = _TurnFinder(renderer, messages, text, add_generation_prompt, learn_turn_format(renderer))
    return list(finder.spans())


class _TurnFinder:
    """Finds the turns of one conversation in its rendering, from the first to the last."""

    def __init__(
        self, renderer: TemplateRenderer, messages: Messages, text: str, add_generation_prompt: bool, form: TurnFormat
    ) -> None:
        self.renderer, self.messages, self.text, self.form = renderer, messages, text, form
        opened = add_generation_prompt and form.generation_prompt and text.endswith(form.generation_prompt)
        self.stop = len(text) - len(form.generation_prompt) if opened else len(text)
        self._fenced: str | None = None

    def spans(self) -> Iterator[Span]:
        cursor = turn = 0
        for index, message in enumerate(self.messages):
            if message.get("role") != "assistant":
                continue
            start = self._start_by_prefix(index)
            if start is None or start < cursor:
                start = self._start_by_header(turn, cursor)
            end = None if start is None or start < cursor else self._end(index, start)
            if end is None:
                raise ValueError(
                    f"Message {index} (assistant) cannot be found in the rendered conversation: the chat template "
                    "renders it differently once later messages follow, or not at all, so it is unclear which "
                    "tokens to train. Check that the template accepts this order of roles, or mark the assistant's "
                    "text in the template with {% generation %} … {% endgeneration %} "
                    "(trl.get_training_chat_template(tokenizer) derives such a template)."
                )
            yield start, end
            cursor, turn = end, turn + 1

    def _start_by_prefix(self, index: int) -> int | None:
        """The end of the conversation before the turn, rendered with the generation prompt."""
        prompt = try_render(self.renderer, self.messages[:index], True) if index else None
        if prompt is None:
            return None
        form = self.form
        if self.text.startswith(prompt):
            opened = form.generation_prompt and prompt.endswith(form.generation_prompt)
            return len(prompt) if opened else self._after_header(len(prompt))
        if form.generation_prompt and prompt.endswith(form.generation_prompt):
            opened = prompt.removesuffix(form.generation_prompt) + form.header
            return len(opened) if self.text.startswith(opened) else None
        return None

    def _after_header(self, position: int) -> int:
        """Skip what is left of the header, where the template writes it for a message but not as generation prompt."""
        header = self.form.header
        begin = self.text.find(header, max(position - len(header), 0)) if header else -1
        return begin + len(header) if 0 <= begin <= position else position

    def _start_by_header(self, turn: int, cursor: int) -> int | None:
        """The end of the turn's header, where headers and assistant messages can be matched one to one."""
        form, fenced = self.form, self.fenced
        if not form.header or fenced is None:
            return None
        headers = [match.start() for match in re.finditer(re.escape(form.header), fenced[: self.stop])]
        if len(headers) != sum(message.get("role") == "assistant" for message in self.messages):
            if not form.repeats_header:
                return None
            headers = [position for position in headers if position >= cursor]
            turn = 0
        if turn >= len(headers):
            return None
        start = headers[turn] + len(form.header)
        written = form.generation_prompt.removeprefix(form.header)
        return start + len(written) if self.text.startswith(written, start) else start

    def _end(self, index: int, start: int) -> int | None:
        end = self._end_by_prefix(index, start)
        if end is None:
            end = self._end_by_suffix(index, start)
        if end is None:
            return self._end_by_token(index, start)
        # Blanks behind the end-of-turn token belong to the next message; without such a token they end the turn.
        trimmed = self.text[start:end].rstrip()
        return start + len(trimmed) if trimmed.endswith(self.form.ends) else end

    def _end_by_prefix(self, index: int, start: int) -> int | None:
        for opened in (True, False):
            closed = try_render(self.renderer, self.messages[: index + 1], opened)
            if closed is None:
                continue
            if opened:
                closed = closed.removesuffix(self.form.generation_prompt)
            if start <= len(closed) <= self.stop and self.text.startswith(closed):
                return len(closed)
        return None

    def _end_by_suffix(self, index: int, start: int) -> int | None:
        """The later messages look the same after any assistant message; what they add is cut off from the end."""
        later = self.messages[index + 1 :]
        if not later or later[0].get("role") == "tool":
            return None
        dummy = probe_messages("Uqx", "Aqx", blocks=self.form.wants_blocks)
        tail = (try_render(self.renderer, [*dummy, *later]) or "").partition("Aqx")[2]
        end = len(self.text[: self.stop]) - len(tail)
        if not tail or end < start or not self.text.startswith(tail, end):
            return None
        return end + max((len(token) for token in self.form.ends if tail.startswith(token)), default=0)

    def _end_by_token(self, index: int, start: int) -> int | None:
        """The first end-of-turn token behind the message's own words."""
        fenced = self.fenced if self.fenced is not None else self.text
        position = start
        for word in _words(self.messages[index]):
            found = self.text.find(word, position, self.stop)
            position = found + len(word) if found >= 0 else position
        closing = [(token, len(token)) for token in self.form.ends] + [(token, 0) for token in self.form.openers]
        found = [(fenced.find(token, position, self.stop), kept) for token, kept in closing]
        return min((begin + kept for begin, kept in found if begin >= 0), default=None)

    @property
    def fenced(self) -> str | None:
        """The same rendering, every header or end token that a message quotes written in fence characters."""
        if self._fenced is None:
            tokens = self.form.tokens
            quoted = [_fence(message, tokens) for message in self.messages]
            text = self.text
            if quoted != self.messages:
                closing = self.stop < len(self.text)
                text = try_render(self.renderer, quoted, closing) or ""
            self._fenced = text
        return self._fenced if len(self._fenced) == len(self.text) else None


def _fence(value: Any, tokens: Sequence[str]) -> Any:
    if isinstance(value, str):
        for token in tokens:
            value = value.replace(token, FENCE * len(token))
        return value
    if isinstance(value, dict):
        return {key: item if key == "role" else _fence(item, tokens) for key, item in value.items()}
    return [_fence(item, tokens) for item in value] if isinstance(value, list) else value


def _words(message: dict[str, Any]) -> Iterator[str]:
    """The texts of a message in the order in which templates write them."""
    content = message.get("content")
    for block in content if isinstance(content, list) else [{"text": content}]:
        if isinstance(block, dict) and isinstance(block.get("text"), str):
            yield block["text"].strip()
    for call in message.get("tool_calls") or []:
        function = call.get("function", call)
        yield function["name"]
        arguments = function.get("arguments")
        if isinstance(arguments, dict):
            yield from (value for value in arguments.values() if isinstance(value, str))
