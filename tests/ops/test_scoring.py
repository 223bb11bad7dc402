"""Scores and gradients of `score_tokens` against full logits in float64, on every option."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from tests.conftest import build_model, load_reference
from trl.losses.language_modeling import dft, nll
from trl.ops.head import ChunkedLogProbFunction, LogitTransform, token_objective, token_statistics
from trl.ops.scoring import ScoreRequest, install_scoring, score_tokens

ALL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def plain_statistics(hidden, weight, bias, targets, scale=1.0, softcap=None, temperature=1.0):
    """The definition, from full logits."""
    logits = hidden @ weight.t() * scale if bias is None else (hidden @ weight.t() + bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logps = (logits / temperature).log_softmax(-1)
    return {
        "logps": logps.gather(-1, targets.unsqueeze(-1)).squeeze(-1),
        "entropy": -(logps.exp() * logps).sum(-1),
        "log_sum_sq_probs": logps.exp().square().sum(-1).log(),
        "mean_logits": (logits / temperature).mean(-1),
        "is_top1": logits.argmax(-1) == targets,
    }


@pytest.fixture
def head_inputs():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(19, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(19, generator=generator, dtype=torch.float64, requires_grad=True)
    return hidden, weight, bias, torch.randint(0, 19, (11,), generator=generator)


TRANSFORMS = [
    {},
    {"temperature": 0.7},
    {"scale": 0.5},
    {"softcap": 3.0},
    {"scale": 2.0, "softcap": 4.0, "temperature": 1.3},
]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 4, 11, None])
class TestHead:
    def test_statistics_and_gradients_are_exact(self, head_inputs, transform, with_bias, chunk_size):
        hidden, weight, bias, targets = head_inputs
        bias = bias if with_bias else None
        inputs = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
        expected = plain_statistics(hidden, weight, bias, targets, **transform)
        actual = token_statistics(hidden, weight, bias, targets, LogitTransform(**transform), ALL_OUTPUTS, chunk_size)
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-12, atol=1e-12)

        up_logps, up_entropy = torch.linspace(-1, 2, 11).double(), torch.linspace(1, -3, 11).double()
        for use_logps, use_entropy in [(1, 1), (1, 0), (0, 1)]:
            expected_sum = (use_logps * up_logps * expected["logps"]).sum() + (
                use_entropy * up_entropy * expected["entropy"]
            ).sum()
            terms = []
            if use_logps:
                terms.append((up_logps * actual["logps"]).sum())
            if use_entropy:
                terms.append((up_entropy * actual["entropy"]).sum())
            expected_grads = torch.autograd.grad(expected_sum, inputs, retain_graph=True)
            actual_grads = torch.autograd.grad(sum(terms), inputs, retain_graph=True)
            for got, want in zip(actual_grads, expected_grads, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("objective", [nll, dft])
    def test_objective_makes_the_same_gradients_in_the_forward_pass(
        self, head_inputs, transform, with_bias, chunk_size, objective
    ):
        hidden, weight, bias, targets = head_inputs
        bias = bias if with_bias else None
        inputs = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
        logps = plain_statistics(hidden, weight, bias, targets, **transform)["logps"]
        losses = -logps if objective is nll else -logps * logps.detach().exp()
        values = token_objective(
            hidden, weight, bias, targets, LogitTransform(**transform), objective, ("entropy",), chunk_size
        )
        torch.testing.assert_close(values["loss_sum"], losses.sum(), rtol=1e-12, atol=1e-12)
        assert not values["logps"].requires_grad
        assert not values["entropy"].requires_grad
        expected = torch.autograd.grad(losses.sum() / 7, inputs)
        actual = torch.autograd.grad(values["loss_sum"] / 7, inputs)
        for got, want in zip(actual, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_gradcheck(head_inputs):
    hidden, weight, bias, targets = head_inputs

    def statistics(hidden, weight, bias):
        values = token_statistics(hidden, weight, bias, targets, LogitTransform(1.5, 5.0, 0.8), ("entropy",), 4)
        return values["logps"], values["entropy"]

    assert torch.autograd.gradcheck(statistics, (hidden, weight, bias))

    def objective(hidden, weight, bias):
        return token_objective(hidden, weight, bias, targets, LogitTransform(1.5, 5.0, 0.8), nll, (), 4)["loss_sum"]

    assert torch.autograd.gradcheck(objective, (hidden, weight, bias))


def test_second_backward_of_an_objective_says_what_to_do(head_inputs):
    hidden, weight, bias, targets = head_inputs
    loss = token_objective(hidden, weight, bias, targets, LogitTransform(), nll)["loss_sum"]
    loss.backward(retain_graph=True)
    first = weight.grad.clone()
    weight.grad = None
    loss.backward(retain_graph=True)
    assert torch.equal(weight.grad, first)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_inputs_cost_no_gradient(head_inputs, frozen, monkeypatch):
    """A frozen head (LoRA) or backbone gets no gradient, and none is computed for it."""
    from trl.ops import head as head_module

    hidden, weight, _, targets = head_inputs
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    calls = []
    monkeypatch.setattr(head_module._Head, "hidden_grad", lambda self, grad: calls.append("hidden") or 0.0)
    monkeypatch.setattr(head_module._Head, "add_weight_grad", lambda self, *args: calls.append("weight"))
    for run in (
        lambda: token_objective(hidden, weight, None, targets, LogitTransform(), nll, (), 4)["loss_sum"],
        lambda: token_statistics(hidden, weight, None, targets, LogitTransform(), (), 4)["logps"].sum(),
    ):
        calls.clear()
        run().backward()
        assert set(calls) == {"weight" if frozen == "hidden" else "hidden"}
    calls.clear()
    with torch.no_grad():
        assert not token_objective(hidden, weight, None, targets, LogitTransform(), nll)["loss_sum"].requires_grad
    assert not calls


def test_half_precision_sums_in_float32(head_inputs):
    """bfloat16 operands, float32 sums: closer to float64 than logits that were rounded to bfloat16."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(64, 128, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(300, 128, generator=generator).bfloat16().requires_grad_()
    targets = torch.randint(0, 300, (64,), generator=generator)
    exact = plain_statistics(hidden.detach().double(), weight.detach().double(), None, targets)["logps"]
    values = token_statistics(hidden, weight, None, targets, LogitTransform(), (), 10)
    assert values["logps"].dtype == torch.float32
    torch.testing.assert_close(values["logps"].double(), exact, rtol=1e-5, atol=1e-4)
    loss = token_objective(hidden, weight, None, targets, LogitTransform(), nll, (), 10)["loss_sum"]
    loss.backward()
    hidden64, weight64 = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    (-plain_statistics(hidden64, weight64, None, targets)["logps"].sum()).backward()
    torch.testing.assert_close(weight.grad.double(), weight64.grad, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(hidden.grad.double(), hidden64.grad, rtol=1e-2, atol=1e-2)


def test_vocabulary_blocks_change_nothing(monkeypatch):
    from trl.ops import head as head_module

    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 16, generator=generator).bfloat16().requires_grad_() for n in (9, 50))
    targets = torch.randint(0, 50, (9,), generator=generator)

    def run():
        values = token_statistics(hidden, weight, None, targets, LogitTransform(), ("entropy",), 4)
        return values["logps"], torch.autograd.grad(values["logps"].sum(), hidden)[0]

    whole = run()
    monkeypatch.setattr(head_module, "VOCAB_CHUNK_SIZE", 7)
    for got, want in zip(run(), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-2)


def test_first_of_tied_maxima_is_top1():
    hidden, weight = torch.ones(3, 1), torch.tensor([[1.0], [2.0], [2.0]])
    values = token_statistics(hidden, weight, None, torch.tensor([0, 1, 2]), LogitTransform(), ("is_top1",))
    assert values["is_top1"].tolist() == [False, True, False]


def test_kernel_function_ignores_negative_targets(head_inputs):
    hidden, weight, bias, targets = head_inputs
    ignored = targets.clone()
    ignored[::2] = -100
    outputs = ChunkedLogProbFunction.apply(hidden, weight, bias, ignored, 1.0, 4)
    everything = ChunkedLogProbFunction.apply(hidden, weight, bias, targets, 1.0, 4)
    for output, full in zip(outputs, everything, strict=True):
        assert not output[::2].any()
        torch.testing.assert_close(output[1::2], full[1::2])
    grad = torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), hidden)[0]
    assert not grad[::2].any()
    assert grad[1::2].any()


# ---------------------------------------------------------------------------------------------------------------------
# score_tokens on models


def padded_batch(vocab_size=512, rows=3, length=17, seed=0):
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(4, vocab_size, (rows, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    for row in range(1, rows):
        attention_mask[row, length - 4 * row :] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, :4] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def plain_scores(model, batch, temperature=1.0):
    """From the model's own full logits, which include its scale and soft-capping."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs).logits[:, :-1].double() / temperature
    mask = batch["labels"][:, 1:] != -100
    logps = logits.log_softmax(-1)
    targets = batch["labels"][:, 1:].clamp(min=0)
    return {
        "logps": logps.gather(2, targets.unsqueeze(2)).squeeze(2) * mask,
        "entropies": -(logps.exp() * logps).sum(-1) * mask,
        "log_sum_sq_probs": logps.exp().square().sum(-1).log() * mask,
        "mean_logits": logits.mean(-1) * mask,
        "is_top1": (logits.argmax(-1) == targets) & mask,
        "mask": mask,
    }


ARCHITECTURES = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 4.0},
    "phi": {},  # head with bias
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2},
}


def make_model(name, **kwargs):
    architecture = name.split()[0]
    if architecture == "gpt2":
        kwargs = {"n_positions": 512, "num_key_value_heads": None, "resid_pdrop": 0.0, "embd_pdrop": 0.0, **kwargs}
    return build_model(architecture=architecture, pad_token_id=0, **{**ARCHITECTURES.get(name, {}), **kwargs})


@pytest.mark.parametrize("layout", ["padded", "packed", "auto"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_equal_those_of_full_logits(name, layout):
    """The numbers and the gradient of every parameter, whatever the model does to its logits."""
    model, batch = make_model(name).double().eval(), padded_batch()
    scores = score_tokens(model, batch, temperature=0.7, outputs=ALL_OUTPUTS, layout=layout, chunk_size=5)
    expected = plain_scores(model, batch, temperature=0.7)
    for field, value in expected.items():
        torch.testing.assert_close(scores[field], value, rtol=1e-9, atol=1e-9)

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    actual_grads = torch.autograd.grad((scores.logps - 0.3 * scores.entropies).sum(), parameters)
    expected_grads = torch.autograd.grad((expected["logps"] - 0.3 * expected["entropies"]).sum(), parameters)
    for got, want in zip(actual_grads, expected_grads, strict=True):
        # Some models normalise in float32 even when they are float64.
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "llama tied", "phi", "gemma2"])
@pytest.mark.parametrize("objective", [nll, dft])
def test_objective_trains_like_full_logits(name, objective):
    """Gradients of every parameter; tied embeddings get that of the input and that of the head; twice accumulates."""
    model, batch = make_model(name).double(), padded_batch()
    logps = plain_scores(model, batch)["logps"]
    loss = -(logps if objective is nll else logps * logps.detach().exp()).sum()
    (loss / 5).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for times in (1, 2):
        scores = score_tokens(model, batch, objective=objective, outputs=("entropy", "is_top1"), chunk_size=7)
        torch.testing.assert_close(scores.loss_sum, loss.detach(), rtol=1e-10, atol=0)
        (scores.loss_sum / 5).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, times * expected[name], rtol=1e-5, atol=1e-6)


def test_only_scored_positions_reach_the_head(tiny_model, monkeypatch):
    """A long prompt before a short answer costs the head nothing."""
    from trl.ops import scoring

    seen = []
    original = scoring.token_objective
    monkeypatch.setattr(scoring, "token_objective", lambda *args: seen.append(args[0].shape) or original(*args))
    batch = padded_batch(rows=2, length=40)
    batch["labels"][:, :30] = -100
    score_tokens(tiny_model, batch, objective=nll, layout="padded")
    assert seen == [((batch["labels"][:, 1:] != -100).sum().item(), 32)]


def test_shift_labels_are_taken_as_they_are(tiny_model):
    batch = padded_batch()
    labels = batch.pop("labels")
    shifted = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)
    for layout in ("padded", "packed"):
        scores = score_tokens(tiny_model, {**batch, "shift_labels": shifted}, layout=layout)
        expected = score_tokens(tiny_model, {**batch, "labels": labels}, layout="padded")
        assert scores.logps.shape == shifted.shape
        torch.testing.assert_close(scores.logps[:, :-1], expected.logps, rtol=1e-5, atol=1e-5)
        assert not scores.logps[:, -1].any()


@pytest.mark.parametrize("objective", [None, nll])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_batch_without_labels_is_a_differentiable_zero(tiny_model, objective, layout):
    batch = padded_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    scores = score_tokens(tiny_model, batch, objective=objective, outputs=ALL_OUTPUTS, layout=layout)
    loss = scores.logps.sum() if objective is None else scores.loss_sum
    assert loss.item() == 0
    loss.backward()
    for parameter in tiny_model.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_evaluation_builds_no_graph(tiny_model):
    with torch.no_grad():
        scores = score_tokens(tiny_model.eval(), padded_batch(), objective=nll, outputs=("entropy",))
    assert not any(value.requires_grad for value in scores.values())


def test_autocast_projects_in_its_precision_and_keeps_gradients_of_the_weights_dtype(tiny_model):
    batch = padded_batch()
    exact = score_tokens(tiny_model, batch, objective=nll, layout="padded").loss_sum.item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = score_tokens(tiny_model, batch, objective=nll, outputs=("entropy",), layout="padded")
    scores.loss_sum.backward()
    assert scores.loss_sum.item() != exact
    assert scores.loss_sum.item() == pytest.approx(exact, rel=1e-2)
    assert tiny_model.lm_head.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("objective", [None, nll])
def test_gradient_checkpointing_changes_nothing(objective):
    batch, grads = padded_batch(), []
    for enabled in (False, True):
        model = build_model().train()
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        scores = score_tokens(model, batch, objective=objective, layout="packed")
        (scores.logps.sum() if objective is None else scores.loss_sum).backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-6, atol=1e-7)


def test_model_keeps_its_own_forward_and_signature(tiny_model):
    import inspect

    batch, signature = padded_batch(), inspect.signature(tiny_model.forward)
    expected = tiny_model(**batch)
    install_scoring(tiny_model)
    forward = tiny_model.forward
    install_scoring(tiny_model)
    assert tiny_model.forward is forward or tiny_model.forward == forward
    assert inspect.signature(tiny_model.forward) == signature
    actual = tiny_model(**batch)
    assert torch.equal(actual.logits, expected.logits)
    assert torch.equal(actual.loss, expected.loss)
    generated = tiny_model.generate(batch["input_ids"][:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert generated.shape[1] > batch["input_ids"].shape[1]


def test_a_deep_copy_scores_with_its_own_weights(tiny_model):
    batch = padded_batch()
    before = score_tokens(tiny_model, batch).logps
    twin = copy.deepcopy(tiny_model)
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            parameter.mul_(0.5)
    assert torch.equal(score_tokens(twin, batch).logps, before)
    assert not torch.equal(score_tokens(tiny_model, batch).logps, before)


class TestWrappers:
    """The call passes through whatever wraps the model."""

    @pytest.mark.parametrize("layout", ["padded", "packed"])
    def test_lora(self, tiny_model, layout):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(tiny_model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
        self._compare(model, layout)

    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_lora_on_the_head_goes_through_the_module(self, tiny_model, dropout):
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False, lora_dropout=dropout)
        model = get_peft_model(tiny_model, config)
        self._compare(model.eval() if dropout else model, "padded")

    def test_trained_copy_of_the_head(self, tiny_model):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(tiny_model, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
        with torch.no_grad():
            model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
        self._compare(model, "padded")
        with model.disable_adapter():
            self._compare(model, "padded", gradients=False)

    def test_prompt_tuning_drops_its_virtual_tokens(self, tiny_model):
        from peft import PromptTuningConfig, get_peft_model

        model = get_peft_model(tiny_model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
        batch = padded_batch()
        scores = score_tokens(model, batch, layout="padded")
        assert scores.logps.shape == (3, 16)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 3:-1]
        targets = batch["labels"][:, 1:]
        logps = logits.log_softmax(-1).gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2) * (targets != -100)
        torch.testing.assert_close(scores.logps, logps, rtol=1e-4, atol=1e-5)

    def test_torch_compile_wrapper(self, tiny_model):
        self._compare(torch.compile(tiny_model, backend="eager", dynamic=False), "padded")

    def test_accelerate_mixed_precision(self, tiny_model):
        from types import MethodType

        from accelerate.utils import convert_outputs_to_fp32

        install_scoring(tiny_model)
        forward = torch.autocast("cpu", dtype=torch.bfloat16)(tiny_model.forward.__func__)
        tiny_model.forward = MethodType(convert_outputs_to_fp32(forward), tiny_model)
        scores = score_tokens(tiny_model, padded_batch(), objective=nll)
        scores.loss_sum.backward()
        assert scores.loss_sum.dtype == torch.float32
        assert tiny_model.lm_head.weight.grad.dtype == torch.float32

    @staticmethod
    def _compare(model, layout, gradients=True):
        batch = padded_batch()
        expected = plain_scores(model, batch)["logps"]
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for objective in (None, nll):
            scores = score_tokens(model, batch, objective=objective, layout=layout, chunk_size=5)
            torch.testing.assert_close(scores.logps.double(), expected, rtol=1e-4, atol=1e-5)
            if gradients:
                loss = -scores.logps.sum() if objective is None else scores.loss_sum
                actual = torch.autograd.grad(loss, parameters, allow_unused=True)
                wanted = torch.autograd.grad(-expected.sum(), parameters, allow_unused=True, retain_graph=True)
                for got, want in zip(actual, wanted, strict=True):
                    if want is not None:
                        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


def test_a_model_that_is_not_backbone_and_head_falls_back_to_its_logits(tiny_model):
    """A module between backbone and head cannot be missed: the model's own logits are scored."""

    class Scaled(type(tiny_model)):
        def __init__(self, config):
            super().__init__(config)
            self.extra = nn.Linear(config.vocab_size, config.vocab_size)

        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.logits = self.extra(outputs.logits)
            return outputs

    model = Scaled(tiny_model.config)
    TestWrappers._compare(model, "padded")
    TestWrappers._compare(model, "packed")


MOE = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("name", MOE)
def test_router_loss_equals_the_models_own(name, layout):
    model = build_model(architecture=name, output_router_logits=True, **MOE[name])
    batch = padded_batch()
    expected = model(**batch).aux_loss
    scores = score_tokens(model, batch, objective=nll, layout=layout)
    torch.testing.assert_close(scores.aux_loss, expected, rtol=1e-5, atol=1e-6)
    gate = next(parameter for name, parameter in model.named_parameters() if "gate" in name)
    actual_grad = torch.autograd.grad(scores.aux_loss, gate, retain_graph=True)[0]
    torch.testing.assert_close(actual_grad, torch.autograd.grad(expected, gate)[0], rtol=1e-3, atol=1e-6)
    model.config.output_router_logits = False
    assert score_tokens(model, batch, layout=layout).aux_loss is None


class TestErrors:
    def test_no_labels(self, tiny_model):
        with pytest.raises(ValueError, match="needs `labels` or `shift_labels`"):
            score_tokens(tiny_model, {"input_ids": torch.ones(1, 3, dtype=torch.long)})

    def test_no_head(self, tiny_model):
        with pytest.raises(ValueError, match="no Transformers model with a language-modeling head"):
            score_tokens(tiny_model.model, padded_batch())

    def test_encoder_decoder(self):
        from transformers import T5Config, T5ForConditionalGeneration

        model = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1))
        with pytest.raises(ValueError, match="encoder-decoder"):
            score_tokens(model, padded_batch())

    @pytest.mark.parametrize(
        ("kwargs", "error", "match"),
        [
            ({"outputs": ("logits",)}, ValueError, "Unknown outputs"),
            ({"temperature": 0.0}, ValueError, "must be positive"),
            ({"objective": "nll"}, TypeError, "LANGUAGE_MODELING_LOSSES"),
        ],
    )
    def test_request(self, kwargs, error, match):
        with pytest.raises(error, match=match):
            ScoreRequest(**kwargs)


@pytest.mark.parametrize("name", [name for name in load_reference("sft") if name.startswith("sft_")])
def test_reference_losses(name):
    """Loss and gradient of the recorded SFT cases: the logits are the hidden states under an identity head."""
    case = load_reference("sft")[name]
    config, inputs, outputs = case["config"], case["inputs"], case["outputs"]
    if "label_smoothing" in name:
        pytest.skip("label smoothing needs full logits; it is the trainer's own path")
    logits = torch.tensor(inputs["logits"], requires_grad=True)
    labels = torch.tensor(inputs["labels"])
    targets = labels[:, 1:]
    mask = targets != -100
    objective = dft if config.get("loss_type") == "dft" else nll
    values = token_objective(
        logits[:, :-1][mask], torch.eye(logits.shape[-1]), None, targets[mask], LogitTransform(), objective,
        ("entropy", "is_top1"), 3,
    )  # fmt: skip
    count = config.get("num_items_in_batch") or max(mask.sum().item(), 1)
    loss = values["loss_sum"] / count
    assert loss.item() == pytest.approx(outputs["loss"], abs=1e-5)
    if outputs.get("grad_logits") is not None:
        loss.backward()
        torch.testing.assert_close(logits.grad, torch.tensor(outputs["grad_logits"]), rtol=1e-4, atol=1e-6)
    metrics = outputs.get("metrics") or {}
    if "entropy" in metrics and mask.any():
        assert values["entropy"].mean().item() == pytest.approx(metrics["entropy"], abs=1e-5)
        assert values["is_top1"].float().mean().item() == pytest.approx(metrics["mean_token_accuracy"], abs=1e-5)


def test_request_outputs_cover_every_combination(tiny_model):
    """What is asked for is there, what is not is absent, and nothing changes the log-probabilities."""
    batch = padded_batch()
    fields = dict(zip(ALL_OUTPUTS, ("entropies", "log_sum_sq_probs", "mean_logits", "is_top1"), strict=True))
    whole = score_tokens(tiny_model, batch, outputs=ALL_OUTPUTS)
    for count in range(4):
        for outputs in itertools.combinations(ALL_OUTPUTS, count):
            scores = score_tokens(tiny_model, batch, outputs=outputs)
            torch.testing.assert_close(scores.logps, whole.logps)
            for name, field in fields.items():
                if name in outputs:
                    torch.testing.assert_close(scores[field], whole[field])
                else:
                    assert field not in scores
