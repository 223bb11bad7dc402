import math

import pytest
import torch
from accelerate import Accelerator

from tests.conftest import build_model
from trl.models.weight_export import iter_weights
from trl.rollouts import weight_probe
from trl.rollouts.weight_probe import (
    LAYER_TOLERANCES,
    TOLERANCES,
    compare_fingerprints,
    difference,
    fingerprint,
    make_probe,
    probe_vector,
    trainer_logps,
    verify_weights,
)

FLOAT32 = [torch.float32]


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def logps_of(model, sequences, temperature=1.0):
    """An engine that computes as Transformers does, each sequence by itself."""
    found = []
    for ids in sequences:
        with torch.no_grad():
            logps = torch.log_softmax(model.eval()(torch.tensor([list(ids)])).logits[0] / temperature, -1)
        found.append(logps[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist())
    return found


# ---- The probe ----


def test_a_probe_is_always_the_same(tiny_model):
    """For a model, on every process and after every restart; it moves no generator."""
    state = torch.random.get_rng_state()
    probe = make_probe(tiny_model, FLOAT32)
    torch.manual_seed(1)
    assert make_probe(tiny_model, FLOAT32) == probe
    torch.random.set_rng_state(state)
    ids = [token for sequence in probe.sequences for token in sequence]
    assert [len(sequence) for sequence in probe.sequences] == [24, 12]
    assert all(0 <= token < 512 for token in ids)
    assert max(ids) > 400 > 100 > min(ids)
    assert len(set(ids)) > 30


def test_a_probe_fits_the_context():
    """Of the model, or of an engine that takes less; there is always something to score."""
    assert len(make_probe(build_model(max_position_embeddings=20), FLOAT32).sequences[0]) == 19
    assert len(make_probe(build_model(), FLOAT32, longest=9).sequences[0]) == 8
    assert all(len(sequence) >= 2 for sequence in make_probe(build_model(), FLOAT32, longest=4).sequences)


def test_a_probe_has_no_placeholders(tiny_model):
    """A token that stands for an image has no meaning without one."""
    plain = make_probe(tiny_model, FLOAT32)
    special = plain.sequences[0][:5]
    probe = make_probe(tiny_model, FLOAT32, special_ids=special)
    assert not set(special) & {token for sequence in probe.sequences for token in sequence}
    assert len(probe.sequences[0]) == 24


def test_the_coarsest_precision_decides(tiny_model):
    """Trainer in float32, engine in bfloat16: as near as bfloat16 can be."""
    probe = make_probe(tiny_model, [torch.float32, torch.bfloat16])
    assert probe.tolerance == TOLERANCES[torch.bfloat16]
    assert probe.layer_tolerance == LAYER_TOLERANCES[torch.bfloat16]
    assert make_probe(tiny_model, FLOAT32).tolerance == TOLERANCES[torch.float32] <= 2e-3


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_trainers_side_is_the_models_log_probs(accelerator, temperature):
    """Padding and dropout change nothing; the model's mode is as it was."""
    model = build_model(attention_dropout=0.5).train()
    model.model.norm.eval()
    probe = make_probe(model, FLOAT32, temperature=temperature)
    found = trainer_logps(model, accelerator, probe)
    assert model.training and not model.model.norm.training
    assert [len(row) for row in found] == [23, 11]
    expected = logps_of(model, probe.sequences, temperature)
    for row, other in zip(found, expected, strict=True):
        assert (torch.tensor(row) - torch.tensor(other)).abs().max() < 1e-5


# ---- The comparison ----


def test_differences():
    assert difference([[1.0, 2.0], [3.0]], [[1.0, 2.5], [2.0]]) == (0.5, 1.0)
    for wrong in (
        [[1.0, math.nan], [3.0]],
        [[1.0, None], [3.0]],
        [[1.0], [3.0]],
        [[1.0, 2.0]],
        [[1.0, math.inf], [3.0]],
    ):
        assert difference([[1.0, 2.0], [3.0]], wrong) == (math.inf, math.inf)
    assert difference([[math.nan]], [[1.0]]) == (math.inf, math.inf)


class Engine:
    """A copy of the weights, and what may be wrong with it."""

    def __init__(self, model):
        self.model = model
        self.copy = build_model(seed=1)
        self.repairs = 0
        self.repairs_work = True
        self.load()

    def load(self):
        self.copy.load_state_dict(self.model.state_dict())

    def repair(self):
        self.repairs += 1
        if self.repairs_work:
            self.load()

    def verify(self, accelerator, fingerprints=None, score=None, **probe):
        return verify_weights(
            self.model,
            accelerator,
            make_probe(self.model, FLOAT32, **probe),
            score or (lambda sequences: logps_of(self.copy, sequences)),
            self.repair,
            "The engine of this test",
            fingerprints,
        )


@pytest.fixture
def engine(tiny_model):
    return Engine(tiny_model)


@pytest.fixture
def said(monkeypatch):
    messages = []
    monkeypatch.setattr(weight_probe.logger, "warning", messages.append)
    return messages


def test_the_right_weights_pass_in_silence(engine, accelerator, said):
    assert engine.verify(accelerator) < 1e-5
    assert engine.repairs == 0
    assert said == []


@pytest.mark.parametrize(
    "layer",
    ["model.embed_tokens", "model.layers.0.self_attn.v_proj", "model.layers.1.mlp.up_proj", "model.norm", "lm_head"],
)
def test_a_layer_of_other_weights_is_noticed_and_repaired(engine, accelerator, said, layer):
    """Wherever it is: the weights are loaded once more, and it is said before and after."""
    with torch.no_grad():
        engine.copy.get_submodule(layer).weight.copy_(build_model(seed=7).get_submodule(layer).weight + 0.5)
    assert engine.verify(accelerator) < 1e-5
    assert engine.repairs == 1
    assert len(said) == 2
    assert "The engine of this test does not compute what the trainer does" in said[0]
    assert "has the trainer's weights now" in said[1]


def test_what_cannot_be_repaired_stops_the_run(engine, accelerator, said):
    """The error names the engine, the numbers, likely causes and the way on."""
    engine.repairs_work = False
    engine.copy = build_model(seed=5)
    with pytest.raises(RuntimeError, match="The engine of this test does not have the trainer's weights") as caught:
        engine.verify(accelerator)
    assert engine.repairs == 1
    for word in ("0.002 is expected", "vllm_dtype", "vllm_model_impl", 'vllm_verify="full"', 'vllm_verify="off"'):
        assert word in str(caught.value)


@pytest.mark.parametrize("bad", [math.nan, None, math.inf])
def test_numbers_that_are_none_never_pass(engine, accelerator, said, bad):
    engine.repairs_work = False

    def score(sequences):
        found = logps_of(engine.copy, sequences)
        found[0][3] = bad
        return found

    with pytest.raises(RuntimeError, match="differ by inf nats"):
        engine.verify(accelerator, score=score)


def test_a_model_that_is_not_a_number_never_passes(engine, accelerator, said):
    """A diverged policy: NaN on both sides is no agreement."""
    with torch.no_grad():
        engine.model.model.norm.weight[0] = math.nan
    with pytest.raises(RuntimeError, match="differ by inf nats"):
        engine.verify(accelerator)


def test_another_temperature_is_noticed(engine, accelerator, said):
    """The engine's log-probs are at the probe's temperature; at another one they are other numbers."""
    probed = {"temperature": 0.7}
    assert engine.verify(accelerator, score=lambda ids: logps_of(engine.copy, ids, 0.7), **probed) < 1e-5
    with pytest.raises(RuntimeError):
        engine.verify(accelerator, **probed)


# ---- Layer by layer ----


def engine_fingerprints(model, accelerator, fused=False):
    """As an engine would say it: query, key and value on top of each other where it fuses them."""
    outputs = {}
    for name, tensor in iter_weights(model, accelerator):
        outputs[name] = tensor if tensor.dim() == 1 else tensor @ probe_vector(tensor.shape[1])
    found = {name: fingerprint(output) for name, output in outputs.items()}
    if fused:
        for index in range(2):
            parts = [f"model.layers.{index}.self_attn.{part}_proj.weight" for part in "qkv"]
            for part in parts:
                del found[part]
            found["+".join(parts)] = fingerprint(torch.cat([outputs[part] for part in parts]))
    return found


@pytest.mark.parametrize("fused", [False, True])
def test_the_full_check_names_the_layers(engine, accelerator, said, fused):
    """A change too small for log-probs to tell, and which layer it is in."""
    engine.repairs_work = False

    def fingerprints():
        return engine_fingerprints(engine.copy, accelerator, fused)

    assert engine.verify(accelerator, fingerprints) < 1e-5
    with torch.no_grad():
        engine.copy.model.layers[1].self_attn.k_proj.weight.mul_(1.01)
    assert engine.verify(accelerator) < TOLERANCES[torch.float32]
    with pytest.raises(RuntimeError, match=r"these layers differ: .*model\.layers\.1\.self_attn\.k_proj\.weight"):
        engine.verify(accelerator, fingerprints)


def test_the_full_check_repairs(engine, accelerator, said):
    with torch.no_grad():
        engine.copy.model.layers[0].mlp.down_proj.weight.mul_(1.01)
    engine.verify(accelerator, lambda: engine_fingerprints(engine.copy, accelerator))
    assert engine.repairs == 1


def test_a_tied_head_has_a_fingerprint_of_its_own(accelerator):
    """The head is left out of the export, but an engine keeps it apart, packed: it is compared all the same."""
    model = build_model(tie_word_embeddings=True)
    own = weight_probe._own_fingerprints(model, accelerator)
    assert own["lm_head.weight"] == own["model.embed_tokens.weight"]
    stale = fingerprint(build_model(seed=4).lm_head.weight @ probe_vector(32))
    assert compare_fingerprints(own, {"lm_head.weight": stale}, 1e-4) == ["lm_head.weight"]


def test_fingerprints():
    """Sum and length: of permuted or fused parts the same; of a swapped sign, a scaled part or an empty one not."""
    output = torch.tensor([1.0, -2.0, 3.0])
    assert fingerprint(output) == fingerprint(output.flip(0)) == (2.0, 14.0)
    own = {"a": (2.0, 14.0), "b": (1.0, 1.0)}
    assert compare_fingerprints(own, {"a+b": (3.0, 15.0)}, 1e-6) == []
    for wrong in ((-3.0, 15.0), (3.0, 15.1), (0.0, 0.0), (math.nan, 15.0)):
        assert compare_fingerprints(own, {"a+b": wrong}, 1e-6) == ["a+b"], wrong
    assert compare_fingerprints(own, {"other": (1.0, 1.0)}, 1e-6) == []
    assert torch.equal(probe_vector(8), probe_vector(8))
    assert abs(probe_vector(4096).norm() - 1) < 0.1
