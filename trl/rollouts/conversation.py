"""
Rollouts of several turns: the policy speaks, calls tools, reads their results and goes on.

Tokens in, tokens out. The stream of a rollout is its prompt, what the policy sampled, what tools added, and so on; it
only grows at its end and nothing in it is ever tokenized again, so the policy is trained on the very tokens it
sampled. Messages are read from it for tools and reward functions, never the other way round.

What is left out: branching conversations, and a user who answers (make that an environment's tool).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from transformers import ProcessorMixin

from ..data.chat_templates import tokenize_conversation
from ..data.formats import DatasetFormatError
from ..data.template_rendering import Messages, ProcessingClass, inner_tokenizer
from ..data.templating import drop_none_fields
from ..data.tool_formats import parse_response
from ..data.vision import decode_images
from .environments import EnvironmentPool, append_observation, environment_tools
from .image_prompts import encode_with_images, extend_model_inputs, images_in
from .tool_templates import prepare_for_tools, tool_suffix
from .tools import ToolRequest, ToolResult, ToolRunner, tool_schema, tools_by_name
from .types import Prompt, Rollout, RolloutEngine, SamplingParams, is_truncated

IMAGE_COLUMNS = ("image", "images")


@dataclass
class Episode:
    """A rollout in the making."""

    prompt: str | Messages
    prompt_ids: list[int]
    tools: dict[str, Callable] = field(default_factory=dict)
    schemas: list[dict[str, Any]] | None = None
    environment: Any = None
    images: list[Any] = field(default_factory=list)
    model_inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    completion_ids: list[int] = field(default_factory=list)
    policy_mask: list[int] = field(default_factory=list)
    logps: list[float] | None = field(default_factory=list)
    messages: Messages = field(default_factory=list)
    tool_calls: int = 0
    tool_failures: int = 0
    turns: int = 0
    has_ended: bool = False
    error: str | None = None

    @property
    def length(self) -> int:
        """Tokens of prompt and completion so far."""
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def is_conversational(self) -> bool:
        return not isinstance(self.prompt, str)

    @property
    def pending_calls(self) -> list[Any]:
        """Calls of the last message that are still to be answered."""
        if self.has_ended or self.error is not None or not self.messages:
            return []
        return self.messages[-1].get("tool_calls") or []

    def to_prompt(self) -> Prompt:
        return Prompt(self.prompt_ids + self.completion_ids, self.images or None, self.model_inputs)

    def append(self, ids: Sequence[int], logps: Sequence[float] | None, by_policy: bool) -> None:
        """Let the stream grow at its end."""
        self.completion_ids += ids
        self.policy_mask += [int(by_policy)] * len(ids)
        if logps is None:
            self.logps = None
        elif self.logps is not None:
            self.logps += logps


class Conversations:
    """
    Turns rows of a dataset into rollouts, with any engine.

    Args:
        engine: what samples.
        processing_class: tokenizer, or the processor that holds it. With tools it gets a `response_template` if it has
            none.
        eos_token_ids: tokens that end a turn.
        tools: functions that the model may call, with type hints and docstrings; plain or `async`.
        environments: the environments of the rows.
        chat_template: template to use instead of the tokenizer's own.
        chat_template_kwargs: further variables of the template.
        max_tool_calling_iterations: most rounds of running calls and going on; `None`: no limit but the length.
        tool_runner: runs the calls.
        accelerator: of a run with several processes, whose engines must be called together.

    Attributes:
        chat_template: the template that prompts and results are tokenized with; `None` for the tokenizer's own.

    Raises:
        ValueError: the chat template cannot be used with tools, or a tool cannot be described.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        processing_class: ProcessingClass,
        *,
        eos_token_ids: Iterable[int],
        tools: Sequence[Callable] | None = None,
        environments: EnvironmentPool | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        max_tool_calling_iterations: int | None = None,
        tool_runner: ToolRunner | None = None,
        accelerator: Accelerator | None = None,
    ):
        self.engine = engine
        self.processing_class = processing_class
        self.tokenizer = inner_tokenizer(processing_class)
        self.eos_token_ids = list(eos_token_ids)
        self.tools = list(tools or [])
        self.environments = environments
        self.chat_template = chat_template
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.max_tool_calling_iterations = max_tool_calling_iterations
        self.tool_runner = tool_runner or ToolRunner()
        self.accelerator = accelerator
        self._schemas = self._describe_tools()
        if self.has_tools:
            self.chat_template = prepare_for_tools(processing_class, chat_template)

    @property
    def has_tools(self) -> bool:
        """Whether there is anything to call."""
        return any(self._schemas.values())

    def generate(self, rows: Sequence[Mapping[str, Any]], sampling: SamplingParams) -> list[Rollout]:
        """
        One rollout (with `sampling.n`, several) per row.

        Args:
            rows: of the dataset, with `prompt` (text or messages) and whatever environments ask for; not changed.
            sampling: how; its `max_completion_length` bounds all turns and tool results of a rollout together.

        Returns:
            Rollouts in the order of the rows. In a run of several processes, all call this together.
        """
        episodes = self._begin([row for row in rows for _ in range(sampling.n)])
        sampling = replace(sampling, n=1)
        for episode, rollout in zip(episodes, self._sample(episodes, sampling), strict=True):
            self._add_turn(episode, rollout, None)
        rounds = 0
        while self.has_tools and (
            self.max_tool_calling_iterations is None or rounds < self.max_tool_calling_iterations
        ):
            active = [episode for episode in episodes if episode.pending_calls]
            if not self._on_any_process(bool(active)):
                break
            self._go_on(active, sampling)
            rounds += 1
        return [self._finish(episode) for episode in episodes]

    def close(self) -> None:
        """End the tools' threads."""
        self.tool_runner.close()

    # ---- The first turn ----

    def _describe_tools(self) -> dict[str | None, list[dict[str, Any]]]:
        """What the model is told of the tools, by environment."""
        own = [tool_schema(tool) for tool in self.tools]
        if self.environments is None:
            tools_by_name(self.tools)
            return {None: own}
        schemas = {}
        for name in self.environments.factories:
            tools = self.environments.tools_of(name)
            tools_by_name([*self.tools, *tools])
            schemas[name] = own + [tool_schema(tool) for tool in tools]
        return schemas

    def _begin(self, rows: Sequence[Mapping[str, Any]]) -> list[Episode]:
        instances = self.environments.acquire(rows) if self.environments is not None else [None] * len(rows)
        episodes = []
        for row, environment in zip(rows, instances, strict=True):
            previous = episodes[-1] if episodes else None
            episodes.append(self._begin_one(row, environment, previous))
        return episodes

    def _begin_one(self, row: Mapping[str, Any], environment: Any, previous: Episode | None) -> Episode:
        name = self.environments.name_of(row) if self.environments is not None else None
        schemas = self._schemas[name] or None
        prompt = copy.deepcopy(self._prompt_of(row))
        if not isinstance(prompt, str):
            prompt = decode_images(prompt)
        if environment is not None:
            prompt = append_observation(prompt, self._reset(environment, row))
        if schemas and isinstance(prompt, str):
            raise DatasetFormatError(
                "Tools are called in conversations, but the column `prompt` holds text. Make it a list of messages: "
                '[{"role": "user", "content": ...}].'
            )
        images = self._images_of(row)
        same = previous is not None and (previous.prompt, previous.schemas) == (prompt, schemas)
        if same and not images and not previous.images:  # a group has one prompt
            prompt_ids, model_inputs = list(previous.prompt_ids), {}
        else:
            prompt_ids, model_inputs = self._tokenize_prompt(prompt, schemas, images)
        tools = tools_by_name([*self.tools, *(environment_tools(environment) if environment is not None else [])])
        images = images or images_in(prompt)
        return Episode(prompt, prompt_ids, tools, schemas, environment, images, model_inputs)

    def _prompt_of(self, row: Mapping[str, Any]) -> str | Messages:
        if row.get("prompt") is not None:
            return row["prompt"]
        if self.environments is None:
            raise DatasetFormatError(f"A row has no `prompt`. Found the columns: {', '.join(row) or 'none'}.")
        return [{"role": "user", "content": ""}]

    def _reset(self, environment: Any, row: Mapping[str, Any]) -> Any:
        name = type(environment).__name__
        try:
            observation = environment.reset(**self.environments.reset_arguments(row))
            if inspect.iscoroutine(observation):
                observation = self.tool_runner.wait_for(observation, f"`reset` of the environment {name}")
        except Exception as error:
            raise RuntimeError(
                f"`reset` of the environment {name} failed: {type(error).__name__}: {error}. It was called with the "
                f"row's columns: {', '.join(row) or 'none'}."
            ) from error
        return observation

    def _images_of(self, row: Mapping[str, Any]) -> list[Any]:
        images = next((row[column] for column in IMAGE_COLUMNS if row.get(column) is not None), [])
        return list(images) if isinstance(images, list | tuple) else [images]

    def _tokenize_prompt(
        self, prompt: str | Messages, schemas: list[dict[str, Any]] | None, images: list[Any]
    ) -> tuple[list[int], dict[str, torch.Tensor]]:
        options = {
            "tools": schemas,
            "add_generation_prompt": True,
            "chat_template": self.chat_template,
            **self.chat_template_kwargs,
        }
        if not isinstance(prompt, str):
            prompt = drop_none_fields(prompt)
        if images or images_in(prompt):
            return encode_with_images(self.processing_class, prompt, images, **options)
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt)["input_ids"]), {}
        return tokenize_conversation(self.processing_class, prompt, **options)["input_ids"], {}

    # ---- The turns ----

    def _sample(self, episodes: Sequence[Episode], sampling: SamplingParams) -> list[Rollout]:
        return self.engine.generate([episode.to_prompt() for episode in episodes], sampling)

    def _add_turn(self, episode: Episode, rollout: Rollout, room: int | None) -> None:
        """Put what the policy said on the end of the stream, cut to the room there is, and read it as a message."""
        ids = rollout.completion_ids[:room]
        logps = rollout.sampled_logps
        prefix = episode.prompt_ids + episode.completion_ids
        episode.append(ids, logps[: len(ids)] if logps is not None else None, by_policy=True)
        episode.turns += 1
        episode.error = episode.error or rollout.error
        if not episode.is_conversational:
            return
        if ids or not episode.messages:
            episode.messages.append(read_message(self.tokenizer, ids, prefix, episode.schemas))

    def _go_on(self, episodes: Sequence[Episode], sampling: SamplingParams) -> None:
        """One round: run the calls, append their results, sample the next turn of every row that has room for one."""
        requests = [ToolRequest(episode.pending_calls, episode.tools) for episode in episodes]
        speaking = []
        for episode, results in zip(episodes, self.tool_runner.run(requests), strict=True):
            results = [self._readable(result) for result in results]
            episode.tool_calls += len(results)
            episode.tool_failures += sum(result.failed for result in results)
            if self._append_results(episode, results, sampling) and self._room(episode, sampling) != 0:
                speaking.append(episode)
        rooms = [self._room(episode, sampling) for episode in speaking]
        longest = max((room for room in rooms if room is not None), default=sampling.max_completion_length)
        sampled = self._sample(speaking, replace(sampling, max_completion_length=longest))
        for episode, rollout, room in zip(speaking, sampled, rooms, strict=True):
            self._add_turn(episode, rollout, room)

    def _append_results(self, episode: Episode, results: Sequence[ToolResult], sampling: SamplingParams) -> bool:
        """Whether the results fitted; else the rollout ends with its call, as if no one had answered."""
        messages = [result.to_message() for result in results]
        suffix = tool_suffix(
            self.processing_class,
            episode.messages[-1],
            messages,
            self.eos_token_ids,
            last_id=episode.completion_ids[-1] if episode.completion_ids else None,
            chat_template=self.chat_template,
            **self.chat_template_kwargs,
        )
        length = len(episode.completion_ids) + len(suffix.ids)
        limit, context = sampling.max_completion_length, self.engine.max_model_length
        too_long = limit is not None and length > limit
        if too_long or (context is not None and len(episode.prompt_ids) + length >= context):
            episode.has_ended = True
            return False
        episode.model_inputs = extend_model_inputs(episode.model_inputs, suffix.model_inputs, episode.length)
        episode.images += images_in(messages)
        episode.append(suffix.ids, [0.0] * len(suffix.ids), by_policy=False)
        episode.messages += messages
        return True

    def _readable(self, result: ToolResult) -> ToolResult:
        """Content blocks as a text model's template reads them."""
        if isinstance(result.content, str):
            return result
        if isinstance(self.processing_class, ProcessorMixin):
            return result
        kinds = {block["type"] for block in result.content} - {"text"}
        if kinds:
            problem = {"error": f"{result.name!r} returned {', '.join(sorted(kinds))}; this model reads only text."}
            return replace(result, content=str(problem), failed=True)
        return replace(result, content="".join(block["text"] for block in result.content))

    def _room(self, episode: Episode, sampling: SamplingParams) -> int | None:
        """How many more tokens the rollout may have; `None` where nothing bounds it."""
        rooms = []
        if sampling.max_completion_length is not None:
            rooms.append(sampling.max_completion_length - len(episode.completion_ids))
        if self.engine.max_model_length is not None:
            rooms.append(self.engine.max_model_length - episode.length)
        return min(rooms, default=None)

    def _on_any_process(self, flag: bool) -> bool:
        """Whether it holds on any process: an engine on several of them is called by all or by none."""
        if self.accelerator is None or self.accelerator.num_processes == 1:
            return flag
        count = torch.tensor(int(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(count, reduction="sum").item())

    # ---- The end ----

    def _finish(self, episode: Episode) -> Rollout:
        completion: str | Messages = episode.messages
        if not episode.is_conversational:
            completion = self.tokenizer.decode(episode.completion_ids, skip_special_tokens=True)
        stop_ids = [*self.eos_token_ids, self.tokenizer.pad_token_id]
        return Rollout(
            episode.prompt_ids,
            episode.completion_ids,
            sampled_logps=episode.logps,
            policy_mask=episode.policy_mask,
            prompt=episode.prompt,
            completion=completion,
            images=episode.images or None,
            model_inputs=episode.model_inputs,
            is_truncated=is_truncated(episode.completion_ids, stop_ids),
            environment=episode.environment,
            tool_calls=episode.tool_calls,
            tool_failures=episode.tool_failures,
            turns=episode.turns,
            error=episode.error,
        )


def read_message(
    tokenizer: Any, ids: Sequence[int], prefix: Sequence[int] = (), tools: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """
    What the policy said, as a message.

    Args:
        tokenizer: with a `response_template`, reasoning and tool calls are told from the answer.
        ids: one turn.
        prefix: all tokens before it.
        tools: the tools' schemas, which say the types of arguments.
    """
    if getattr(tokenizer, "response_template", None) is not None:
        return parse_response(tokenizer, list(ids), prefix=list(prefix) or None, tools=tools)
    return {"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)}
