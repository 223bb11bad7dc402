"""Prompts with images on the real server, with Transformers' model code in it."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import build_tokenizer
from tests.data.vision_helpers import build_image, build_processor
from tests.rollouts.test_image_prompts import TEMPLATE
from tests.rollouts.test_vllm_server_engine import make_engine, shift
from tests.rollouts.vllm_server_process import KEY, ServerProcess
from trl.rollouts.image_prompts import encode_with_images
from trl.rollouts.types import Prompt, SamplingParams

pytestmark = pytest.mark.slow

IMAGES = [build_image(), build_image((20, 20, 220))]


@pytest.fixture(scope="module")
def processor():
    processor = build_processor(build_tokenizer())
    processor.chat_template = TEMPLATE
    return processor


@pytest.fixture(scope="module")
def model(processor):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
             "initializer_range": 0.2}  # fmt: skip
    config = LlavaConfig(
        text_config=LlamaConfig(vocab_size=512, num_key_value_heads=1, max_position_embeddings=512, **shape),
        vision_config=CLIPVisionConfig(image_size=28, patch_size=14, **shape),
        image_token_index=processor.image_token_id,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def server(tmp_path_factory, model, processor):
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("vllm-server")
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    with ServerProcess(str(folder / "model"), folder, "--model-impl", "transformers") as process:
        yield process


def test_log_probs_of_prompts_with_images_agree_after_updates(server, model, processor, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    engine = make_engine(
        server.url, verify="probe", request_timeout=60.0, with_images=True, processing_class=processor
    )
    prompts = []
    for image in IMAGES:
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it"}]}]
        ids, inputs = encode_with_images(processor, messages, [image], add_generation_prompt=True)
        prompts.append(Prompt(ids, images=[image], model_inputs=inputs))
    prompts.append(Prompt([5, 6, 7]))
    for _ in range(2):
        shift(model)
        engine.update_weights(model)
        rollouts = engine.generate(prompts, SamplingParams(max_completion_length=8, n=2, with_logps=True, seed=1))
        for prompt, rollout in zip([prompt for prompt in prompts for _ in range(2)], rollouts, strict=True):
            ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
            with torch.no_grad():
                logps = (
                    model(input_ids=ids, pixel_values=prompt.model_inputs.get("pixel_values"))
                    .logits[0]
                    .log_softmax(-1)
                )
            start = len(rollout.prompt_ids) - 1
            expected = [logps[start + at, token].item() for at, token in enumerate(rollout.completion_ids)]
            assert rollout.sampled_logps == pytest.approx(expected, abs=1e-4)
    engine.close()
