import pytest
import torch
from accelerate import Accelerator
from torch import nn

from tests.callbacks.helpers import make_trainer
from tests.conftest import build_model, load_reference
from trl.callbacks.reference_sync import SyncRefModelCallback
from trl.models.reference import create_reference_model


def test_reference_figures():
    case = load_reference("extra")["sync_ref"]
    model, reference = nn.Linear(3, 2), nn.Linear(3, 2)
    for module, values in ((model, case["inputs"]["model"]), (reference, case["inputs"]["ref"])):
        module.weight.data, module.bias.data = (torch.tensor(value) for value in values)
    before = [parameter.clone() for parameter in model.parameters()]
    SyncRefModelCallback.sync_target_model(model, reference, case["config"]["ref_model_mixup_alpha"])
    for parameter, expected in zip(reference.parameters(), case["outputs"]["ref"], strict=True):
        torch.testing.assert_close(parameter, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("accelerator", [None, Accelerator])
def test_every_so_many_steps(tokenizer, tmp_path, accelerator):
    model = build_model()
    reference = create_reference_model(model)
    callback = SyncRefModelCallback(reference, accelerator() if accelerator else None)
    trainer = make_trainer(tokenizer, tmp_path, [callback], model=model, max_steps=4)
    trainer.args.ref_model_sync_steps, trainer.args.ref_model_mixup_alpha = 4, 1.0
    start = reference.lm_head.weight.clone()
    trainer.train()
    assert torch.equal(reference.lm_head.weight, model.lm_head.weight)  # step 4, the last
    assert not torch.equal(start, model.lm_head.weight)
    assert not any(parameter.requires_grad for parameter in reference.parameters())


def test_not_between(tokenizer, tmp_path):
    model = build_model()
    reference = create_reference_model(model)
    start = reference.lm_head.weight.clone()
    trainer = make_trainer(tokenizer, tmp_path, [SyncRefModelCallback(reference, None)], model=model, max_steps=2)
    trainer.args.ref_model_sync_steps, trainer.args.ref_model_mixup_alpha = 3, 1.0
    trainer.train()
    assert torch.equal(reference.lm_head.weight, start)


def test_other_dtype():
    model, reference = build_model(), build_model(seed=1).bfloat16()
    SyncRefModelCallback.sync_target_model(model, reference, 1.0)
    assert torch.equal(reference.lm_head.weight, model.lm_head.weight.bfloat16())
