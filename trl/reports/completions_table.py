"""
A sample of prompts, completions and their rewards as a table in the terminal.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from typing import Any

from transformers.utils import is_rich_available

# Where a response parser puts what stood between the thinking tags.
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
# What a model writes is shown, never obeyed: an escape sequence would move the cursor or clear the screen.
_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def render_text(content: Any) -> str:
    """
    A prompt or completion as text to read.

    Args:
        content: text, which stays as it is; or messages. Each message stands under its role, with its reasoning between
            `<think>` and `</think>`, its text (other blocks by their type, as in `<image>`) and its tool calls. A
            single message of the assistant stands without its role.
    """
    is_answer = isinstance(content, list) and [message.get("role") for message in content] == ["assistant"]
    return "".join(text for text, _ in _spans(content, with_roles=not is_answer))


def _spans(content: Any, with_roles: bool = True) -> Iterator[tuple[str, str]]:
    """The pieces of a text, each with its style."""
    if not isinstance(content, list):
        yield str(content), ""
        return
    for index, message in enumerate(content):
        yield "\n\n" if index else "", ""
        if with_roles:
            yield f"{message['role']}\n", "bold"
        for number, (text, style) in enumerate(_message_spans(message)):
            yield ("\n" if number else "") + text, style


def _message_spans(message: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    reasoning = next((message[field] for field in _REASONING_FIELDS if message.get(field)), None)
    if reasoning is not None:
        yield f"<think>{reasoning}</think>", "dim"
    parts = message.get("content") or ""
    text = parts if isinstance(parts, str) else "".join(map(_block_text, parts))
    if text:
        yield text, ""
    for call in message.get("tool_calls") or []:
        function = call.get("function", call)
        yield f"{function.get('name')}({function.get('arguments')})", "italic"


def _block_text(block: Any) -> str:
    if isinstance(block, str):
        return block
    return block.get("text") or ("" if block.get("type") == "text" else f"<{block.get('type')}>")


def _as_rich_text(content: Any) -> Any:
    from rich.text import Text

    return Text.assemble(*((text.translate(_CONTROLS), style) for text, style in _spans(content)))


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.2f}"


def print_prompt_completions_sample(
    prompts: list,
    completions: list,
    rewards: dict[str, list[float | None]],
    advantages: list[float] | None,
    step: int,
    num_samples: int | None = None,
    extra: dict[str, list] | None = None,
) -> None:
    """
    Print completions with their prompts, rewards and advantages.

    Args:
        prompts: texts or conversations.
        completions: likewise, one per prompt.
        rewards: values by reward function, one per completion; None or NaN where it does not apply.
        advantages: one per completion; None leaves the column out.
        step: training step, for the title.
        num_samples: show so many, chosen at random; default all. 0 prints nothing.
        extra: more columns by name, one value per completion.

    Raises:
        ImportError: rich is not installed.
    """
    if not is_rich_available():
        raise ImportError("Printing completions needs rich. `pip install rich`, or set `log_completions=False`.")
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table

    rows = range(len(prompts))
    if num_samples is not None and num_samples < len(prompts):
        if num_samples <= 0:
            return
        # Its own generator: showing a sample must not change what is trained.
        rows = sorted(random.Random(step).sample(rows, num_samples))
    extra = extra or {}
    table = Table(show_header=True, header_style="bold", expand=True, show_lines=True)
    table.add_column("Prompt", ratio=3)
    table.add_column("Completion", ratio=4)
    for name in rewards:
        table.add_column(name, justify="right")
    if advantages is not None:
        table.add_column("Advantage", justify="right")
    for name in extra:
        table.add_column(name)
    for row in rows:
        cells: list[Any] = [_as_rich_text(prompts[row]), _as_rich_text(completions[row])]
        cells += [_number(values[row]) for values in rewards.values()]
        if advantages is not None:
            cells.append(_number(advantages[row]))
        cells += [_as_rich_text(str(values[row])) for values in extra.values()]
        table.add_row(*cells)
    Console().print(Panel(table, title=f"Step {step}", border_style="dim"))
