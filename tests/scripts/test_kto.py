"""The KTO script on a tiny model: rows with a label, and pairs that it takes apart."""

import re

import pytest
from transformers import AutoModelForCausalLM

from trl.scripts import kto

ROWS = [
    {
        "prompt": [{"role": "user", "content": f"what is {i} plus 1?"}],
        "completion": [{"role": "assistant", "content": f"the answer is {i + 1}." if i % 2 else f"the sky is {i}."}],
        "label": bool(i % 2),
    }
    for i in range(12)
]
PAIRS = [
    {
        "prompt": f"what is {i} plus 1? ",
        "chosen": f"the answer is {i + 1}.",
        "rejected": f"the sky is {i}.",
    }
    for i in range(12)
]


@pytest.mark.parametrize("rows", [ROWS, PAIRS], ids=["labels", "pairs"])
@pytest.mark.parametrize("more", [[], ["--loss_type", "apo_zero_unpaired"], ["--use_peft", "--lora_r", "2"]])
def test_trains_and_saves(make_flags, tmp_path, capsys, rows, more):
    parser = kto.make_parser()
    kto.main(*parser.parse_args_and_config([*make_flags(rows), "--learning_rate", "1e-2", *more]))
    printed = capsys.readouterr().out
    assert "Training is complete." in printed
    losses = [float(value) for value in re.findall(r"'loss': '?([\d.]+)", printed)]
    # Each batch of two has both kinds, and the policy is the reference: both classes' losses are 1 - 1/2.
    assert losses[0] == pytest.approx(0.5, abs=1e-4)
    assert len(losses) == 2
    assert "'rewards/margins'" in printed
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_batch_of_one_is_refused(make_flags):
    """It has no neighbour whose answer could be mismatched."""
    arguments = make_flags(ROWS)
    arguments[arguments.index("--per_device_train_batch_size") + 1] = "1"
    with pytest.raises(ValueError, match="per_device_train_batch_size"):
        kto.main(*kto.make_parser().parse_args_and_config(arguments))
