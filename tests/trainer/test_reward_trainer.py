"""RewardTrainer: recorded figures, options, metrics, evaluation, and what it refuses."""

from __future__ import annotations

import logging
import warnings

import numpy as np
import pytest
import torch
from accelerate.utils import ParallelismConfig
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, TrainingArguments, pipeline
from transformers.modeling_outputs import SequenceClassifierOutput

from trl import RewardConfig, RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference, suppress_seqcls_warning

from ..conftest import build_model, build_tokenizer, load_reference

TOPICS = ["the sky", "the sea", "the list", "the answer", "hello world", "what is 12 plus 30?"]
PAIRS = {
    "chosen": [f"{topic} is beautiful" for topic in TOPICS],
    "rejected": [f"{topic} is ugly, very ugly" for topic in TOPICS],
}
PROMPTED = {
    "prompt": [f"{topic}: " for topic in TOPICS],
    "chosen": ["beautiful and blue"] * 6,
    "rejected": ["ugly"] * 6,
}
CHATS = {
    "prompt": [[{"role": "user", "content": topic}] for topic in TOPICS],
    "chosen": [[{"role": "assistant", "content": "beautiful"}]] * 6,
    "rejected": [[{"role": "assistant", "content": "ugly"}]] * 6,
}


def build_reward_model(seed: int = 0, num_labels: int = 1, architecture: str = "llama", **settings):
    """The tiny model of the other tests with a random head of one output, in float32."""
    model = build_model(seed=seed, architecture=architecture, **settings)
    model.config.num_labels = num_labels
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        reward_model = AutoModelForSequenceClassification.from_config(model.config).float()
        reward_model.score.weight.data.normal_(std=0.2)
    return reward_model


def config(output_dir, **settings) -> RewardConfig:
    settings = {
        "output_dir": str(output_dir),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        **settings,
    }
    return RewardConfig(**settings)


def make_trainer(output_dir, tokenizer=None, data=PAIRS, model=None, **kwargs) -> RewardTrainer:
    own = ("peft_config", "compute_metrics", "eval_dataset", "data_collator", "callbacks")
    extra = {name: kwargs.pop(name) for name in own if name in kwargs}
    return RewardTrainer(
        model=build_reward_model() if model is None else model,
        args=config(output_dir, **kwargs),
        train_dataset=data if isinstance(data, (Dataset, IterableDataset)) else Dataset.from_dict(data),
        processing_class=build_tokenizer() if tokenizer is None else tokenizer,
        **extra,
    )


def log_of(trainer: RewardTrainer, key: str = "loss") -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


# ---- Recorded figures ----


class GivenRewards(nn.Module):
    def __init__(self, rewards_R1):
        super().__init__()
        self.rewards_R1 = nn.Parameter(rewards_R1)

    def forward(self, input_ids, attention_mask):
        return SequenceClassifierOutput(logits=self.rewards_R1)


@pytest.mark.parametrize("name", [name for name in load_reference("sft") if name.startswith("reward_")])
def test_reference_figures(tmp_path, name):
    case = load_reference("sft")[name]
    trainer = make_trainer(tmp_path, **case["config"])
    trainer.model.train()
    model = GivenRewards(torch.tensor(case["inputs"]["rewards"], dtype=torch.float64))
    mask = torch.tensor(case["inputs"]["attention_mask"])
    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": mask}
    if "margin" in case["inputs"]:
        inputs["margin"] = torch.tensor(case["inputs"]["margin"], dtype=torch.float64)
    loss, outputs = trainer.compute_loss(model, inputs, return_outputs=True)
    loss.backward()

    expected = case["outputs"]
    assert outputs.logits is model.rewards_R1
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-6)
    expected_grad = torch.tensor(expected["grad_rewards"], dtype=torch.float64)
    torch.testing.assert_close(model.rewards_R1.grad, expected_grad, atol=1e-6, rtol=0)
    metrics = trainer.reducer.reduce("train")
    assert metrics == pytest.approx(expected["metrics"], abs=1e-6)


# ---- Training ----


@pytest.mark.parametrize("data", [PAIRS, PROMPTED, CHATS], ids=["plain", "prompted", "chat"])
def test_it_learns(tmp_path, data):
    """From about half the pairs in order to all of them, held-out topics included."""
    held_out = {name: values[4:] for name, values in data.items()}
    trained = {name: values[:4] for name, values in data.items()}
    trainer = make_trainer(
        tmp_path, data=trained, eval_dataset=Dataset.from_dict(held_out), max_steps=30, per_device_train_batch_size=4
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert log_of(trainer)[-1] < 0.1 < log_of(trainer)[0]
    assert log_of(trainer, "accuracy")[-1] == after["eval_accuracy"] == 1.0
    assert after["eval_loss"] < 0.2 < before["eval_loss"]
    assert after["eval_margin"] > 1.5


def test_the_model_scores_a_text_as_the_trainer_did(tmp_path, tiny_model_path):
    """From a language model's folder to a checkpoint that Transformers' own pipeline scores with."""
    trainer = RewardTrainer(
        model=tiny_model_path,
        args=config(tmp_path, max_steps=20),
        train_dataset=Dataset.from_dict(PAIRS),
    )
    assert trainer.model.config.num_labels == 1
    trainer.train()
    trainer.save_model()
    scorer = pipeline("text-classification", model=str(tmp_path), function_to_apply="none")
    end = trainer.processing_class.eos_token
    good, bad = (result["score"] for result in scorer([PAIRS[side][5] + end for side in ("chosen", "rejected")]))
    assert good > bad + 0.5
    batch = trainer.data_collator([trainer.train_dataset[5]])
    with torch.no_grad():
        rewards = trainer.model.eval()(**batch).logits[:, 0]
    assert [good, bad] == pytest.approx(rewards.tolist(), abs=1e-4)


def test_margin_asks_for_more(tmp_path):
    """A row's margin reaches the loss: −log σ(difference − margin)."""
    losses = []
    for margin in (None, 0.0, 3.0):
        data = PAIRS if margin is None else {**PAIRS, "margin": [margin] * 6}
        trainer = make_trainer(tmp_path, data=data, max_steps=1, per_device_train_batch_size=6)
        trainer.train()
        losses.append(log_of(trainer)[0])
    assert losses[0] == losses[1]
    difference = log_of(trainer, "margin")[0]
    assert losses[2] > losses[1] + 1.0
    assert difference == pytest.approx(difference, abs=1.0)


def test_centering_pulls_rewards_to_zero(tmp_path):
    means = []
    for coefficient in (None, 0.5):
        model = build_reward_model()
        model.score.weight.data.abs_().mul_(3)
        trainer = make_trainer(
            tmp_path, model=model, max_steps=40, per_device_train_batch_size=6, center_rewards_coefficient=coefficient
        )
        trainer.train()
        means.append(abs(log_of(trainer, "mean_reward")[-1]))
    assert means[1] < 0.2
    assert means[1] < means[0]


def test_iterable_dataset(tmp_path):
    rows = [dict(zip(PAIRS, values, strict=True)) for values in zip(*PAIRS.values(), strict=True)]
    trainer = make_trainer(tmp_path, data=IterableDataset.from_generator(lambda: iter(rows)))
    trainer.train()
    assert trainer.state.global_step == 2


def test_plain_training_arguments_and_default_folder(tmp_path, tiny_model_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = TrainingArguments(str(tmp_path), learning_rate=3e-3, report_to="none", use_cpu=True)
    trainer = RewardTrainer(tiny_model_path, arguments, train_dataset=Dataset.from_dict(PAIRS))
    assert isinstance(trainer.args, RewardConfig)
    assert trainer.args.learning_rate == 3e-3
    trainer = RewardTrainer(tiny_model_path, train_dataset=Dataset.from_dict(PAIRS))
    assert trainer.args.output_dir.endswith(f"{tiny_model_path.split('/')[-1]}-Reward")


def test_dropout_is_disabled_by_default(tmp_path):
    for disable in (True, False):
        model = build_reward_model()
        model.score = nn.Sequential(nn.Dropout(0.3), model.score)
        make_trainer(tmp_path, model=model, disable_dropout=disable)
        assert model.score[0].p == (0.0 if disable else 0.3)


def test_attributes_that_scripts_read(tmp_path):
    trainer = make_trainer(tmp_path)
    assert (trainer.can_return_loss, trainer.label_names) == (True, [])
    assert trainer.model.config.use_cache is False
    assert {"trl", "reward-trainer"} <= set(trainer.model.model_tags)
    assert type(trainer.data_collator) is DataCollatorForPreference
    assert DataCollatorForPreference.__name__ == "DataCollatorForPreference"


@pytest.mark.parametrize("option", ["activation_offloading", "gradient_checkpointing"])
def test_memory_options_do_not_change_the_numbers(tmp_path, option):
    runs = []
    for value in (False, True):
        trainer = make_trainer(tmp_path, **{option: value})
        trainer.train()
        runs.append(log_of(trainer))
    assert runs[0] == pytest.approx(runs[1], abs=1e-6)


# ---- Tokens ----


def test_pad_token_reaches_the_model(tmp_path, tokenizer):
    """The score is read at the last token before the padding, which the model finds by its id."""
    model = build_reward_model()
    make_trainer(tmp_path, tokenizer, model=model)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    tokenizer.pad_token = None
    make_trainer(tmp_path, tokenizer, model=model)
    assert tokenizer.pad_token == tokenizer.eos_token
    assert model.config.pad_token_id == tokenizer.eos_token_id


def test_padding_does_not_change_a_score(tmp_path):
    trainer = make_trainer(tmp_path, pad_to_multiple_of=32)
    rows = list(trainer.train_dataset)
    model = trainer.model.eval()
    with torch.no_grad():
        together = model(**trainer.data_collator(rows)).logits
        assert trainer.data_collator(rows)["input_ids"].shape[1] == 32
        alone = [model(torch.tensor([row[side]])).logits for side in ("chosen_ids", "rejected_ids") for row in rows]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)


def test_eos_token_ends_both_answers(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, eos_token="<|endoftext|>")
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert trainer.model.config.eos_token_id == end
    for row in trainer.train_dataset:
        assert row["chosen_ids"][-1] == row["rejected_ids"][-1] == end


def test_chat_template_from_a_file(tmp_path, tokenizer):
    template = tmp_path / "shout.jinja"
    template.write_text("{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    trainer = make_trainer(tmp_path, tokenizer, CHATS, chat_template_path=str(template))
    assert tokenizer.decode(trainer.train_dataset[0]["chosen_ids"]) == "THE SKYBEAUTIFUL"


def test_chat_template_of_another_tokenizer(tmp_path, tiny_model_path):
    """Its special tokens are added, and with an adapter their embeddings are trained; there is no output head to train."""
    source = build_tokenizer()
    source.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    source.save_pretrained(tmp_path / "source")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer = RewardTrainer(
            tiny_model_path,
            config(tmp_path / "out", chat_template_path=str(tmp_path / "source")),
            train_dataset=Dataset.from_dict(CHATS),
            peft_config=LoraConfig(task_type="SEQ_CLS", r=2),
        )
    assert "<|new|>" in trainer.processing_class.get_vocab()
    peft_config = trainer.model.peft_config["default"]
    assert "embed_tokens" in peft_config.trainable_token_indices
    assert "lm_head" not in (peft_config.modules_to_save or [])
    trainer.train()


# ---- Adapters ----


@pytest.mark.parametrize("task_type", ["SEQ_CLS", None, "CAUSAL_LM"])
def test_lora_trains_the_adapter_and_the_head(tmp_path, task_type):
    """The head is new, so it is trained whatever the task type says; another one than SEQ_CLS is reported."""
    model = build_reward_model()
    given = LoraConfig(task_type=task_type, r=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make_trainer(tmp_path, model=model, peft_config=given, gradient_checkpointing=True, max_steps=3)
    assert any("SEQ_CLS" in str(warning.message) for warning in caught) == (task_type == "CAUSAL_LM")
    assert given.task_type == task_type  # the user's own stays as it was
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert any(".score." in name for name in changed)
    assert all("lora_" in name or "modules_to_save" in name for name in changed)
    assert {"lora_" in name for name in changed} == {True, False}


def test_lora_checkpoint_loads_in_peft(tmp_path, tiny_model_path):
    trainer = RewardTrainer(
        tiny_model_path,
        config(tmp_path),
        train_dataset=Dataset.from_dict(PAIRS),
        peft_config=LoraConfig(task_type="SEQ_CLS", r=4),
    )
    trainer.train()
    trainer.save_model()
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=1)
    base.config.pad_token_id = trainer.processing_class.pad_token_id
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    batch = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, trainer.model.eval()(**batch).logits, atol=1e-5, rtol=0)


def test_a_peft_model_of_the_user(tmp_path):
    model = get_peft_model(build_reward_model(), LoraConfig(task_type="SEQ_CLS", r=2))
    trainer = make_trainer(tmp_path, model=model)
    trainer.train()
    assert trainer.model is model
    with pytest.raises(ValueError, match="adapter already"):
        make_trainer(tmp_path, model=model, peft_config=LoraConfig(task_type="SEQ_CLS"))


# ---- Loading ----


class Records(logging.Handler):
    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


@pytest.fixture
def records():
    logger, handler = logging.getLogger("transformers.modeling_utils"), Records()
    logger.addHandler(handler)
    yield handler.texts
    logger.removeHandler(handler)


def test_the_swapped_head_is_not_reported(tmp_path, tiny_model_path, records):
    RewardTrainer(tiny_model_path, config(tmp_path), train_dataset=Dataset.from_dict(PAIRS))
    assert records == []
    AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=1)
    assert len(records) == 1  # outside, Transformers speaks as before


def test_any_other_missing_weight_is_reported(tmp_path, records):
    model = build_model()
    weights = {name: value for name, value in model.state_dict().items() if name != "model.norm.weight"}
    model.save_pretrained(tmp_path, state_dict=weights)
    with suppress_seqcls_warning():
        AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    assert len(records) == 1
    assert "model.norm.weight" in records[0]


def test_a_reward_model_is_loaded_with_its_head(tmp_path):
    model = build_reward_model()
    model.save_pretrained(tmp_path)
    trainer = RewardTrainer(
        str(tmp_path), config(tmp_path), train_dataset=Dataset.from_dict(PAIRS), processing_class=build_tokenizer()
    )
    assert torch.equal(trainer.model.score.weight, model.score.weight)


# ---- Metrics and evaluation ----


def test_logged_metrics(tmp_path):
    trainer = make_trainer(tmp_path, per_device_train_batch_size=3, max_steps=4)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = {"num_tokens", "min_reward", "mean_reward", "max_reward", "accuracy", "margin", "grad_norm"}
    assert all(names <= entry.keys() for entry in entries)
    tokens = sum(len(row[side]) for row in trainer.train_dataset for side in ("chosen_ids", "rejected_ids"))
    assert entries[-1]["num_tokens"] == 2 * tokens
    for entry in entries:
        assert entry["min_reward"] < entry["mean_reward"] < entry["max_reward"]


@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_evaluation_is_the_mean_over_pairs(tmp_path, batch_size):
    eval_dataset = Dataset.from_dict({**PAIRS, "margin": [0.1 * i for i in range(6)]})
    trainer = make_trainer(
        tmp_path, eval_dataset=eval_dataset, per_device_eval_batch_size=batch_size, center_rewards_coefficient=0.1
    )
    metrics = trainer.evaluate()
    model = trainer.model.eval()
    values = []
    for row in trainer.eval_dataset:
        with torch.no_grad():
            chosen, rejected = (
                model(torch.tensor([row[side]])).logits.item() for side in ("chosen_ids", "rejected_ids")
            )
        difference = torch.tensor(chosen - rejected - row["margin"])
        loss = -torch.nn.functional.logsigmoid(difference).item() + 0.1 * (chosen + rejected) ** 2
        values.append((loss, chosen > rejected, chosen - rejected, (chosen + rejected) / 2))
    names = ("eval_loss", "eval_accuracy", "eval_margin", "eval_mean_reward")
    for name, expected in zip(names, np.mean(values, axis=0), strict=True):
        assert metrics[name] == pytest.approx(expected, abs=1e-5), name


def test_rows_that_fill_up_a_batch_do_not_count(tmp_path, monkeypatch):
    """On several processes a short batch is filled up; also one of such rows alone."""
    trainer = make_trainer(tmp_path, data={**PAIRS, "margin": [0.5] * 6})
    rows = list(trainer.train_dataset)
    filler = [trainer._uncounted_row(rows[0])] * 2
    trainer.model.eval()
    metrics = []
    for batches in ([rows], [[*rows, *filler], filler]):
        for batch in batches:
            with torch.no_grad():
                trainer.compute_loss(trainer.model, trainer.data_collator(batch))
        metrics.append(trainer.reducer.reduce("eval"))
        monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    assert metrics[0].keys() >= {"loss", "accuracy", "min_reward"}
    assert metrics[1] == pytest.approx(metrics[0], abs=1e-5)


def test_compute_metrics_gets_the_rewards_of_both(tmp_path):
    seen = {}

    def compute_metrics(prediction):
        seen["rewards"], seen["labels"] = prediction.predictions, prediction.label_ids
        return {"right": float((prediction.predictions.argmax(axis=1) == prediction.label_ids).mean())}

    trainer = make_trainer(
        tmp_path,
        eval_dataset=Dataset.from_dict(PAIRS),
        compute_metrics=compute_metrics,
        per_device_eval_batch_size=4,
    )
    metrics = trainer.evaluate()
    assert seen["rewards"].shape == (6, 2)
    assert seen["labels"].tolist() == [0] * 6
    assert metrics["eval_right"] == pytest.approx(metrics["eval_accuracy"])
    assert (seen["rewards"][:, 0] - seen["rewards"][:, 1]).mean() == pytest.approx(metrics["eval_margin"], abs=1e-5)


def test_evaluation_datasets_by_name_and_new_ones(tmp_path):
    dataset = Dataset.from_dict(PAIRS)
    trainer = make_trainer(tmp_path, eval_dataset={"a": dataset, "b": dataset.select(range(2))})
    metrics = trainer.evaluate()
    assert {"eval_a_loss", "eval_b_accuracy"} <= metrics.keys()
    assert trainer.evaluate(Dataset.from_dict(CHATS))["eval_loss"] > 0
    assert trainer.evaluate("b")["eval_loss"] == pytest.approx(metrics["eval_b_loss"])


def test_model_card(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    trainer.create_model_card(model_name="scorer")
    card = (tmp_path / "README.md").read_text()
    assert "reward model" in card
    assert "text-classification" in card
    assert "reward-trainer" in card


# ---- Data ----


def test_pairs_that_are_too_long_are_left_out(tmp_path):
    data = {"chosen": ["short", "long " * 40, "the sky"], "rejected": ["shorter", "x", "the sea " * 40]}
    trainer = make_trainer(tmp_path, data=data, max_length=30)
    assert len(trainer.train_dataset) == 1
    assert len(make_trainer(tmp_path, data=data, max_length=None).train_dataset) == 3


def test_tokenized_rows(tmp_path):
    data = {"chosen_ids": [[5, 6, 7], [8, 9]], "rejected_ids": [[5, 6], [8, 10, 11]]}
    trainer = make_trainer(tmp_path, data=data)
    assert trainer.train_dataset[:]["chosen_ids"] == data["chosen_ids"]
    trainer.train()


# ---- Refusals ----


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"question": ["a"], "answer_a": ["b"], "answer_b": ["c"]}, "chosen.*rejected"),
        ({"chosen": [], "rejected": []}, "empty"),
        ({"chosen": ["long " * 40] * 2, "rejected": ["x", "y"]}, "max_length"),
        ({**PAIRS, "margin": ["much"] * 6}, "margin"),
        ({**PAIRS, "margin": [float("nan")] * 6}, "margin"),
    ],
    ids=["columns", "empty", "all too long", "margin text", "margin nan"],
)
def test_refused_data(tmp_path, data, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        make_trainer(tmp_path, data=data, max_length=30)


def test_refused_arguments(tmp_path, tokenizer):
    dataset = Dataset.from_dict(PAIRS)
    with pytest.raises(ValueError, match="train_dataset"):
        RewardTrainer(build_reward_model(), config(tmp_path), processing_class=tokenizer)
    with pytest.raises(TypeError, match="one of its splits"):
        RewardTrainer(build_reward_model(), config(tmp_path), train_dataset={"train": dataset})
    with pytest.raises(ValueError, match="num_labels.*2"):
        make_trainer(tmp_path, model=build_reward_model(num_labels=2))
    with pytest.raises(ValueError, match="num_labels"):
        make_trainer(tmp_path, model=build_model())
    with pytest.raises(ValueError, match="vocabulary"):
        make_trainer(tmp_path, eos_token="<|nothing|>")
    with pytest.raises(TypeError, match="peft_config"):
        make_trainer(tmp_path, peft_config={"r": 4})
    with pytest.raises(TypeError, match="RewardConfig"):
        RewardTrainer(build_reward_model(), {"output_dir": "x"}, train_dataset=dataset)
    with pytest.raises(ValueError, match="no eval_dataset|eval_dataset"):
        make_trainer(tmp_path).evaluate()


def test_a_classifier_with_more_labels_is_refused(tmp_path):
    build_reward_model(num_labels=3).save_pretrained(tmp_path)
    arguments = {"train_dataset": Dataset.from_dict(PAIRS), "processing_class": build_tokenizer()}
    with pytest.raises(ValueError, match="3 labels"):
        RewardTrainer(str(tmp_path), config(tmp_path), **arguments)
    again = config(tmp_path, model_init_kwargs={"ignore_mismatched_sizes": True})
    assert RewardTrainer(str(tmp_path), again, **arguments).model.score.out_features == 1


def test_rows_cannot_be_cut_over_devices():
    class Args:
        parallelism_config = ParallelismConfig(cp_size=2)

    with pytest.raises(ValueError, match="parallel"):
        RewardTrainer._check_parallelism(Args)


def test_quantization_twice(tmp_path, tiny_model_path):
    from transformers import BitsAndBytesConfig

    four_bits = BitsAndBytesConfig(load_in_4bit=True)
    with pytest.raises(ValueError, match="twice"):
        RewardTrainer(
            tiny_model_path,
            config(tmp_path, model_init_kwargs={"quantization_config": four_bits}),
            train_dataset=Dataset.from_dict(PAIRS),
            quantization_config=four_bits,
        )
