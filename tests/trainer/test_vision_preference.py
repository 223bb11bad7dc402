"""DPO and KTO on rows with images, with a real tiny Llava: from pixels to log-probs."""

import math

import pytest
import torch
from datasets import Dataset

from tests.data.vision_helpers import IMAGE_TOKENS, build_image, build_processor
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer


@pytest.fixture
def processor(tokenizer):
    return build_processor(tokenizer)


@pytest.fixture
def model(processor):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tokenizer = processor.tokenizer
    sizes = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=16, image_size=28, patch_size=14, **sizes),
        text_config=LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, **sizes),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlavaForConditionalGeneration(config)


@pytest.fixture
def pairs():
    def message(role, text):
        return [{"role": role, "content": text}]

    return [
        {
            "prompt": message("user", "what is this?"),
            "chosen": message("assistant", "blue"),
            "rejected": message("assistant", "the sky is ugly"),
            "images": [build_image((60 * i, 0, 250 - 60 * i))],
        }
        for i in range(4)
    ]


def config(config_class, folder, **options):
    settings = {"max_steps": 2, "logging_steps": 1, "learning_rate": 1e-2, "bf16": False, "report_to": "none"}
    settings |= {"save_strategy": "no", "train_sampling_strategy": "sequential", "per_device_train_batch_size": 4}
    return config_class(str(folder), **settings | options)


@torch.no_grad()
def expected_logps(model, processor, pair, answer) -> float:
    """Log-prob of an answer, from a row by itself, without collator, padding or trainer."""
    prompt = "user:<image>what is this?<|im_end|>assistant:"
    text = prompt + f"{pair[answer][0]['content']}<|im_end|>"
    encoded = processor(images=pair["images"], text=text, return_tensors="pt")
    start = processor(images=pair["images"], text=prompt, return_tensors="pt")["input_ids"].shape[1]
    logps = model(**encoded).logits.log_softmax(-1)
    targets = encoded["input_ids"][0, start:]
    return logps[0, start - 1 : -1].gather(-1, targets[:, None]).sum().item()


def test_dpo(tmp_path, model, processor, pairs):
    """The first log has the log-probs of each row by itself, images in their places, and a loss of ln 2."""
    chosen, rejected = (
        sum(expected_logps(model, processor, pair, answer) for pair in pairs) / len(pairs)
        for answer in ("chosen", "rejected")
    )
    dataset = Dataset.from_list(pairs)
    trainer = DPOTrainer(
        model,
        args=config(DPOConfig, tmp_path),
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=processor,
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    trainer.train()
    first, second = trainer.state.log_history[-3:-1]
    assert first["logps/chosen"] == pytest.approx(chosen, abs=1e-4)
    assert first["logps/rejected"] == pytest.approx(rejected, abs=1e-4)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert second["loss"] < first["loss"] and second["rewards/accuracies"] == 1


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto(loss_type, tmp_path, model, processor, pairs):
    """The same for single answers; the mismatched rows have their images too."""
    rows = [
        {"prompt": pair["prompt"], "images": pair["images"], "completion": pair[side], "label": side == "chosen"}
        for pair, side in zip(pairs, ("chosen", "rejected") * 2, strict=True)
    ]
    chosen = sum(expected_logps(model, processor, pair, "chosen") for pair in pairs[::2]) / 2
    trainer = KTOTrainer(
        model,
        args=config(KTOConfig, tmp_path, loss_type=loss_type, gradient_accumulation_steps=1),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
    )
    trainer.train()
    first, second = trainer.state.log_history[:2]
    assert first["logps/chosen"] == pytest.approx(chosen, abs=1e-4)
    assert first["loss"] == pytest.approx(0.5, abs=1e-6)
    assert second["loss"] < first["loss"]
