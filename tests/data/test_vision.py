"""Images and the places they belong to."""

from __future__ import annotations

import copy

import pytest
from datasets import Dataset

from tests.conftest import load_reference
from trl.data.vision import prepare_multimodal_messages, prepare_multimodal_messages_vllm, strip_images_from_messages

CASES = load_reference("data")
IMAGE = {"type": "image"}


def text(value):
    return {"type": "text", "text": value}


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("multimodal_")])
def test_recorded_messages(name):
    case = CASES[name]
    messages = case["inputs"]["messages"]
    before = copy.deepcopy(messages)
    images = [f"IMG{i}" for i in range(case["config"]["num_images"])]
    assert prepare_multimodal_messages(messages, images) == case["outputs"]["messages"]
    assert messages == before


def test_images_fill_the_placeholders_in_order():
    """Placeholders anywhere in the conversation take the images in reading order, and text stays where it was."""
    messages = [
        {"role": "user", "content": [text("before"), IMAGE, text("between"), IMAGE]},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": [IMAGE]},
    ]
    prepared = prepare_multimodal_messages(messages, ["a", "b", "c"])
    assert prepared[0]["content"] == [
        text("before"), {**IMAGE, "image": "a"}, text("between"), {**IMAGE, "image": "b"},
    ]  # fmt: skip
    assert prepared[1]["content"] == [text("ok")]
    assert prepared[2]["content"] == [{**IMAGE, "image": "c"}]
    assert IMAGE == {"type": "image"}


def test_plain_first_message_does_not_take_images_that_have_their_place():
    messages = [{"role": "user", "content": "hi"}, {"role": "user", "content": [IMAGE, text("this")]}]
    prepared = prepare_multimodal_messages(messages, ["a"])
    assert prepared[0]["content"] == [text("hi")]
    assert prepared[1]["content"][0] == {"type": "image", "image": "a"}


def test_tool_images_are_the_tools_own():
    """They are neither filled nor counted."""
    tool = {"role": "tool", "content": [{"type": "image", "image": "screenshot"}, text("done")]}
    prepared = prepare_multimodal_messages([{"role": "user", "content": "look"}, tool], ["a"])
    assert prepared[0]["content"] == [{"type": "image", "image": "a"}, text("look")]
    assert prepared[1] == tool
    assert prepared[1]["content"][0] is not tool["content"][0]


def test_preparing_twice_is_preparing_once():
    messages = [{"role": "user", "content": "x"}]
    once = prepare_multimodal_messages(messages, ["a", "b"])
    assert prepare_multimodal_messages(once, ["a", "b"]) == once
    assert prepare_multimodal_messages(once[:0]) == []


@pytest.mark.parametrize(
    ("messages", "images", "found"),
    [
        ([{"role": "user", "content": [IMAGE, text("x")]}], ["a", "b"], "1 image placeholder and 2 images"),
        ([{"role": "user", "content": [IMAGE, IMAGE]}], ["a"], "2 image placeholders and 1 image:"),
        ([{"role": "user", "content": [IMAGE, text("x")]}], None, "1 image placeholder and 0 images"),
        ([{"role": "user", "content": [text("x")]}], ["a"], "0 image placeholders and 1 image:"),
        ([{"role": "system", "content": "x"}], ["a"], "0 image placeholders and 1 image:"),
    ],
)
def test_one_image_for_each_placeholder(messages, images, found):
    with pytest.raises(ValueError, match=found):
        prepare_multimodal_messages(messages, images)


def test_unknown_role():
    with pytest.raises(ValueError, match="Message 1 has the role 'narrator'"):
        prepare_multimodal_messages([{"role": "user", "content": "a"}, {"role": "narrator", "content": "b"}])


def test_other_keys_and_missing_content():
    """Tool calls and names stay with their message; no content is an empty text."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
    prepared = prepare_multimodal_messages([call])
    assert prepared == [{**call, "content": [text("")]}]


def test_keys_that_arrow_filled_are_dropped():
    """In a dataset, text blocks have an image key and placeholders a text key, both None."""
    messages = [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "x"}]}]
    row = Dataset.from_list([{"messages": messages}])[0]
    assert row["messages"][0]["content"][0] == {"type": "image", "text": None}
    assert prepare_multimodal_messages(row["messages"], ["a"])[0]["content"] == [
        {"type": "image", "image": "a"},
        text("x"),
    ]


def test_vllm_blocks():
    messages = prepare_multimodal_messages([{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}], ["a"])
    before = copy.deepcopy(messages)
    assert prepare_multimodal_messages_vllm(messages) == [
        {"role": "user", "content": [{"type": "image_pil", "image_pil": "a"}, text("x")]},
        {"role": "tool", "content": [text("y")]},
    ]
    assert messages == before
    assert prepare_multimodal_messages_vllm([{"role": "user", "content": "x"}]) == [{"role": "user", "content": "x"}]


def test_strip_images():
    """Images go, placeholders and text stay, text prompts are themselves."""
    messages = prepare_multimodal_messages([{"role": "user", "content": "x"}], ["a"])
    before = copy.deepcopy(messages)
    assert strip_images_from_messages(messages) == [{"role": "user", "content": [IMAGE, text("x")]}]
    assert messages == before
    assert strip_images_from_messages("plain") == "plain"
    assert strip_images_from_messages([{"role": "user", "content": "x"}]) == [{"role": "user", "content": "x"}]
