"""`add_fused_lm_head` and its relatives: reference figures, options, errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast

from tests.conftest import build_model, load_reference
from trl.kernels import ChunkedLogProbFunction, selective_log_softmax_and_entropy
from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS, TOKEN_CHUNK_SIZE
from trl.models.fused_head import (
    FusedCausalLMOutput,
    add_fused_lm_head,
    maybe_gather_lm_head_ctx,
    patch_chunked_lm_head,
)
from trl.ops.scoring import score_tokens

ALL_OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def batch(vocab_size=512):
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(4, vocab_size, (2, 9), generator=generator)
    labels = input_ids.clone()
    labels[0, :4] = labels[1, 7:] = -100
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}


class _GivenHiddenStates(nn.Module):
    """A backbone that returns what it was built with."""

    def __init__(self, hidden_BTD):
        super().__init__()
        self.hidden_BTD = nn.Parameter(hidden_BTD)
        self.embed_tokens = nn.Embedding(1, 1)  # for `get_output_embeddings`

    def forward(self, input_ids=None, **kwargs):
        return BaseModelOutputWithPast(last_hidden_state=self.hidden_BTD[:, : input_ids.shape[1]])


def model_with_logits(logits_BTV, config):
    """A Llama whose hidden states are the given logits and whose head is the identity."""
    vocab_size = logits_BTV.shape[-1]
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=vocab_size, hidden_size=vocab_size, intermediate_size=8, num_hidden_layers=1,
                    num_attention_heads=1, head_dim=8, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    )  # fmt: skip
    model.lm_head.weight = nn.Parameter(torch.eye(vocab_size), requires_grad=False)
    if config["final_logit_softcapping"] is not None:
        model.config.final_logit_softcapping = config["final_logit_softcapping"]
    if config["logit_scale"] is not None:
        model.config.logit_scale = config["logit_scale"]
    add_fused_lm_head(model, temperature=config["temperature"], outputs=ALL_OUTPUTS)
    model.model = _GivenHiddenStates(logits_BTV)
    model._is_backbone_and_head = True  # what Llama itself ignores of this config is what is tested
    return model


@pytest.mark.parametrize("name", [name for name in load_reference("sft") if name.startswith("fused_head")])
def test_reference(name):
    case = load_reference("sft")[name]
    inputs, outputs = case["inputs"], case["outputs"]
    labels = torch.tensor(inputs["labels"])
    model = model_with_logits(torch.tensor(inputs["logits"]), case["config"])
    result = model(input_ids=labels.clamp(min=0), labels=labels, fused_lm_head=True)
    assert isinstance(result, FusedCausalLMOutput)
    assert result.loss.item() == pytest.approx(outputs["loss"], abs=1e-5)
    for field in ALL_OUTPUTS:
        torch.testing.assert_close(result[field].float(), torch.tensor(outputs[field]).float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(result.label_mask, labels[:, 1:] != -100)
    cotangents = [torch.tensor(inputs[f"cotangent_{field}"]) for field in ("log_probs", "entropy")]
    ((result.log_probs * cotangents[0]).sum() + (result.entropy * cotangents[1]).sum()).backward()
    torch.testing.assert_close(model.model.hidden_BTD.grad, torch.tensor(outputs["grad_logits"]), rtol=1e-4, atol=1e-5)


class TestAddFusedLMHead:
    def test_loss_is_the_models_own(self, tiny_model):
        add_fused_lm_head(tiny_model)
        expected = tiny_model(**batch())
        result = tiny_model(**batch(), fused_lm_head=True)
        torch.testing.assert_close(result.loss, expected.loss)
        assert set(result) == {"loss", "log_probs", "label_mask"}
        actual_grads = torch.autograd.grad(result.loss, list(tiny_model.parameters()))
        for got, want in zip(
            actual_grads, torch.autograd.grad(expected.loss, list(tiny_model.parameters())), strict=True
        ):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)

    def test_denominator_can_be_given(self, tiny_model):
        add_fused_lm_head(tiny_model)
        result = tiny_model(**batch(), fused_lm_head=True, num_items_in_batch=torch.tensor(3))
        torch.testing.assert_close(result.loss, -result.log_probs.sum() / 3)

    def test_all_masked_is_a_differentiable_zero(self, tiny_model):
        add_fused_lm_head(tiny_model, outputs=ALL_OUTPUTS)
        inputs = batch()
        inputs["labels"] = torch.full_like(inputs["labels"], -100)
        result = tiny_model(**inputs, fused_lm_head=True)
        result.loss.backward()
        assert result.loss.item() == 0
        assert not any(parameter.grad.any() for parameter in tiny_model.parameters())

    def test_patching_again_takes_the_new_options(self, tiny_model):
        add_fused_lm_head(tiny_model, temperature=1.0)
        add_fused_lm_head(tiny_model, temperature=2.0, outputs=("log_probs", "entropy"))
        result = tiny_model(**batch(), fused_lm_head=True)
        expected = score_tokens(tiny_model, batch(), temperature=2.0, with_entropy=True)
        torch.testing.assert_close(result.log_probs, expected.logps)
        torch.testing.assert_close(result.entropy, expected.entropies)

    def test_peft(self, tiny_model):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(tiny_model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        add_fused_lm_head(model)
        torch.testing.assert_close(model(**batch(), fused_lm_head=True).loss, model(**batch()).loss)

    def test_router_loss_is_added_with_the_models_coefficient(self):
        model = build_model(
            architecture="mixtral", num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5
        )
        add_fused_lm_head(model)
        result, expected = model(**batch(), fused_lm_head=True), model(**batch())
        torch.testing.assert_close(result.aux_loss, expected.aux_loss)
        torch.testing.assert_close(result.loss, expected.loss)

    @pytest.mark.parametrize("tied", [False, True])
    def test_head_in_float32(self, tied):
        """A bfloat16 model with the head in float32 is closer to exact than with the head in bfloat16."""
        model = build_model(tie_word_embeddings=tied).bfloat16()
        plain = model(**batch()).logits
        add_fused_lm_head(model, cast_lm_head_to_fp32=True)
        add_fused_lm_head(model, cast_lm_head_to_fp32=True)
        assert model.lm_head.weight.dtype == torch.float32
        assert model.get_input_embeddings()(batch()["input_ids"]).dtype == torch.bfloat16
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = model(**batch(), fused_lm_head=True)
        seen = []
        hook = model.model.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(**batch(), fused_lm_head=True)
        hook.remove()
        targets = batch()["labels"][:, 1:]
        exact = (seen[0][:, :-1].double() @ model.lm_head.weight.double().t()).log_softmax(-1)
        exact = exact.gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2) * (targets != -100)
        torch.testing.assert_close(result.log_probs.double(), exact, rtol=1e-5, atol=1e-5)
        assert plain.dtype == torch.bfloat16
        result.loss.backward()
        assert model.lm_head.weight.grad.dtype == torch.float32

    def test_head_in_float32_refuses_an_adapter_on_the_head(self, tiny_model):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(tiny_model, LoraConfig(target_modules=["lm_head"]))
        with pytest.raises(ValueError, match="Take `lm_head` out of the adapter"):
            add_fused_lm_head(model, cast_lm_head_to_fp32=True)

    def test_errors(self, tiny_model):
        with pytest.raises(ValueError, match="Unknown outputs"):
            add_fused_lm_head(tiny_model, outputs=("logits",))
        add_fused_lm_head(tiny_model)
        with pytest.raises(ValueError, match="needs `labels` or `shift_labels`"):
            tiny_model(input_ids=batch()["input_ids"], fused_lm_head=True)


def test_patch_chunked_lm_head(tiny_model):
    expected = score_tokens(tiny_model, batch(), temperature=0.5, with_entropy=True)
    patch_chunked_lm_head(tiny_model, chunk_size=3, temperature=0.5)
    result = tiny_model(**batch())
    torch.testing.assert_close(result.log_probs, expected.logps)
    torch.testing.assert_close(result.entropy, expected.entropies)
    assert tiny_model(input_ids=batch()["input_ids"]).logits.shape == (2, 9, 512)
    torch.testing.assert_close(score_tokens(tiny_model, batch(), temperature=0.5).logps, expected.logps)


def test_gathering_does_nothing_for_whole_parameters(tiny_model):
    with maybe_gather_lm_head_ctx(tiny_model.lm_head.weight, None):
        assert tiny_model.lm_head.weight.shape == (512, 32)


def test_gathering_hands_partitioned_parameters_to_deepspeed(monkeypatch):
    import sys
    import types

    gathered = []

    class GatheredParameters:
        def __init__(self, params, modifier_rank):
            self.params = params

        def __enter__(self):
            gathered.extend(self.params)

        def __exit__(self, *_):
            return None

    fake = types.SimpleNamespace(zero=types.SimpleNamespace(GatheredParameters=GatheredParameters))
    monkeypatch.setitem(sys.modules, "deepspeed", fake)
    weight = nn.Parameter(torch.zeros(2, 2))
    weight.ds_id = 0
    with maybe_gather_lm_head_ctx(weight, None):
        assert gathered == [weight]
    # What a running module holds is whole, and DeepSpeed refuses to free it.
    held = nn.Parameter(torch.zeros(2, 2))
    held.ds_id, held.ds_active_sub_modules = 1, {7}
    with maybe_gather_lm_head_ctx(held, weight):
        assert gathered == [weight, weight]


class TestKernels:
    def test_constants(self):
        assert OPTIONAL_OUTPUTS == ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
        assert TOKEN_CHUNK_SIZE == 4096

    def test_chunked_log_probs(self):
        hidden, weight = torch.randn(5, 4), torch.randn(7, 4)
        targets = torch.tensor([0, 6, 3, 1, 2])
        logps, entropy, *others = ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, 0.5, 2, None, 1.0, ("entropy",)
        )
        expected = (hidden @ weight.t() / 0.5).log_softmax(-1)
        torch.testing.assert_close(logps, expected.gather(1, targets.unsqueeze(1)).squeeze(1))
        torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1))
        assert others == [None, None, None]

    @pytest.mark.parametrize("masked", [False, True])
    def test_selective_log_softmax_and_entropy(self, masked, monkeypatch):
        monkeypatch.setattr("trl.kernels.logprob_entropy._BLOCK_ELEMENTS", 20)
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
        index = torch.randint(0, 7, (3, 5), generator=generator)
        row_mask = torch.rand(3, 5, generator=generator) < 0.5 if masked else None
        scale = torch.ones(3, 5) if row_mask is None else row_mask
        logps = (logits / 0.7).log_softmax(-1)
        expected = (
            logps.gather(2, index.unsqueeze(2)).squeeze(2) * scale,
            -(logps.exp() * logps).sum(-1) * scale,
        )
        actual = selective_log_softmax_and_entropy(logits, index, 0.7, row_mask)
        for got, want in zip(actual, expected, strict=True):
            torch.testing.assert_close(got, want)
        cotangent = torch.randn(3, 5, generator=generator, dtype=torch.float64)
        grads = [
            torch.autograd.grad((values[0] * cotangent).sum() - (values[1] * cotangent**2).sum(), logits)[0]
            for values in (actual, expected)
        ]
        torch.testing.assert_close(*grads)
