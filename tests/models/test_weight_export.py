import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from tests.conftest import build_model
from tests.two_processes import run_on_two_processes
from trl.models.weight_export import WeightInfo, base_model_of, has_tied_head, iter_weights, weight_manifest

peft = pytest.importorskip("peft")

IDS = torch.arange(3, 23).view(2, 10)


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def perturb(model):
    """What a while of training leaves: no adapter is the identity any more."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def bits_of(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def export(model, accelerator, dtype=None):
    """The exported weights; each once, as announced, and the model as it was to the last bit."""
    before = bits_of(model)
    weights = [(name, tensor.clone()) for name, tensor in iter_weights(model, accelerator, dtype)]
    found = [WeightInfo(name, str(tensor.dtype).split(".")[-1], tuple(tensor.shape)) for name, tensor in weights]
    assert weight_manifest(model, accelerator, dtype) == found
    assert len({name for name, _ in weights}) == len(weights)
    assert not any(tensor.requires_grad for _, tensor in weights)
    after = model.state_dict()
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    return dict(weights)


def assert_computes_the_same(model, weights, tolerance=1e-5, **config):
    """A plain model with the exported weights, and nothing else, is the exported one."""
    plain = build_model(seed=99, tie_word_embeddings=has_tied_head(model), **config)
    missing, unexpected = plain.load_state_dict(weights, strict=False)
    assert unexpected == []
    assert missing == (["lm_head.weight"] if has_tied_head(model) else [])
    assert (logits_of(plain) - logits_of(model)).abs().max() < tolerance


# ---------------------------------------------------------------------------------------------------------------------
# Bare models
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_a_bare_model(accelerator, tied):
    """All weights under the names of `state_dict`; a head that is the embeddings is left out."""
    model = build_model(tie_word_embeddings=tied)
    weights = export(model, accelerator)
    state = model.state_dict()
    assert list(weights) == [name for name in state if not (tied and name == "lm_head.weight")]
    assert all(torch.equal(weights[name], state[name]) for name in weights)
    assert has_tied_head(model) is tied
    assert base_model_of(model) is model


def test_nothing_is_copied_of_a_bare_model(accelerator):
    """The model is never whole twice: what can be shared is."""
    model = build_model()
    own = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert all(tensor.data_ptr() in own for _, tensor in iter_weights(model, accelerator))


def test_buffers_that_are_saved_are_weights(accelerator):
    """Persistent buffers are exported, others (rotary frequencies) are not."""
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model.register_buffer("scratch", torch.ones(2), persistent=False)
    weights = export(model, accelerator)
    assert set(weights) == set(model.state_dict())
    assert "1.running_mean" in weights


def test_dtype_of_matrices(accelerator):
    """Matrices are cast where asked for; norms and biases, and whole numbers, keep their own dtype."""
    model = build_model(attention_bias=True)
    model.register_buffer("counts", torch.zeros(2, 2, dtype=torch.int64))
    weights = export(model, accelerator, torch.bfloat16)
    for name, tensor in weights.items():
        kept = "norm" in name or name.endswith("bias")
        expected = torch.int64 if name == "counts" else torch.float32 if kept else torch.bfloat16
        assert tensor.dtype is expected, name
    announced = {info.dtype for info in weight_manifest(model, accelerator, torch.bfloat16)}
    assert announced == {"bfloat16", "float32", "int64"}


def test_a_compiled_model_has_the_plain_names(accelerator):
    """`torch.compile`, of the whole or of layers, adds nothing to a name."""
    model = build_model()
    expected = export(model, accelerator)
    for name, layer in list(model.model.layers.named_children()):
        model.model.layers._modules[name] = torch.compile(layer)
    weights = dict(iter_weights(torch.compile(model), accelerator))
    assert list(weights) == list(expected)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


# ---------------------------------------------------------------------------------------------------------------------
# Adapters
# ---------------------------------------------------------------------------------------------------------------------

LORA = {
    "all linear layers": {"target_modules": "all-linear"},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "DoRA": {"target_modules": "all-linear", "use_dora": True},
    "DoRA on embeddings": {"target_modules": ["v_proj", "embed_tokens"], "use_dora": True},
    "rank-stabilized": {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 3},
    "ranks by layer": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}},
    "bias": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "whole embeddings and head": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "single tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [4, 5]},
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", LORA)
@pytest.mark.filterwarnings("ignore")  # PEFT's advice on tied embeddings
def test_lora(accelerator, name, tied):
    """A plain model with the exported weights computes what the adapted one does; the base keeps every bit."""
    config = {"attention_bias": True, "tie_word_embeddings": tied}
    base = build_model(**config)
    model = perturb(peft.get_peft_model(base, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **LORA[name])))
    unadapted = build_model(**config)
    weights = export(model, accelerator)
    assert (logits_of(unadapted) - logits_of(model)).abs().max() > 1e-3
    assert_computes_the_same(model, weights, attention_bias=True)
    assert base_model_of(model) is base


OTHERS = {
    "IA3": lambda: peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "LoHa": lambda: peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], r=4),
    "LoKr": lambda: peft.LoKrConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], r=4),
    "OFT": lambda: peft.OFTConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], oft_block_size=4),
    "single tokens": lambda: peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[4, 5]),
    "VeRA": lambda: peft.VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_adapters(accelerator, name):
    """What is merged is what the adapter's own `merge` makes, whichever adapter it is."""
    model = perturb(peft.get_peft_model(build_model(), OTHERS[name]()))
    assert_computes_the_same(model, export(model, accelerator))


def test_two_adapters_at_once(accelerator):
    """All active adapters are merged, inactive ones are not."""
    model = peft.get_peft_model(build_model(), peft.LoraConfig(r=4, target_modules=["q_proj"]), "one")
    model.add_adapter("two", peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model.base_model.set_adapter(["one", "two"])
    perturb(model)
    both = export(model, accelerator)
    assert_computes_the_same(model, both)
    model.set_adapter("two")
    second = export(model, accelerator)
    assert_computes_the_same(model, second)
    assert not torch.equal(
        both["model.layers.0.self_attn.q_proj.weight"], second["model.layers.0.self_attn.q_proj.weight"]
    )


@pytest.mark.parametrize("kwargs", [{"target_modules": "all-linear"}, LORA["whole head"], LORA["single tokens"]])
def test_a_disabled_adapter_is_left_out(accelerator, kwargs):
    """Where the adapter is off, as for a reference, the base is exported."""
    base = build_model(tie_word_embeddings=False)
    expected = bits_of(base)
    model = perturb(peft.get_peft_model(base, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **kwargs)))
    with model.disable_adapter():
        weights = export(model, accelerator)
        assert_computes_the_same(model, weights)
    assert set(weights) == set(expected)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_an_adapter_that_is_merged_already(accelerator):
    """What someone merged into the base is not merged twice."""
    model = perturb(peft.get_peft_model(build_model(), peft.LoraConfig(r=4, target_modules="all-linear")))
    expected = logits_of(model)
    model.merge_adapter()
    weights = export(model, accelerator)
    assert_computes_the_same(model, weights)
    assert (logits_of(model) - expected).abs().max() < 1e-5


def test_an_adapter_on_one_of_two_tied_weights_unties_them(accelerator):
    """Embeddings with an adapter and the head without it are two weights, whatever the config says."""
    model = build_model(tie_word_embeddings=True)
    adapted = perturb(peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["embed_tokens"])))
    assert model.config.tie_word_embeddings
    assert not has_tied_head(adapted)
    weights = export(adapted, accelerator)
    assert not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    assert_computes_the_same(adapted, weights)


def test_many_exports_leave_every_bit(accelerator):
    """A thousand weight syncs of an adapter: base and adapter are bit-identical, and the export too."""
    model = build_model(num_hidden_layers=1, vocab_size=32, intermediate_size=32)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])
    model = perturb(peft.get_peft_model(model, config))
    before = bits_of(model)
    first = {name: tensor.clone() for name, tensor in iter_weights(model, accelerator)}
    for _ in range(998):
        for _ in iter_weights(model, accelerator):
            pass
    last = dict(iter_weights(model, accelerator))
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(first[name], last[name]) for name in first)
    assert not any(module.merged for module in model.modules() if hasattr(module, "merged_adapters"))


# ---------------------------------------------------------------------------------------------------------------------
# Quantized bases
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantized_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("to-quantize")
    build_model(hidden_size=64, attention_bias=True).save_pretrained(path)
    return path


def load_quantized(path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=quantization, dtype=torch.float32)


def assert_computes_the_same_in_4_bits(model, weights):
    """Against the computation in training mode: in evaluation, bitsandbytes rounds to bfloat16 on some CPUs."""
    plain = build_model(seed=99, hidden_size=64, attention_bias=True)
    assert plain.load_state_dict(weights, strict=False) == (["lm_head.weight"] if has_tied_head(model) else [], [])
    with torch.no_grad():
        difference = plain(IDS).logits - model.train()(IDS).logits
    assert difference.abs().max() < 1e-5


def test_a_quantized_base(accelerator, quantized_path):
    """Weights in 4 bits leave as the numbers that the model computes with."""
    model = load_quantized(quantized_path)
    assert type(model.model.layers[0].mlp.up_proj.weight).__name__ == "Params4bit"
    assert_computes_the_same_in_4_bits(model, export(model, accelerator))


def test_lora_on_a_quantized_base(accelerator, quantized_path):
    """The adapter is added to the dequantized weight, whose sum is not quantized again; the 4 bits stay."""
    config = peft.LoraConfig(r=4, target_modules="all-linear", use_rslora=True, task_type="CAUSAL_LM")
    model = perturb(peft.get_peft_model(load_quantized(quantized_path), config))
    assert_computes_the_same_in_4_bits(model, export(model, accelerator))
    with model.disable_adapter():
        assert_computes_the_same_in_4_bits(model, export(model, accelerator))


@pytest.mark.parametrize("adapted", [False, True])
def test_a_quantized_base_after_an_evaluation(accelerator, quantized_path, adapted):
    """An evaluation makes bitsandbytes keep the 4 bits in another order on some CPUs: the same weights leave."""
    model = load_quantized(quantized_path)
    if adapted:
        model = perturb(peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear")))
    expected, manifest = dict(iter_weights(model, accelerator)), weight_manifest(model, accelerator)
    logits_of(model)
    weights = [(name, tensor.clone()) for name, tensor in iter_weights(model, accelerator)]
    assert weight_manifest(model, accelerator) == manifest
    assert [info.name for info in manifest] == [name for name, _ in weights]
    for name, tensor in weights:  # scales are rounded to bfloat16
        torch.testing.assert_close(tensor, expected[name], rtol=1e-2, atol=1e-3)


def test_a_variant_of_lora_on_a_quantized_base_is_refused(accelerator, quantized_path):
    """DoRA's norms cannot be had without the weight: an error, not another policy."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)
    model = peft.get_peft_model(load_quantized(quantized_path), config)
    with pytest.raises(ValueError, match="plain LoRA"):
        list(iter_weights(model, accelerator))


# ---------------------------------------------------------------------------------------------------------------------
# Published names
# ---------------------------------------------------------------------------------------------------------------------


def build_mixtral():
    return build_model(architecture="mixtral", num_local_experts=4, num_experts_per_tok=2)


def build_qwen_moe():
    return build_model(
        architecture="qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1
    )


def build_llava():
    from transformers import AutoConfig, AutoModelForImageTextToText

    text = build_model().config
    vision = AutoConfig.for_model(
        "clip_vision_model",
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=16,
    )
    config = AutoConfig.for_model("llava", text_config=text, vision_config=vision, image_token_index=511)
    return AutoModelForImageTextToText.from_config(config).float()


def published(model, folder):
    model.save_pretrained(folder)
    index = Path(folder, "model.safetensors.index.json")
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else ["model.safetensors"]
    return {name: tensor for file in files for name, tensor in load_file(Path(folder, file)).items()}


@pytest.mark.parametrize("build", [build_model, build_mixtral, build_qwen_moe, build_llava])
def test_names_and_values_are_those_of_save_pretrained(accelerator, tmp_path, build):
    """Where Transformers keeps a model under other names, or experts in one stack, it leaves as it is published."""
    model = build()
    expected = published(model, tmp_path)
    weights = export(model, accelerator)
    assert set(weights) == set(expected)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    if build is build_mixtral:
        assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in weights


def test_lora_on_a_model_with_names_of_its_own(accelerator, tmp_path):
    """Adapters on layers beside stacked experts: merged, and everything under published names."""
    model = build_mixtral()
    adapted = perturb(peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])))
    weights = export(adapted, accelerator)
    merged = adapted.merge_and_unload()
    expected = published(merged, tmp_path)
    assert set(weights) == set(expected)
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_lora_on_stacked_experts(accelerator, tmp_path):
    """PEFT's `target_parameters` on an expert stack: one tensor of all experts, merged and taken apart."""
    model = build_mixtral()
    names = [name for name, tensor in model.named_parameters() if tensor.dim() == 3]
    targets = [name.split("layers.0.")[-1] for name in names if "layers.0." in name]
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets)
    adapted = perturb(peft.get_peft_model(model, config))
    expected_logits = logits_of(adapted)
    weights = export(adapted, accelerator)
    merged = adapted.merge_and_unload()
    assert (logits_of(merged) - expected_logits).abs().max() < 1e-5
    expected = published(merged, tmp_path)
    assert set(weights) == set(expected)
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], atol=1e-6, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------------------------------

_TWO_PROCESSES = """
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from peft import LoraConfig, get_peft_model
from tests.conftest import build_model
from trl.models.distributed import prepare_fsdp
from trl.models.weight_export import iter_weights, weight_manifest

accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2


def build(adapted):
    model = build_model(tie_word_embeddings=True)
    if adapted:
        torch.manual_seed(3)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", use_dora=True))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def check(model, expected):
    local = lambda: [getattr(p, "_local_tensor", p).detach().clone() for p in model.parameters()]
    before = local()
    manifest = weight_manifest(model, accelerator)
    weights = list(iter_weights(model, accelerator))
    assert [(i.name, i.shape, i.dtype) for i in manifest] == [(n, tuple(t.shape), "float32") for n, t in weights]
    assert [name for name, _ in weights] == list(expected), set(expected) ^ {name for name, _ in weights}
    for name, tensor in weights:
        assert not hasattr(tensor, "full_tensor"), name
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-5)
    assert all(torch.equal(one, other) for one, other in zip(before, local()))


expected = {adapted: dict(iter_weights(build(adapted), accelerator)) for adapted in (False, True)}
for adapted in (False, True):
    model = accelerator.prepare(build(adapted))
    assert type(model).__name__ == "DistributedDataParallel"
    check(model, expected[adapted])
    print("ddp")
accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2,
    auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"])
for adapted in (False, True):
    model = prepare_fsdp(build(adapted), accelerator)
    assert any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    check(model, expected[adapted])
    print("fsdp2")
"""


def test_on_two_processes():
    """Wrapped or sharded, the weights are whole and plain on both processes, and what is sharded stays so."""
    outputs = run_on_two_processes(_TWO_PROCESSES)
    assert all(output.split()[-4:] == ["ddp", "ddp", "fsdp2", "fsdp2"] for output in outputs)
