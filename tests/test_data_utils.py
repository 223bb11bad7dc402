"""The path and the signatures that users know."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import trl
from trl import data_utils
from trl.data import formats, mixture, packing, samplers, templating, vision
from trl.extras.dataset_formatting import FORMAT_MAPPING

SIGNATURES = {
    "apply_chat_template": ["example", "processing_class", "tools=None", "**template_kwargs"],
    "common_prefix_length": ["ids", "other_ids"],
    "extract_prompt": ["example"],
    "get_dataset_column_names": ["dataset"],
    "is_conversational": ["example"],
    "is_conversational_from_value": ["example"],
    "maybe_apply_chat_template": ["example", "processing_class", "tools=None", "**template_kwargs"],
    "maybe_convert_to_chatml": ["example"],
    "maybe_extract_prompt": ["example"],
    "maybe_unpair_preference_dataset": ["dataset", "num_proc=None", "desc=None"],
    "pack_dataset": ["dataset", "seq_length", "strategy='bfd'", "map_kwargs=None"],
    "prepare_multimodal_messages": ["messages", "images=None"],
    "prepare_multimodal_messages_vllm": ["messages"],
    "unpair_preference_dataset": ["dataset", "**map_kwargs"],
}
NOT_AT_THE_TOP = {"common_prefix_length", "get_dataset_column_names"}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    function = getattr(data_utils, name)
    found = []
    for parameter in inspect.signature(function).parameters.values():
        stars = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        found.append(f"{stars}{parameter.name}{default}")
    assert found == SIGNATURES[name]
    assert inspect.getdoc(function)
    if name not in NOT_AT_THE_TOP:
        assert getattr(trl, name) is function


def test_names_used_across_modules():
    for name in ("DatasetType", "_get_dataset_format", "_tokenize"):
        assert hasattr(data_utils, name)
    assert set(data_utils.__all__) <= set(dir(data_utils))


def test_parameters_of_samplers():
    names = ["data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed"]
    assert list(inspect.signature(samplers.RepeatSampler).parameters) == names
    names = ["dataset", "mini_repeat_count", "batch_size", "repeat_count"]
    assert list(inspect.signature(samplers.repeat_iterable_dataset).parameters) == names


def test_format_mapping_recognises_datasets():
    from datasets import Dataset

    messages = Dataset.from_list([{"messages": [{"role": "user", "content": "a"}]}])
    assert messages.features["messages"] == FORMAT_MAPPING["chatml"]
    assert Dataset.from_list([{"prompt": "a", "completion": "b"}]).features == FORMAT_MAPPING["instruction"]


@pytest.mark.parametrize("module", [formats, mixture, packing, samplers, templating, vision])
def test_public_names_are_documented(module):
    own = [value for name, value in vars(module).items() if not name.startswith("_") and callable(value)]
    own = [value for value in own if getattr(value, "__module__", None) == module.__name__]
    assert own
    assert all(inspect.getdoc(value) for value in own)


def test_data_functions_do_without_torch():
    """Preparing data, e.g. in a small script, does not pay for importing torch."""
    script = "import sys, trl.data_utils; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
