"""A tokenizer whose template calls tools, and an engine that says what a test wrote down for it."""

from __future__ import annotations

import json

from tests.data.test_tool_formats import chat, tokenizer_of
from trl.data.tool_formats import add_response_schema
from trl.rollouts.types import Rollout, as_prompts

# Mentions a key of messages by name, as templates do that ask whether it is defined.
TEMPLATE = (
    "{% if messages[0].tool_calls is defined %}{{ 'defined' }}{% endif %}{% if tools %}{{ '<|im_start|>system\nTools: ' ~ (tools | tojson) ~ '<|im_end|>\n' }}{% endif %}"
    + chat(
        "{{ '<tool_call>\n{\"name\": \"' ~ name ~ '\", \"arguments\": ' ~ (arguments | tojson) ~ '}\n</tool_call>' }}"
    )
)


def build_tool_tokenizer(template: str = TEMPLATE):
    return add_response_schema(tokenizer_of(template))


def tool_call(name: str, **arguments) -> str:
    """A call as the model writes it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


class ScriptedEngine:
    """
    Says `script[turn][row]`, where rows are those of the first turn; each text gets the end-of-turn token.

    Rows are told apart by their prompt: what they are asked with later begins with what they were asked with first.
    A list instead of a text is taken as token ids.
    """

    def __init__(self, tokenizer, script, max_model_length=None, with_logps=True):
        self.tokenizer = tokenizer
        self.script = script
        self.max_model_length = max_model_length
        self.with_logps = with_logps
        self.calls = []
        self.streams = []

    def generate(self, prompts, sampling):
        prompts = as_prompts(prompts)
        self.calls.append(([prompt.ids for prompt in prompts], sampling))
        turn = len(self.calls) - 1
        if turn == 0:
            self.streams = [list(prompt.ids) for prompt in prompts]
        rollouts, taken = [], set()
        for prompt in prompts:
            row = next(
                index
                for index, stream in enumerate(self.streams)
                if index not in taken and prompt.ids[: len(stream)] == stream
            )
            taken.add(row)
            ids = self.ids_of(self.script[turn][row])[: sampling.max_completion_length]
            self.streams[row] = prompt.ids + ids
            logps = [-0.5 - turn] * len(ids) if self.with_logps else None
            rollouts.append(Rollout(prompt.ids, ids, sampled_logps=logps))
        return rollouts

    def ids_of(self, said):
        if isinstance(said, list):
            return said
        return self.tokenizer(said + "<|im_end|>", add_special_tokens=False)["input_ids"]

    def update_weights(self, model):
        pass

    sleep = wake = close = lambda self: None
