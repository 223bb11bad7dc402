"""
What goes over the wire to a vLLM server and comes back, as plain data: log-probs parsed, images packed.

No connection is made here. Token ids stay ids: the server is asked for tokens as `token_id:17`.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..data.vision import IMAGE_SOURCES
from .vllm_http import ServerError

Logprobs = list[list[list[float | None]]]
TokenIds = list[list[list[int]]]

# ---------------------------------------------------------------------------------------------------------------------
# Answers
# ---------------------------------------------------------------------------------------------------------------------


def parse_logprobs(choices_logprobs: list[dict | None]) -> tuple[Logprobs | None, TokenIds | None]:
    """
    What a server tells of log-probabilities, per completion and token.

    Args:
        choices_logprobs: the `logprobs` of each choice, of any of vLLM's three generation routes, tokens as ids.

    Returns:
        Per completion and token the log-probs told, most probable first, and the ids of their tokens; a log-prob that is
        not a number is `None`. `(None, None)` where a completion has none.
    """
    logprobs, token_ids = [], []
    for choice in choices_logprobs:
        if choice is None or (choice.get("content") is None and choice.get("tokens") is None):
            return None, None
        ranked = [_ranked(place) for place in _places(choice)]
        logprobs.append([[value for _, value in place] for place in ranked])
        token_ids.append([[token for token, _ in place] for place in ranked])
    return logprobs, token_ids


def sampled_logps(choice_logprobs: dict | None) -> list[float] | None:
    """Log-probs of the sampled tokens themselves, NaN where one is not known; `None` where none were told."""
    if choice_logprobs is None:
        return None
    values = choice_logprobs.get("token_logprobs")
    if values is None:
        values = [place.get("logprob") for place in choice_logprobs.get("content") or []]
    return [math.nan if value is None else float(value) for value in values]


def _places(choice: dict) -> Iterator[dict[int, float | None]]:
    """Per token what is told: token ids and log-probs, the sampled one first."""
    if choice.get("content") is not None:
        for place in choice["content"]:
            told = [place, *(place.get("top_logprobs") or [])]
            yield {_token_id(one.get("token_id", one.get("token"))): one.get("logprob") for one in told}
        return
    tops = choice.get("top_logprobs") or [None] * len(choice["tokens"])
    for token, value, top in zip(choice["tokens"], choice["token_logprobs"], tops, strict=True):
        yield {_token_id(name): number for name, number in {token: value, **(top or {})}.items()}


def _ranked(place: dict[int, float | None]) -> list[tuple[int, float | None]]:
    known = {token: value if value is not None and not math.isnan(value) else None for token, value in place.items()}
    return sorted(known.items(), key=lambda pair: -math.inf if pair[1] is None else pair[1], reverse=True)


def _token_id(token: str | int) -> int:
    """`token_id:17` is 17."""
    return token if isinstance(token, int) else int(token.rpartition(":")[2])


def generated(prompt_ids: list[list[int]], choices: list[dict]) -> dict[str, Any]:
    """Prompts and choices as `VLLMClient.generate` returns them."""
    logprobs, token_ids = parse_logprobs([choice.get("logprobs") for choice in choices])
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": [choice["token_ids"] for choice in choices],
        "logprobs": logprobs,
        "logprob_token_ids": token_ids,
    }


def scored_place(place: dict | None, token: int, count: int) -> tuple[list[float], list[int], list[float], list[int]]:
    """Of one token of a sequence: the `count` most probable log-probs and ids, and its own."""
    told = {int(name): (value["logprob"], value.get("rank")) for name, value in (place or {}).items()}
    ranked = sorted(told.items(), key=lambda item: math.inf if item[1][1] is None else item[1][1])[:count]
    missing = count - len(ranked)
    values = [_number(logprob) for _, (logprob, _) in ranked] + [-math.inf] * missing
    ids = [found for found, _ in ranked] + [0] * missing
    return values, ids, [_number(told.get(token, (None, None))[0])], [token]


def _number(value: float | None) -> float:
    return -math.inf if value is None or math.isnan(value) else value


def structured_outputs(regex: str | None) -> dict:
    """The setting that makes completions match a regular expression."""
    return {} if regex is None else {"structured_outputs": {"regex": regex}}


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------

RENDER_PATH = "/v1/chat/completions/render"
_FINAL_ONLY = 2  # vLLM's word for: the whole output at once


def pil_to_base64(image) -> str:
    """An image as PNG in base64."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def to_openai_messages(messages: list[dict]) -> list[dict]:
    """
    Messages as the chat route takes them: images held in blocks become `image_url` parts that carry them.

    Args:
        messages: a conversation, not changed.
    """
    return [
        {**message, "content": [_openai_part(block) for block in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def _openai_part(block: dict) -> dict:
    if block.get("type") not in ("image", "image_pil"):
        return block
    sources = [block[key] for key in (*IMAGE_SOURCES, "image_pil") if block.get(key) is not None]
    if not sources:
        raise ValueError(
            "A message has an image placeholder without an image. Put the image into its block: "
            '`{"type": "image", "image": ...}`.'
        )
    return {"type": "image_url", "image_url": {"url": _image_url(sources[0])}}


def _image_url(image: Any) -> str:
    if isinstance(image, str) and image.startswith(("http://", "https://", "data:")):
        return image
    if isinstance(image, str):
        from transformers.image_utils import load_image

        image = load_image(image)
    return "data:image/png;base64," + pil_to_base64(image)


def render_images(post: Callable[[dict], dict], url: str, model: str, images: list | None) -> dict | None:
    """
    What a server's image processor makes of one prompt's images.

    Args:
        post: sends a body to the render route.
        url: names the server in messages.
        model: that it serves.
        images: the prompt's.

    Raises:
        RuntimeError: the server does not render.
    """
    if not images:
        return None
    parts = [_openai_part({"type": "image", "image": image}) for image in images]
    body = {"model": model, "messages": [{"role": "user", "content": parts}], "max_tokens": 1}
    try:
        return post(body)["features"]
    except ServerError as error:
        if error.status not in (403, 404):
            raise
        raise RuntimeError(
            f"{url} does not prepare images ({error.text}). vLLM 0.30 and later need --enable-scale-out for it, which "
            "`trl vllm-serve` sets."
        ) from error


def features_request(model: str, prompt_ids: list[int], features: dict | None, settings: dict) -> dict:
    """A request of token ids with images, for vLLM's /inference/v1/generate."""
    return {
        "model": model,
        "token_ids": list(prompt_ids),
        "features": features,
        "sampling_params": {**settings, "output_kind": _FINAL_ONLY},
    }


def place_features(features: dict, prompt_ids: list[int], image_token_id: int) -> dict:
    """
    The same features with their placeholders where the prompt has them.

    Args:
        features: of one prompt's images.
        prompt_ids: the prompt, each image's placeholder written out.
        image_token_id: the placeholder's token.

    Raises:
        ValueError: the prompt has other placeholders than the server made for the images.
    """
    lengths = [place["length"] for place in features["mm_placeholders"]["image"]]
    runs = list(_runs(prompt_ids, image_token_id))
    placed, left = [], list(lengths)
    for offset, size in runs:
        end = offset + size
        while left and offset + left[0] <= end:  # images without anything between them are one run
            placed.append({"offset": offset, "length": left[0]})
            offset += left.pop(0)
        if offset != end:
            break
    if left or sum(lengths) != sum(size for _, size in runs):
        raise ValueError(
            f"The prompt's placeholders (runs of the token {image_token_id}) have {[size for _, size in runs]} tokens, "
            f"those that the server made of the same images {lengths}: other images, or trainer and server prepare them "
            "differently. Give both the same processor (same model folder, same sizes)."
        )
    return {**features, "mm_placeholders": {**features["mm_placeholders"], "image": placed}}


def _runs(ids: Iterable[int], token: int) -> Iterator[tuple[int, int]]:
    """Where `token` stands, several in a row together: offset and length."""
    start = None
    for index, found in enumerate([*ids, None]):
        if found == token and start is None:
            start = index
        elif found != token and start is not None:
            yield start, index - start
            start = None
