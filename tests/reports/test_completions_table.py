import random

import pytest

from trl.reports import completions_table
from trl.reports.completions_table import print_prompt_completions_sample


def _print(capsys, *args, **kwargs):
    print_prompt_completions_sample(*args, **kwargs)
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


def test_everything_is_shown(capsys):
    rewards = {"accuracy": [1.0, None], "length": [0.123, -2.0]}
    text = _print(capsys, ["one?", "two?"], ["1", "2"], rewards, [0.5, -0.5], 42, extra={"answer": ["ein", "zwei"]})
    for part in ("Step 42", "one?", "two?", "accuracy", "1.00", "-", "0.12", "-2.00", "0.50", "Advantage", "zwei"):
        assert part in text, part


def test_conversations_and_tool_calls(capsys):
    prompt = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hm?"}]},
    ]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    text = _print(capsys, [prompt], [[{"role": "assistant", "tool_calls": [call]}]], {"r": [0.0]}, None, 1)
    for part in ("system", "be brief", "hm?", "assistant", "add({'a': 1})"):
        assert part in text, part
    assert "Advantage" not in text


def test_markup_in_a_completion_is_text(capsys):
    assert "[bold]x[/bold]" in _print(capsys, ["p"], ["[bold]x[/bold]"], {"r": [0.0]}, None, 1)


def test_a_sample_does_not_touch_the_random_state(capsys):
    prompts = [f"prompt{index}." for index in range(10)]
    state = random.getstate()
    text = _print(capsys, prompts, prompts, {"r": [0.0] * 10}, None, 3, num_samples=2)
    assert sum(prompt in text for prompt in prompts) == 2
    assert random.getstate() == state
    assert _print(capsys, prompts, prompts, {"r": [0.0] * 10}, None, 3, num_samples=0) == ""


def test_rich_missing(monkeypatch):
    monkeypatch.setattr(completions_table, "is_rich_available", lambda: False)
    with pytest.raises(ImportError, match="pip install rich"):
        print_prompt_completions_sample([], [], {}, None, 0)
