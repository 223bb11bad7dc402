"""
A sample of prompts, completions and their rewards as a table in the terminal.
"""

from __future__ import annotations

import random
from typing import Any

from transformers.utils import is_rich_available


def _as_text(content: Any) -> Any:
    """A prompt or completion as rich text: a conversation with its roles, anything else as it is."""
    from rich.text import Text

    if not isinstance(content, list):
        return Text(str(content))
    text = Text()
    for index, message in enumerate(content):
        text.append("\n\n" if index else "")
        text.append(f"{message['role']}\n", style="bold")
        parts = message.get("content") or ""
        if isinstance(parts, list):
            parts = "".join(part.get("text") or f"<{part['type']}>" for part in parts)
        text.append(parts)
        for call in message.get("tool_calls") or []:
            function = call.get("function", call)
            text.append(f"\n{function.get('name')}({function.get('arguments')})", style="italic")
    return text


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def print_prompt_completions_sample(
    prompts: list,
    completions: list,
    rewards: dict[str, list[float]],
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
        rewards: values by reward function, one per completion.
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
    from rich.text import Text

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
        cells: list[Any] = [_as_text(prompts[row]), _as_text(completions[row])]
        cells += [_number(values[row]) for values in rewards.values()]
        if advantages is not None:
            cells.append(_number(advantages[row]))
        cells += [Text(str(values[row])) for values in extra.values()]
        table.add_row(*cells)
    Console().print(Panel(table, title=f"Step {step}", border_style="dim"))
