"""SFTTrainer: recorded figures, every option, metrics, evaluation, and what it refuses."""

from __future__ import annotations

import json
import math
import warnings

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel, TrainingArguments
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from trl import SFTConfig, SFTTrainer
from trl.ops.layouts import PackingNotSupportedError
from trl.trainer.sft_trainer import dft_loss

from ..conftest import build_model, build_tokenizer, load_reference

TEXTS = {
    "text": ["the sky is blue", "the sea is deep and blue", "sort the list", "hello world, how are you today?"] * 2
}
PAIRS = {
    "prompt": ["what is 12 plus 30?", "sort 3, 1, 2:", "the sky is", "hello"] * 2,
    "completion": [" the answer is 42.", " 1, 2, 3", " blue", " world, how are you today?"] * 2,
}
CHATS = {
    "messages": [
        [{"role": "user", "content": "what is 12 plus 30?"}, {"role": "assistant", "content": "42."}],
        [
            {"role": "system", "content": "explicit is better"},
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "hello, how are you?"},
            {"role": "user", "content": "the sky?"},
            {"role": "assistant", "content": "blue"},
        ],
    ]
    * 4
}


def config(tmp_path, **kwargs) -> SFTConfig:
    settings = {
        "output_dir": str(tmp_path / "out"),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        **kwargs,
    }
    return SFTConfig(**settings)


def make_trainer(tmp_path, tokenizer, data=TEXTS, model=None, **kwargs) -> SFTTrainer:
    own = ("peft_config", "compute_metrics", "compute_loss_func", "formatting_func", "eval_dataset", "data_collator")
    extra = {name: kwargs.pop(name) for name in own if name in kwargs}
    return SFTTrainer(
        model=build_model() if model is None else model,
        args=config(tmp_path, **kwargs),
        train_dataset=data if isinstance(data, (Dataset, IterableDataset)) else Dataset.from_dict(data),
        processing_class=tokenizer,
        **extra,
    )


# ---- Recorded figures ----


class LogitsModel(PreTrainedModel):
    """A model whose hidden states are given logits, under an identity head."""

    config_class = PretrainedConfig
    base_model_prefix = "model"

    class Backbone(nn.Module):
        def __init__(self, logits_BTV):
            super().__init__()
            self.logits_BTV = nn.Parameter(logits_BTV)
            self.embed_tokens = nn.Embedding(logits_BTV.shape[-1], 1)

        def forward(self, input_ids=None, attention_mask=None, **kwargs):
            return BaseModelOutput(last_hidden_state=self.logits_BTV)

    def __init__(self, logits_BTV):
        vocab_size = logits_BTV.shape[-1]
        super().__init__(PretrainedConfig(vocab_size=vocab_size, hidden_size=vocab_size, use_cache=False))
        self.model = self.Backbone(logits_BTV)
        self.lm_head = nn.Linear(vocab_size, vocab_size, bias=False)
        self.lm_head.weight.data = torch.eye(vocab_size)

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids).last_hidden_state))


@pytest.mark.parametrize("name", [name for name in load_reference("sft") if name.startswith("sft_")])
def test_reference_figures(tmp_path, tokenizer, name):
    case = load_reference("sft")[name]
    settings = case["config"]
    logits = torch.tensor(case["inputs"]["logits"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        trainer = make_trainer(
            tmp_path,
            tokenizer,
            model=LogitsModel(logits),
            gradient_checkpointing=False,
            loss_type=settings["loss_type"],
            label_smoothing_factor=settings.get("label_smoothing_factor", 0.0),
        )
    trainer.model.train(settings.get("mode") != "eval")
    trainer.current_gradient_accumulation_steps = 1
    inputs = {key: torch.tensor(case["inputs"][key]) for key in ("input_ids", "attention_mask", "labels")}
    loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=settings["num_items_in_batch"])
    loss.backward()

    expected = case["outputs"]
    torch.testing.assert_close(loss.detach(), torch.tensor(expected["loss"]), atol=1e-5, rtol=1e-5)
    gradient = trainer.model.model.logits_BTV.grad
    torch.testing.assert_close(gradient, torch.tensor(expected["grad_logits"]), atol=1e-5, rtol=1e-5)
    metrics = trainer.reducer.reduce(trainer.mode)
    for key, value in expected["metrics"].items():
        assert metrics.get(key, 0) == pytest.approx(value, abs=1e-5), key


# ---- Training ----


@pytest.mark.parametrize("data", [TEXTS, PAIRS, CHATS], ids=["text", "prompt-completion", "messages"])
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_it_learns(tmp_path, tokenizer, data, packing):
    trainer = make_trainer(tmp_path, tokenizer, data, packing=packing, max_length=128, max_steps=12)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
    assert all(not torch.equal(before[name], parameter) for name, parameter in trainer.model.named_parameters())


def test_from_a_path_to_a_checkpoint_that_generates(tmp_path, tiny_model_path):
    args = config(tmp_path, save_strategy="steps", save_steps=2)
    trainer = SFTTrainer(tiny_model_path, args=args, train_dataset=Dataset.from_dict(TEXTS))
    trainer.train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    assert tokenizer.chat_template == trainer.processing_class.chat_template
    generated = model.generate(**tokenizer("the sky", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert generated.shape[1] > 2
    card = (tmp_path / "out" / "README.md").read_text()
    assert "SFT" in card
    assert "generated_from_trainer" in card


def test_default_output_folder(tiny_model_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = SFTTrainer(tiny_model_path, train_dataset=Dataset.from_dict(TEXTS))
    assert trainer.args.output_dir == f"{tiny_model_path.split('/')[-1]}-SFT"


def test_plain_training_arguments(tmp_path, tokenizer):
    args = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none", hub_token="secret")
    trainer = SFTTrainer(build_model(), args, train_dataset=Dataset.from_dict(TEXTS), processing_class=tokenizer)
    assert isinstance(trainer.args, SFTConfig)
    assert trainer.args.hub_token == "secret"
    assert trainer.args.learning_rate == args.learning_rate


def test_iterable_dataset(tmp_path, tokenizer):
    stream = Dataset.from_dict(TEXTS).to_iterable_dataset()
    trainer = make_trainer(tmp_path, tokenizer, stream)
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.args.accelerator_config.dispatch_batches is False


def test_only_the_completion_is_trained(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, PAIRS)
    row = trainer.train_dataset[0]
    trained = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert tokenizer.decode(trained) == PAIRS["completion"][0] + tokenizer.eos_token
    assert trainer.completion_only_loss is True


def test_only_the_assistant_is_trained(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, CHATS, assistant_only_loss=True)
    row = trainer.train_dataset[1]
    trained = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert tokenizer.decode(trained) == "hello, how are you?<|im_end|>blue<|im_end|>"


def test_pad_token_equal_to_eos_still_trains_the_stop_token(tmp_path, tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    trainer = make_trainer(tmp_path, tokenizer, TEXTS)
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    for labels, mask in zip(batch["labels"], batch["attention_mask"], strict=True):
        assert labels[mask.sum() - 1] == tokenizer.eos_token_id
        assert (labels[mask == 0] == -100).all()


def test_formatting_func(tmp_path, tokenizer):
    data = {"question": ["a", "b"], "answer": ["c", "d"]}
    trainer = make_trainer(
        tmp_path, tokenizer, data, formatting_func=lambda row: f"{row['question']}: {row['answer']}"
    )
    assert tokenizer.decode(trainer.train_dataset[1]["input_ids"]) == "b: d" + tokenizer.eos_token


def test_chat_template_from_a_file(tmp_path, tokenizer):
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}")
    trainer = make_trainer(tmp_path, tokenizer, CHATS, chat_template_path=str(template))
    assert tokenizer.decode(trainer.train_dataset[0]["input_ids"]) == "user: what is 12 plus 30?\nassistant: 42.\n"


def test_eos_token_reaches_model_and_generation(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, TEXTS, eos_token="<|endoftext|>")
    eos = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert trainer.train_dataset[0]["input_ids"][-1] == eos
    assert trainer.model.config.eos_token_id == eos
    stops = trainer.model.generation_config.eos_token_id
    assert (stops[0] if isinstance(stops, list) else stops) == eos


def test_tags_and_use_cache(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer)
    assert {"trl", "sft"} <= set(trainer.model.model_tags)
    assert trainer.model.config.use_cache is False


# ---- Adapters ----


def test_lora_trains_the_adapter_only(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, peft_config=LoraConfig(r=4, task_type="CAUSAL_LM"), max_steps=4)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(before[name], parameter) != ("lora_" in name), name
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_lora_checkpoint_loads_in_peft(tmp_path, tokenizer, tiny_model_path):
    args = config(tmp_path)
    trainer = SFTTrainer(
        tiny_model_path, args, train_dataset=Dataset.from_dict(TEXTS), peft_config=LoraConfig(task_type="CAUSAL_LM")
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_path), tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids).logits, trainer.model.eval()(ids).logits)


def test_a_peft_model_of_the_user(tmp_path, tokenizer):
    model = get_peft_model(build_model(), LoraConfig(r=4, task_type="CAUSAL_LM"))
    make_trainer(tmp_path, tokenizer, model=model).train()
    model = get_peft_model(build_model(), LoraConfig(r=4, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="(?i)peft"):
        make_trainer(tmp_path, tokenizer, model=model, peft_config=LoraConfig(task_type="CAUSAL_LM"))


def test_an_adapter_on_the_head_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="lm_head"):
        make_trainer(tmp_path, tokenizer, peft_config=LoraConfig(target_modules=["q_proj", "lm_head"]))


def test_a_fully_trained_head_beside_the_adapter(tmp_path, tokenizer):
    peft_config = LoraConfig(r=4, task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    trainer = make_trainer(tmp_path, tokenizer, peft_config=peft_config, max_steps=3)
    head = next(p for n, p in trainer.model.named_parameters() if "lm_head" in n and "modules_to_save" in n)
    before = head.clone()
    trainer.train()
    assert not torch.equal(before, head)


def test_prompt_tuning_scores_the_same_tokens(tmp_path, tokenizer):
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        PAIRS,
        peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        eval_dataset=Dataset.from_dict(PAIRS),
    )
    rows = [trainer.train_dataset[i] for i in range(8)]
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logits = trainer.model.eval()(input_ids=torch.tensor([row["input_ids"]])).logits[
                0, -len(row["labels"]) : -1
            ]
        targets = torch.tensor(row["labels"])[1:]
        total += nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum").item()
        count += (targets != -100).sum().item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / count, abs=1e-5)
    trainer.train()


# ---- Metrics and evaluation ----


def test_logged_metrics(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, TEXTS, per_device_train_batch_size=4, max_steps=2)
    trainer.train()
    first, second = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert {"entropy", "mean_token_accuracy", "num_tokens", "grad_norm", "learning_rate"} <= first.keys()
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    assert second["num_tokens"] == sum(lengths)
    assert 0 < first["entropy"] <= math.log(512)


def plain_loss(model, rows) -> float:
    """Mean nll over all trained tokens, one row at a time, in float64."""
    total, count = 0.0, 0
    model = model.double().eval()
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        total += nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        count += (labels != -100).sum().item()
    return total / count


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("packing", [False, True])
def test_evaluation_loss_is_the_mean_over_tokens(tmp_path, tokenizer, batch_size, packing):
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        PAIRS,
        eval_dataset=Dataset.from_dict(PAIRS),
        per_device_eval_batch_size=batch_size,
        eval_packing=packing,
        max_length=64,
    )
    metrics = trainer.evaluate()
    expected = plain_loss(build_model(), trainer.train_dataset)
    assert metrics["eval_loss"] == pytest.approx(expected, abs=1e-5)
    assert {"eval_entropy", "eval_mean_token_accuracy"} <= metrics.keys()


def test_evaluation_datasets_by_name(tmp_path, tokenizer):
    evals = {"a": Dataset.from_dict(TEXTS), "b": Dataset.from_dict(PAIRS)}
    trainer = make_trainer(tmp_path, tokenizer, eval_dataset=evals)
    metrics = trainer.evaluate()
    assert {"eval_a_loss", "eval_b_loss", "eval_b_entropy"} <= metrics.keys()
    assert trainer.evaluate("a")["eval_loss"] == pytest.approx(metrics["eval_a_loss"])
    fresh = trainer.evaluate({"a": Dataset.from_dict(TEXTS)})
    assert fresh["eval_a_loss"] == pytest.approx(metrics["eval_a_loss"])


def test_best_model_by_a_metric_of_ours(tmp_path, tokenizer):
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        eval_dataset=Dataset.from_dict(TEXTS),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="best",
        metric_for_best_model="mean_token_accuracy",
        greater_is_better=True,
        max_steps=3,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.startswith(str(tmp_path / "out" / "checkpoint-"))
    assert json.loads((tmp_path / "out" / trainer.state.best_model_checkpoint / "trainer_state.json").read_text())[
        "best_model_checkpoint"
    ].startswith(str(tmp_path / "out" / "checkpoint-"))


def test_compute_metrics_gets_logits(tmp_path, tokenizer):
    seen = {}

    def compute_metrics(prediction):
        seen["shape"] = prediction.predictions.shape
        return {"answer": 42.0}

    trainer = make_trainer(tmp_path, tokenizer, eval_dataset=Dataset.from_dict(TEXTS), compute_metrics=compute_metrics)
    assert trainer.evaluate()["eval_answer"] == 42.0
    assert seen["shape"][-1] == 512


def test_compute_loss_func_still_works(tmp_path, tokenizer):
    def mean_nll(outputs, labels, num_items_in_batch=None):
        logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / num_items_in_batch

    with pytest.warns(FutureWarning, match="compute_loss_func"):
        custom = make_trainer(tmp_path, tokenizer, PAIRS, compute_loss_func=mean_nll)
    custom.train()
    plain = make_trainer(tmp_path, tokenizer, PAIRS)
    plain.train()
    losses = [[entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (custom, plain)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_dft_of_full_logits_is_the_dft_of_the_fused_head(tmp_path, tokenizer):
    with pytest.warns(FutureWarning, match="compute_loss_func"):
        custom = make_trainer(tmp_path, tokenizer, PAIRS, compute_loss_func=dft_loss)
    custom.train()
    fused = make_trainer(tmp_path, tokenizer, PAIRS, loss_type="dft")
    fused.train()
    losses = [[entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (custom, fused)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_return_outputs_warns_and_gives_logits(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[0]])
    with pytest.warns(FutureWarning, match="return_outputs"):
        _, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert outputs.logits.shape == (1, batch["input_ids"].shape[1], 512)


def test_mixture_of_experts_adds_its_balancing_loss(tmp_path, tokenizer):
    def run(coef):
        model = build_model(architecture="mixtral", num_local_experts=4)
        trainer = make_trainer(tmp_path, tokenizer, model=model, router_aux_loss_coef=coef, max_steps=1)
        trainer.train()
        return trainer, trainer.state.log_history[0]

    off, without = run(0.0)
    on, with_aux = run(0.5)
    assert (off.aux_loss_enabled, on.aux_loss_enabled) == (False, True)
    assert "aux_loss" not in without
    assert with_aux["loss"] == pytest.approx(without["loss"] + 0.5 * with_aux["aux_loss"], rel=1e-4)


# ---- What it refuses ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"packing": True, "max_length": None}, "When packing is enabled, `max_length` can't be `None`"),
        ({"padding_free": True}, "When `padding_free=True` without packing, `max_length` is not"),
        ({"eos_token": "zzz"}, "The specified `eos_token` .'zzz'. is not found in the vocabulary"),
        ({"assistant_only_loss": True}, "You set `assistant_only_loss=True`, but the dataset is not conversational"),
        ({"router_aux_loss_coef": 0.1}, "LlamaForCausalLM has no expert routers"),
        ({"gradient_checkpointing": False, "gradient_checkpointing_kwargs": {"selective": True}}, "Selective"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_refused_options(tmp_path, tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tokenizer, **settings)


def test_refused_arguments(tmp_path, tokenizer):
    rows = Dataset.from_dict(TEXTS)
    with pytest.raises(ValueError, match="needs a `train_dataset`"):
        SFTTrainer(build_model(), config(tmp_path), processing_class=tokenizer)
    with pytest.raises(TypeError, match=r"found dict\. Choose one of its splits, e\.g\. dataset\['train'\]"):
        SFTTrainer(build_model(), config(tmp_path), train_dataset={"train": rows}, processing_class=tokenizer)
    with pytest.raises(TypeError, match="`processing_class` is a tokenizer .* found str"):
        SFTTrainer(build_model(), config(tmp_path), train_dataset=rows, processing_class="gpt2")
    with pytest.raises(ValueError, match="custom `data_collator` cannot be used with `padding_free=True`"):
        make_trainer(tmp_path, tokenizer, padding_free=True, max_length=None, data_collator=lambda rows: rows)
    with pytest.raises(ValueError, match="`formatting_func` makes one text of a row"):
        make_trainer(tmp_path, tokenizer, completion_only_loss=True, formatting_func=str)
    with pytest.raises(ValueError, match="`loss_type='dft'` is a loss of its own"):
        make_trainer(tmp_path, tokenizer, loss_type="dft", compute_loss_func=print)


def test_a_recurrent_model_cannot_be_packed(tmp_path, tokenizer):
    model = build_model(architecture="mamba", state_size=4)
    with pytest.raises(PackingNotSupportedError):
        make_trainer(tmp_path, tokenizer, model=model, packing=True, max_length=32)
    prompt_tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(PackingNotSupportedError, match="learned tokens"):
        make_trainer(tmp_path, tokenizer, peft_config=prompt_tuning, packing=True, max_length=32)


def test_images_need_a_processor(tmp_path, tokenizer):
    from PIL import Image

    rows = Dataset.from_dict({**{key: value[:1] for key, value in PAIRS.items()}, "image": [Image.new("RGB", (2, 2))]})
    with pytest.raises(ValueError, match="`processing_class` is a tokenizer, which cannot read them"):
        make_trainer(tmp_path, tokenizer, rows)


def test_a_step_without_trained_tokens_is_an_error(tmp_path, tokenizer):
    rows = {"input_ids": [[5, 6, 7]] * 4, "labels": [[-100] * 3] * 4}
    trainer = make_trainer(tmp_path, tokenizer, rows, dataset_kwargs={"skip_prepare_dataset": True})
    with pytest.raises(ValueError, match="No token of step 1 is trained: every label of its 2 rows is -100"):
        trainer.train()


def test_a_model_path_that_does_not_exist(tmp_path):
    with pytest.raises((OSError, ValueError), match="no/such/model"):
        SFTTrainer("no/such/model", config(tmp_path), train_dataset=Dataset.from_dict(TEXTS))


def test_warnings(tmp_path, tokenizer):
    with pytest.warns(UserWarning, match="`model_init_kwargs` is ignored"):
        make_trainer(tmp_path, tokenizer, model_init_kwargs={"dtype": "float32"})
    with pytest.warns(UserWarning, match="a batch of one row saves nothing"):
        make_trainer(tmp_path, tokenizer, padding_free=True, max_length=None, per_device_train_batch_size=1)


def test_a_tokenizer_without_generation_markers(tmp_path):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = build_tokenizer(template)
    trainer = make_trainer(tmp_path, tokenizer, CHATS, assistant_only_loss=True)
    row = trainer.train_dataset[0]
    trained = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert "42.<|im_end|>" in tokenizer.decode(trained)
    assert "what" not in tokenizer.decode(trained)
