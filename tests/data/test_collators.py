"""Rows become batches: padded, padding-free, packed, and with images."""

import json

import pytest
import torch

from tests.conftest import build_model, load_reference
from tests.data.vision_helpers import IMAGE_TOKENS, build_gemma_processor, build_image, build_processor
from trl.data.collators import DataCollatorForLanguageModeling, DataCollatorForVisionLanguageModeling

CASES = {name: case for name, case in load_reference("data").items() if name.startswith("collate_lm_")}
# The recorded figures make every padding token of a padding-free row a document of its own; ours is one document.
ONE_DOCUMENT_OF_PADDING = {
    name for name, case in CASES.items() if {"padding_free", "pad_to_multiple_of"} <= case["config"].keys()
}


def as_lists(batch: dict) -> dict:
    return {key: value.tolist() if torch.is_tensor(value) else value for key, value in batch.items()}


# ---- Text ----


@pytest.mark.parametrize("name", sorted(CASES.keys() - ONE_DOCUMENT_OF_PADDING))
def test_reference_batches(name):
    case = CASES[name]
    batch = DataCollatorForLanguageModeling(**case["config"])(case["inputs"]["examples"])
    assert as_lists(batch) == case["outputs"]


@pytest.mark.parametrize("name", sorted(ONE_DOCUMENT_OF_PADDING))
def test_padding_is_one_document(name):
    """Up to the padding all is as recorded; the padding itself is one untrained document at the end."""
    case = CASES[name]
    expected = case["outputs"]
    batch = as_lists(DataCollatorForLanguageModeling(**case["config"])(case["inputs"]["examples"]))
    total = sum(len(example["input_ids"]) for example in case["inputs"]["examples"])
    padding = len(expected["input_ids"][0]) - total
    assert padding > 1
    for key in ("input_ids", "labels"):
        assert batch[key] == expected[key]
    assert batch["position_ids"][0][:total] == expected["position_ids"][0][:total]
    assert batch["position_ids"][0][total:] == list(range(padding))
    boundaries = [edge for edge in expected["cu_seq_lens_q"] if edge <= total]
    assert batch["cu_seq_lens_q"] == batch["cu_seq_lens_k"] == [*boundaries, total + padding]
    assert batch["seq_idx"][0][total:] == [len(boundaries) - 1] * padding
    assert batch["max_length_q"] == batch["max_length_k"] == max(expected["max_length_q"], padding)


def test_types_of_a_padding_free_batch():
    """Attention kernels take 32-bit offsets and plain integers; the model takes 64-bit ids."""
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([{"input_ids": [1, 2]}])
    assert {key: value.dtype for key, value in batch.items() if torch.is_tensor(value)} == {
        "input_ids": torch.int64,
        "labels": torch.int64,
        "position_ids": torch.int64,
        "cu_seq_lens_q": torch.int32,
        "cu_seq_lens_k": torch.int32,
        "seq_idx": torch.int32,
    }
    assert type(batch["max_length_q"]) is int


def test_stop_token_equal_to_padding_is_trained():
    """The mask follows positions: a last token with the padding's id is no padding."""
    rows = [{"input_ids": [5, 6, 2]}, {"input_ids": [7, 2]}]
    batch = as_lists(DataCollatorForLanguageModeling(pad_token_id=2)(rows))
    assert batch["labels"] == [[5, 6, 2], [7, 2, -100]]
    assert batch["attention_mask"] == [[1, 1, 1], [1, 1, 0]]


def test_rows_are_left_alone():
    """Tensors handed in keep their values: the first label of a document is set in the batch only."""
    rows = [{"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([1, 2, 3])}]
    DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(rows)
    assert rows[0]["labels"].tolist() == [1, 2, 3]


def test_padding_does_not_change_the_loss():
    """A padded batch trains what its rows train alone, and a padding-free one the same number of tokens."""
    model = build_model().eval()
    rows = [{"input_ids": [1, 2, 3, 4]}, {"input_ids": [5, 6]}, {"input_ids": [7, 8, 9]}]
    padded = DataCollatorForLanguageModeling(pad_token_id=0, pad_to_multiple_of=8)(rows)
    expected = model(**padded).loss
    one_by_one = [model(**DataCollatorForLanguageModeling(pad_token_id=0)([row])).loss for row in rows]
    tokens = [len(row["input_ids"]) - 1 for row in rows]
    mean = sum(loss * count for loss, count in zip(one_by_one, tokens, strict=True)) / sum(tokens)
    torch.testing.assert_close(expected, mean)
    free = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(rows)
    assert (free["labels"] != -100).sum() == (padded["labels"][:, 1:] != -100).sum()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [1, 2, 3], "labels": [1, 2]}, "Row 1 of the batch has 3 `input_ids` but 2 `labels`"),
        ({"input_ids": [1, 2, 3], "labels": [1, 2, 3], "seq_lengths": [2]}, r"`seq_lengths` \[2\] sum to 2"),
    ],
)
def test_lengths_that_differ(row, message):
    whole = {"input_ids": [1], "labels": [1], "seq_lengths": [1]}
    with pytest.raises(ValueError, match=message):
        DataCollatorForLanguageModeling(pad_token_id=0)([{key: whole[key] for key in row}, row])


# ---- Images ----


@pytest.fixture
def processor(tokenizer):
    return build_processor(tokenizer)


@pytest.fixture
def image():
    return build_image()


def conversation(answer="blue"):
    return [{"role": "user", "content": "what is this?"}, {"role": "assistant", "content": answer}]


def text_of(processor, ids):
    return processor.tokenizer.decode([token for token in ids if token >= 0])


def trained_text(processor, batch, row):
    return text_of(processor, batch["labels"][row].tolist())


def test_image_conversations(processor, image):
    """The image stands before the question, padding is on the right and untrained, pixels come along."""
    answers = ("blue", "the sky is very deep")
    rows = [{"messages": conversation(answers[0]), "images": [image]}]
    rows += [{"messages": conversation(answers[1]), "image": image}]
    batch = DataCollatorForVisionLanguageModeling(processor)(rows)
    assert batch["pixel_values"].shape == (2, 3, 28, 28)
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert (batch["input_ids"] == image_token).sum(dim=1).tolist() == [IMAGE_TOKENS, IMAGE_TOKENS]
    for row, answer in enumerate(answers):
        kept = batch["attention_mask"][row].bool()
        text = text_of(processor, batch["input_ids"][row][kept].tolist())
        assert text == f"user:{'<image>' * IMAGE_TOKENS}what is this?<|im_end|>assistant:{answer}<|im_end|>"
        assert batch["labels"][row][kept].tolist() == batch["input_ids"][row][kept].tolist()
        assert set(batch["labels"][row][~kept].tolist()) <= {-100}
    assert (~batch["attention_mask"].bool()).any()
    assert batch["attention_mask"][:, 0].all()


def test_image_assistant_only(processor, image):
    rows = [{"messages": conversation(), "images": [image]}, {"messages": conversation("the sky"), "images": [image]}]
    batch = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)(rows)
    assert [trained_text(processor, batch, row) for row in (0, 1)] == ["blue<|im_end|>", "the sky<|im_end|>"]
    assert "assistant_masks" not in batch


@pytest.mark.parametrize("completion_only", [False, True])
@pytest.mark.parametrize("conversational", [False, True])
def test_image_prompt_completion(conversational, completion_only, processor, image):
    """Prompt and completion follow each other without padding between them, of different lengths in a batch."""
    if conversational:
        rows = [
            {"prompt": conversation(answer)[:1], "completion": conversation(answer)[1:], "images": [image]}
            for answer in ("blue", "the sky is blue")
        ]
        rows[1]["prompt"] = [{"role": "user", "content": "hello world, what is this?"}]
        prompts = [f"user:{'<image>' * IMAGE_TOKENS}{row['prompt'][0]['content']}<|im_end|>assistant:" for row in rows]
        completions = ["blue<|im_end|>", "the sky is blue<|im_end|>"]
    else:
        rows = [
            {"prompt": "<image>what?", "completion": " blue", "images": [image]},
            {"prompt": "<image>hello world, what?", "completion": " the sky is blue", "images": [image]},
        ]
        prompts = [row["prompt"].replace("<image>", "<image>" * IMAGE_TOKENS) for row in rows]
        completions = [row["completion"] for row in rows]
    batch = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=completion_only)(rows)
    for row in (0, 1):
        kept = batch["attention_mask"][row].bool()
        assert text_of(processor, batch["input_ids"][row][kept].tolist()) == prompts[row] + completions[row]
        expected = completions[row] if completion_only else prompts[row] + completions[row]
        assert trained_text(processor, batch, row) == expected
    assert batch["attention_mask"].sum(dim=1).max() == batch["input_ids"].shape[1]
    assert "completion_mask" not in batch
    assert batch["pixel_values"].shape[0] == 2


def test_image_text_and_multiple(processor, image):
    rows = [{"text": "<image>blue", "images": [image]}, {"text": "<image>the sky is blue", "images": [image]}]
    batch = DataCollatorForVisionLanguageModeling(processor, pad_to_multiple_of=16)(rows)
    assert batch["input_ids"].shape[1] % 16 == 0
    assert all(batch[key].shape == batch["input_ids"].shape for key in ("attention_mask", "labels"))
    assert trained_text(processor, batch, 0) == "<image>" * IMAGE_TOKENS + "blue"


def test_prompt_completion_with_multiple(processor, image):
    rows = [{"prompt": "<image>what?", "completion": " blue", "image": image}]
    batch = DataCollatorForVisionLanguageModeling(processor, pad_to_multiple_of=16, completion_only_loss=True)(rows)
    assert batch["input_ids"].shape[1] % 16 == 0
    assert trained_text(processor, batch, 0) == " blue"


def test_rows_without_images(processor):
    """A batch may hold no image at all, e.g. of a mixed dataset; then there are no pixels."""
    batch = DataCollatorForVisionLanguageModeling(processor)([{"messages": conversation(), "images": []}])
    assert "pixel_values" not in batch
    assert text_of(processor, batch["input_ids"][0].tolist()).startswith("user:what is this?")


def test_some_rows_without_images(processor, image):
    rows = [{"messages": conversation(), "images": [image]}, {"messages": conversation("no"), "images": []}]
    batch = DataCollatorForVisionLanguageModeling(processor)(rows)
    assert batch["pixel_values"].shape[0] == 1
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert (batch["input_ids"] == image_token).sum(dim=1).tolist() == [IMAGE_TOKENS, 0]


def test_image_truncation_cuts_the_end(processor, image):
    whole = DataCollatorForVisionLanguageModeling(processor)([{"messages": conversation(), "images": [image]}])
    length = whole["input_ids"].shape[1] - 2
    cut = DataCollatorForVisionLanguageModeling(processor, max_length=length)(
        [{"messages": conversation(), "images": [image]}]
    )
    for key in ("input_ids", "attention_mask", "labels"):
        assert cut[key].tolist() == whole[key][:, :length].tolist()


def test_truncation_into_an_image_is_refused(processor, image):
    rows = [{"messages": conversation(), "images": [image]}]
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    whole = DataCollatorForVisionLanguageModeling(processor)(rows)["input_ids"][0]
    needed = int((whole == image_token).nonzero().max()) + 1
    with pytest.raises(ValueError, match=rf"cuts image tokens of row\(s\) \[0\].*max_length of at least {needed}"):
        DataCollatorForVisionLanguageModeling(processor, max_length=needed - 1)(rows)
    DataCollatorForVisionLanguageModeling(processor, max_length=needed)(rows)


@pytest.mark.parametrize(
    ("options", "row", "error", "message"),
    [
        ({}, {"question": "x"}, KeyError, "needs `messages`, or `prompt` and `completion`, or `text`.*`question`"),
        (
            {"assistant_only_loss": True},
            {"text": "x"},
            ValueError,
            "assistant_only_loss=True needs rows of `messages`",
        ),
        (
            {"completion_only_loss": True},
            {"messages": conversation()},
            ValueError,
            "completion_only_loss=True needs rows of `prompt` and `completion`",
        ),
    ],
)
def test_options_that_do_not_fit(options, row, error, message, processor):
    with pytest.raises(error, match=message):
        DataCollatorForVisionLanguageModeling(processor, **options)([row])


def test_assistant_only_without_an_answer(processor):
    with pytest.raises(RuntimeError, match=r"no assistant token was found in row\(s\) \[0\]"):
        DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)([{"messages": conversation()[:1]}])


def test_rows_from_arrow(processor, image):
    """In a dataset every content block has the keys of all others, as None; an image is there only where it is one."""
    from datasets import Dataset

    content = [{"type": "image"}, {"type": "text", "text": "what is this?"}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "blue"}]},
    ]
    dataset = Dataset.from_list([{"messages": messages, "images": [image]}])
    assert json.dumps(dataset[0]["messages"]).count("null") > 0
    batch = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)([dataset[0]])
    assert trained_text(processor, batch, 0) == "blue<|im_end|>"
    assert batch["pixel_values"].shape[0] == 1


@pytest.mark.parametrize("conversational", [False, True])
def test_special_tokens_of_the_tokenizer(conversational, processor, image):
    """A plain prompt begins as the tokenizer begins a text; a chat template writes its special tokens itself."""
    from tokenizers.processors import TemplateProcessing

    start = processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", start)]
    )
    row = {"prompt": "<image>what?", "completion": " blue"}
    if conversational:
        row = {"prompt": conversation()[:1], "completion": conversation()[1:]}
    batch = DataCollatorForVisionLanguageModeling(processor)([{**row, "images": [image]}])
    ids = batch["input_ids"][0].tolist()
    assert ids.count(start) == (0 if conversational else 1)
    assert (ids[0] == start) is not conversational


@pytest.fixture
def gemma_processor(tokenizer):
    return build_gemma_processor(tokenizer)


def test_token_types_follow_the_tokens(gemma_processor, image):
    """Types stay aligned with the ids through joining, cutting and padding; a completion's type is 0."""
    rows = [
        {"prompt": conversation()[:1], "completion": conversation()[1:], "images": [image]},
        {"prompt": conversation()[:1], "completion": conversation("the sky is very blue")[1:], "images": [image]},
    ]
    soft = gemma_processor.tokenizer.convert_tokens_to_ids("<soft>")
    for options in ({}, {"completion_only_loss": True, "pad_to_multiple_of": 16}):
        batch = DataCollatorForVisionLanguageModeling(gemma_processor, **options)(rows)
        is_image = batch["input_ids"] == soft
        assert is_image.sum(dim=1).tolist() == [IMAGE_TOKENS, IMAGE_TOKENS]
        types = batch["token_type_ids"] if "token_type_ids" in batch else batch["mm_token_type_ids"]
        assert types.tolist() == is_image.long().tolist()
        assert batch["labels"].shape == types.shape


def test_truncation_into_an_image_of_other_tokens(gemma_processor, image):
    soft = gemma_processor.tokenizer.convert_tokens_to_ids("<soft>")
    rows = [{"messages": conversation(), "images": [image]}]
    whole = DataCollatorForVisionLanguageModeling(gemma_processor)(rows)["input_ids"][0]
    needed = int((whole == soft).nonzero().max()) + 1
    with pytest.raises(ValueError, match=f"max_length of at least {needed}"):
        DataCollatorForVisionLanguageModeling(gemma_processor, max_length=needed - 1)(rows)
