"""Telling the launcher's arguments from the script's."""

import pytest

from trl.scripts.launch_options import is_launch_option, launch_args_from_config, split_launch_args
from trl.scripts.sft import make_parser


@pytest.fixture(scope="module")
def parser():
    return make_parser(prog="trl sft")


@pytest.mark.parametrize(
    ("args", "launch", "script"),
    [
        (["--seed", "2", "--num_processes", "2"], ["--num_processes", "2"], ["--seed", "2"]),
        (["--num-processes=2", "--seed=2"], ["--num-processes=2"], ["--seed=2"]),
        (["--multi_gpu", "--packing"], ["--multi_gpu"], ["--packing"]),
        (["--packing", "--accelerate_config", "zero2"], ["--accelerate_config", "zero2"], ["--packing"]),
        (["--accelerate-config=zero2"], ["--accelerate-config=zero2"], []),
        (["--accelerate_config"], ["--accelerate_config"], []),
        (["--lora_target_modules", "a", "b", "--cpu"], ["--cpu"], ["--lora_target_modules", "a", "b"]),
        # known to both: the script's
        (["--gradient_accumulation_steps", "4"], [], ["--gradient_accumulation_steps", "4"]),
        (["--debug", "underflow_overflow"], [], ["--debug", "underflow_overflow"]),
        # known to neither: left for the script's parser to refuse
        (["--nope", "1"], [], ["--nope", "1"]),
        (["--help"], [], ["--help"]),
    ],
)
def test_split(parser, args, launch, script):
    assert split_launch_args(args, parser) == (launch, script)


def test_config_keys_of_the_launcher():
    remaining = [
        "--num_processes",
        "2",
        "--multi_gpu",
        "True",
        "--tpu",
        "False",
        "--main_process_ip",
        "None",
        "--x",
        "1",
    ]
    assert launch_args_from_config(remaining) == (["--num_processes", "2", "--multi_gpu"], ["--x"])


def test_switch_in_a_config_is_yes_or_no():
    with pytest.raises(ValueError, match="`multi_gpu` is a switch.*'perhaps'"):
        launch_args_from_config(["--multi_gpu", "perhaps"])


def test_names():
    assert is_launch_option("--num-processes")
    assert is_launch_option("accelerate_config")
    assert not is_launch_option("--help")
    assert not is_launch_option("learning_rate")
