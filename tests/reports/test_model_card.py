import dataclasses

import pytest
from huggingface_hub import ModelCard

from trl.reports.model_card import (
    framework_versions,
    generate_completions_card,
    generate_model_card,
    training_arguments_table,
)
from trl.trainer.sft_config import SFTConfig

REQUIRED = {
    "base_model": "org/base",
    "model_name": "My model",
    "hub_model_id": "me/my-model",
    "dataset_name": "org/data",
    "tags": ["trl", "sft", "generated_from_trainer"],
    "wandb_url": None,
    "trackio_url": None,
    "trainer_name": "SFT",
}


def _config(tmp_path, **changes):
    return SFTConfig(str(tmp_path / "out"), report_to="none", use_cpu=True, bf16=False, **changes)


def test_card_can_be_read_back(tmp_path):
    generate_model_card(**REQUIRED).save(tmp_path / "README.md")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "org/base"
    assert card.data.datasets == "org/data"
    assert card.data.library_name == "transformers"
    assert card.data.tags == REQUIRED["tags"]
    assert "# My model" in card.text
    assert 'model="me/my-model"' in card.text
    assert "[org/data](https://huggingface.co/datasets/org/data)" in card.text
    assert "{{ " not in card.content
    assert "{%" not in card.content
    assert "None" not in card.content


def test_without_base_model_and_dataset():
    card = generate_model_card(**{**REQUIRED, "base_model": None, "dataset_name": None})
    assert card.data.base_model is None
    assert "base_model" not in card.content.split("---")[1]
    assert "A fine-tuned language model." in " ".join(card.text.split()).replace(" .", ".")


def test_several_datasets():
    card = generate_model_card(**{**REQUIRED, "dataset_name": ["a/b", "c/d"]})
    assert card.data.datasets == ["a/b", "c/d"]
    assert "datasets/a/b) and [c/d]" in card.text


def test_everything_optional_is_shown(tmp_path):
    card = generate_model_card(
        **{**REQUIRED, "wandb_url": "http://w", "trackio_url": "http://t"},
        comet_url="http://c",
        trainer_citation="@article{method, title = {The Method}}",
        paper_title="The Method",
        paper_id="1234.56789",
        arguments=_config(tmp_path, learning_rate=3e-4, packing=True),
        curves=tmp_path / "training_curves.png",
    )
    for part in (
        "[Weights & Biases](http://w), [trackio](http://t), [Comet](http://c)",
        "[The Method](https://huggingface.co/papers/1234.56789)",
        "@article{method, title = {The Method}}",
        "![Training curves](training_curves.png)",
        "| `learning_rate` | `0.0003` |",
        "| `packing` | `True` |",
    ):
        assert part in card.text, part
    assert str(tmp_path) not in card.content


def test_no_secret_and_no_path_in_the_arguments(tmp_path):
    secrets = {"hub_token": "hf_secret", "hub_model_id": "me/x", "run_name": "machine-7", "eos_token": "<eos>"}
    table = dict(training_arguments_table(_config(tmp_path, **secrets)))
    text = str(table)
    assert "hf_secret" not in text
    assert str(tmp_path) not in text
    assert "machine-7" not in text
    assert table["eos_token"] == "<eos>"
    mapping = {"api_key": "k", "my_token": "t", "cache_dir": "/home/me", "model_path": "/home/me/x", "lr": 1}
    assert dict(training_arguments_table(mapping)) == {"lr": "1"}


def test_arguments_are_the_usual_and_the_changed():
    @dataclasses.dataclass
    class Arguments:
        learning_rate: float = 1e-3
        kept: int = 1
        changed: int = 1
        table: str = ""

    table = training_arguments_table(Arguments(changed=2, table="a|b\nc"))
    assert table == [("learning_rate", "0.001"), ("changed", "2"), ("table", "a\\|b c")]
    assert training_arguments_table(None) == []


def test_versions():
    import transformers

    versions = dict(framework_versions())
    assert versions["transformers"] == transformers.__version__
    assert {"trl", "torch", "datasets"} <= set(versions)
    assert f"- transformers: {transformers.__version__}" in generate_model_card(**REQUIRED).text


def test_reward_template():
    text = generate_model_card(**REQUIRED, template_file="rm_model_card.md").text
    assert "A reward model made from [org/base]" in text
    assert "text-classification" in text


def test_own_template(tmp_path):
    template = tmp_path / "mine.md"
    template.write_text('---\n{{ card_data }}\n---\nMine: {{ trainer_name }}\n{% include "training_section.md" %}')
    text = generate_model_card(**REQUIRED, template_file=str(template)).text
    assert "Mine: SFT" in text
    assert "## Training" in text
    template.write_text("{{ no_such_value }}")
    with pytest.raises(Exception, match="no_such_value"):
        generate_model_card(**REQUIRED, template_file=str(template))


def test_completions_card():
    card = generate_completions_card("me/completions", hub_model_id="me/model", trainer_name="GRPO")
    assert "completions" in card.data.tags
    assert "[me/model](https://huggingface.co/me/model)" in card.text
    assert "(GRPO)" in card.text
