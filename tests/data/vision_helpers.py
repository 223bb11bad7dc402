"""Real processors for images around the tests' small tokenizer, made here: nothing is downloaded."""

from __future__ import annotations

import copy

IMAGE_TOKENS = 4  # 28 x 28 pixels in patches of 14
TEMPLATE = (
    "{% for m in messages %}{{ m.role + ':' }}{% if m.role == 'assistant' %}{% generation %}"
    "{% for b in m.content %}{{ b.text }}{% endfor %}{{ '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{% for b in m.content %}{{ '<image>' if b.type == 'image' else b.text }}{% endfor %}{{ '<|im_end|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def build_processor(tokenizer):
    """A Llava processor."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="full", chat_template=TEMPLATE
    )


def build_gemma_processor(tokenizer):
    """A Gemma 3 processor: its placeholder becomes other tokens than itself, and it tells image tokens by type."""
    from transformers import Gemma3ImageProcessor, Gemma3Processor, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(tokenizer.backend_tokenizer),
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        extra_special_tokens={"image_token": "<soft>", "boi_token": "<image>", "eoi_token": "</image>"},
    )
    images = Gemma3ImageProcessor(size={"height": 28, "width": 28})
    return Gemma3Processor(images, tokenizer, chat_template=TEMPLATE, image_seq_length=IMAGE_TOKENS)


def build_image(color=(200, 30, 30)):
    from PIL import Image

    return Image.new("RGB", (28, 28), color)
