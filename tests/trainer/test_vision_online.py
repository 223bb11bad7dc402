"""GRPO and RLOO on prompts with images, with a real tiny Llava: from pixels to log-probs."""

import math

import pytest
import torch
from datasets import Dataset

from tests.data.vision_helpers import build_image
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from .test_vision_preference import model, processor  # noqa: F401  (fixtures)

ROWS = Dataset.from_list(
    [
        {"prompt": [{"role": "user", "content": "what is this?"}], "images": [build_image((60 * i, 0, 250 - 60 * i))]}
        for i in range(4)
    ]
)


@pytest.mark.parametrize(("config_class", "trainer_class"), [(GRPOConfig, GRPOTrainer), (RLOOConfig, RLOOTrainer)])
def test_images_reach_the_model(tmp_path, model, processor, config_class, trainer_class):  # noqa: F811
    """The log-probs of a completion are those of its row by itself, with its own image; a checkpoint keeps the images."""
    args = config_class(
        str(tmp_path), use_cpu=True, bf16=False, report_to=[], per_device_train_batch_size=4, num_generations=2,
        max_completion_length=5, max_steps=3, steps_per_generation=2, num_iterations=2, beta=0.1, logging_steps=1,
        save_strategy="steps", save_steps=1, learning_rate=1e-2,
    )  # fmt: skip
    seen = []

    def reward(completions, images, **kwargs):
        assert len(images) == len(completions)
        return [float(index % 3) for index in range(len(completions))]

    trainer = trainer_class(model, reward, args, ROWS, processing_class=processor)
    score = trainer._score_before_update

    @torch.no_grad()
    def check(policy, micro_batches):
        score(policy, micro_batches)
        batch = micro_batches[0]
        for row in range(4):
            length = int(batch["attention_mask"][row].sum())
            ids = batch["input_ids"][row, :length][None]
            start = int(batch["prompt_lengths"][row])
            pixels = batch["image_inputs"][row]["pixel_values"]
            logits = policy(input_ids=ids, pixel_values=pixels).logits / args.temperature
            logps = logits.log_softmax(-1)[0, start - 1 : -1].gather(-1, ids[0, start:, None]).squeeze(-1)
            old = batch["old_logps"][row, : len(logps)]
            torch.testing.assert_close(old, logps * batch["train_mask"][row, : len(logps)], atol=1e-5, rtol=1e-5)
            seen.append(pixels)

    trainer._score_before_update = check
    trainer.train()
    assert len({pixels.sum().item() for pixels in seen}) > 1
    assert all(math.isfinite(log["loss"]) for log in trainer.state.log_history if "loss" in log)

    resumed = trainer_class(model, reward, args, ROWS, processing_class=processor)
    resumed.buffer.load(str(tmp_path / "checkpoint-1"), 0, torch.device("cpu"))
    assert len(resumed.buffer.micro_batches[0]["image_inputs"]) == 4
    torch.testing.assert_close(resumed.buffer.micro_batches[0]["image_inputs"][0]["pixel_values"], seen[0])


def test_a_tokenizer_alone_cannot_read_images(tmp_path, model, processor):  # noqa: F811
    args = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[], num_generations=2)
    with pytest.raises(ValueError, match="processor"):
        GRPOTrainer(model, len, args, ROWS, processing_class=processor.tokenizer)


def test_images_inside_messages(tmp_path, model, processor):  # noqa: F811
    """A dataset keeps them as bytes, between the words they belong to."""
    rows = [
        {"prompt": [{"role": "user", "content": [{"type": "image", "image": build_image((i, 0, 0))}, {"type": "text", "text": "?"}]}]}
        for i in (10, 200)
    ]  # fmt: skip
    args = GRPOConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to=[], per_device_train_batch_size=4, num_generations=2,
        max_completion_length=3, max_steps=1, logging_steps=1, save_strategy="no",
    )  # fmt: skip
    kept = []
    trainer = GRPOTrainer(
        model, lambda completions, **kwargs: list(map(float, range(4))), args, Dataset.from_list(rows),
        processing_class=processor,
    )  # fmt: skip
    make = trainer.make_training_batch
    trainer.make_training_batch = lambda *arguments: kept.extend(batches := make(*arguments)) or batches
    trainer.train()
    pixels = {inputs["pixel_values"].sum().item() for inputs in kept[0]["image_inputs"]}
    assert len(pixels) == 2
    assert math.isfinite(trainer.state.log_history[0]["loss"])
