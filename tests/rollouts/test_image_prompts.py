"""Images in prompts and in what tools return, with a real Llava processor and model."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from tests.conftest import build_tokenizer
from tests.data.vision_helpers import IMAGE_TOKENS, build_image, build_processor
from tests.rollouts.helpers import ScriptedEngine, tool_call
from trl.data.formats import DatasetFormatError
from trl.rollouts.conversation import Conversations
from trl.rollouts.environments import EnvironmentPool
from trl.rollouts.image_prompts import collate_model_inputs, extend_model_inputs, images_in
from trl.rollouts.transformers_engine import TransformersEngine
from trl.rollouts.types import SamplingParams

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' }}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for b in m.content %}{{ '<image>' if b.type == 'image' else b.text }}{% endfor %}{% endif %}"
    '{% for c in m.tool_calls or [] %}{{ \'<tool_call>\n{"name": "\' ~ c.function.name ~ \'", "arguments": \' ~ '
    "(c.function.arguments | tojson) ~ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SAMPLING = SamplingParams(max_completion_length=200)
RED, BLUE = build_image(), build_image((20, 20, 220))


@pytest.fixture(scope="module")
def processor():
    processor = build_processor(build_tokenizer())
    processor.chat_template = TEMPLATE
    return processor


def build_llava(processor, **settings):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, **settings}
    text = LlamaConfig(
        vocab_size=512, intermediate_size=64, num_hidden_layers=2, max_position_embeddings=512, **sizes
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config)


def draw(color: str) -> list:
    """
    Draw.

    Args:
        color: which
    """
    return [{"type": "text", "text": "here:"}, {"type": "image", "image": BLUE}]


def conversations_of(processor, script, **options):
    engine = ScriptedEngine(processor.tokenizer, script)
    return Conversations(engine, processor, eos_token_ids=[processor.tokenizer.eos_token_id], **options)


def placeholders(processor, ids):
    return ids.count(processor.tokenizer.convert_tokens_to_ids("<image>"))


@pytest.mark.parametrize(
    ("columns", "images"),
    [
        ({"image": RED}, [RED]),
        ({"images": [RED, BLUE]}, [RED, BLUE]),
        ({"image": None, "images": [BLUE]}, [BLUE]),
        ({"images": []}, None),
        ({}, None),
    ],
)
def test_images_of_a_row(processor, columns, images):
    row = {"prompt": [{"role": "user", "content": "what color?"}], **columns}
    [rollout] = conversations_of(processor, [["red"]]).generate([row], SAMPLING)
    count = len(images or [])
    assert rollout.images == images
    assert placeholders(processor, rollout.prompt_ids) == count * IMAGE_TOKENS
    if count:
        assert rollout.model_inputs["pixel_values"].shape == (count, 3, 28, 28)
    else:
        assert rollout.model_inputs == {}


def test_images_that_an_environment_shows(processor):
    class Gallery:
        def reset(self, **row):
            return [{"type": "image", "image": RED}]

    conversations = conversations_of(processor, [["red"]], environments=EnvironmentPool(Gallery))
    [rollout] = conversations.generate([{"prompt": [{"role": "user", "content": "what color?"}]}], SAMPLING)
    assert rollout.images == [RED]
    assert placeholders(processor, rollout.prompt_ids) == IMAGE_TOKENS
    assert rollout.model_inputs["pixel_values"].shape[0] == 1


def test_images_that_a_tool_returns(processor):
    row = {"prompt": [{"role": "user", "content": "draw"}], "images": [RED]}
    conversations = conversations_of(processor, [[tool_call("draw", color="blue")], ["blue"]], tools=[draw])
    [rollout] = conversations.generate([row], SAMPLING)
    assert rollout.tool_failures == 0
    assert rollout.images == [RED, BLUE]
    assert placeholders(processor, rollout.prompt_ids) == IMAGE_TOKENS
    assert placeholders(processor, rollout.completion_ids) == IMAGE_TOKENS
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    pairs = zip(rollout.completion_ids, rollout.policy_mask, strict=True)
    assert not any(mine for token, mine in pairs if token == image_id)
    pixels = rollout.model_inputs["pixel_values"]
    assert pixels.shape[0] == 2
    assert torch.equal(pixels, processor.image_processor([RED, BLUE], return_tensors="pt")["pixel_values"])
    assert rollout.completion[1]["content"][1]["image"] is BLUE


def test_a_text_model_is_told_that_it_cannot_see(processor):
    engine = ScriptedEngine(processor.tokenizer, [[tool_call("draw", color="blue")], ["oh"]])
    tokenizer = build_tokenizer(TEMPLATE)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    conversations = Conversations(engine, tokenizer, eos_token_ids=[tokenizer.eos_token_id], tools=[draw])
    [rollout] = conversations.generate([{"prompt": [{"role": "user", "content": "draw"}]}], SAMPLING)
    assert "this model reads only text" in rollout.completion[1]["content"]
    assert rollout.tool_failures == 1
    with pytest.raises(DatasetFormatError, match="a processor, not only a tokenizer"):
        conversations.generate([{"prompt": [{"role": "user", "content": "draw"}], "image": RED}], SAMPLING)
    with pytest.raises(DatasetFormatError, match="a conversational prompt"):
        conversations_of(processor, []).generate([{"prompt": "draw", "image": RED}], SAMPLING)


def test_a_model_sees_the_images_of_its_own_row(processor):
    """Rows with and without images in one batch: as each row alone."""
    model = build_llava(processor)
    tokenizer = processor.tokenizer
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    engine = TransformersEngine(
        model, Accelerator(cpu=True), pad_token_id=tokenizer.pad_token_id, eos_token_ids=[tokenizer.eos_token_id],
        suppress_tokens=[image_id],
    )  # fmt: skip
    conversations = Conversations(engine, processor, eos_token_ids=[tokenizer.eos_token_id])
    prompt = [{"role": "user", "content": "what color?"}]
    rows = [{"prompt": prompt, "image": RED}, {"prompt": prompt}, {"prompt": prompt, "images": [BLUE, RED]}]
    greedy = SamplingParams(max_completion_length=6, temperature=0.0, with_logps=True)
    together = conversations.generate(rows, greedy)
    for row, rollout in zip(rows, together, strict=True):
        [alone] = conversations.generate([row], greedy)
        assert rollout.completion_ids == alone.completion_ids
        torch.testing.assert_close(
            torch.tensor(rollout.sampled_logps), torch.tensor(alone.sampled_logps), atol=1e-5, rtol=1e-4
        )
    [other] = conversations.generate([{"prompt": prompt, "image": BLUE}], greedy)
    assert other.sampled_logps != together[0].sampled_logps


def test_token_types_grow_with_the_stream():
    first = {"mm_token_type_ids": torch.tensor([[0, 1]]), "pixel_values": torch.ones(1, 3)}
    grown = extend_model_inputs(
        first, {"mm_token_type_ids": torch.tensor([1, 0]), "pixel_values": torch.zeros(2, 3)}, 4
    )
    assert grown["mm_token_type_ids"].tolist() == [[0, 1, 0, 0, 1, 0]]
    assert grown["pixel_values"].tolist() == [[1.0] * 3, [0.0] * 3, [0.0] * 3]
    assert extend_model_inputs({}, {"pixel_values": torch.ones(1, 3)}, 4)["pixel_values"].shape == (1, 3)
    assert first["mm_token_type_ids"].tolist() == [[0, 1]]


def test_rows_are_padded_on_the_left():
    first = {"pixel_values": torch.ones(2, 3), "mm_token_type_ids": torch.tensor([[0, 1]])}
    batch = collate_model_inputs([first, {"pixel_values": torch.zeros(1, 3)}, {}], [3, 4, 2])
    assert batch["pixel_values"].tolist() == [[1.0] * 3, [1.0] * 3, [0.0] * 3]
    assert batch["mm_token_type_ids"].tolist() == [[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_images_in_messages():
    blocks = [{"type": "image"}, {"type": "image", "image": RED}, {"type": "text", "text": "?"}]
    assert images_in([{"role": "user", "content": blocks}, {"role": "assistant", "content": "red"}]) == [RED]
    assert images_in("text") == []
