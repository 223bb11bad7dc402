"""Pairs and single answers become batches: of token ids, and with images."""

import copy
import pickle
import warnings

import pytest
import torch
from datasets import Dataset

from tests.conftest import load_reference
from tests.data.vision_helpers import IMAGE_TOKENS, build_gemma_processor, build_image, build_processor
from trl.data.preference_collators import (
    DataCollatorForPreference,
    DataCollatorForRewardPreference,
    DataCollatorForUnpairedPreference,
    DataCollatorForVisionPreference,
    DataCollatorForVisionUnpairedPreference,
)

CASES = load_reference("data")
COLLATORS = {
    "collate_pref_": DataCollatorForPreference,
    "collate_unpaired_": DataCollatorForUnpairedPreference,
    "collate_reward_": DataCollatorForRewardPreference,
}
RECORDED_WITH = {
    "DPOTrainer": DataCollatorForPreference,
    "KTOTrainer": DataCollatorForUnpairedPreference,
    "RewardTrainer": DataCollatorForRewardPreference,
}
TRAINED = {
    name: case
    for name, case in load_reference("prep").items()
    if case["trainer"] in RECORDED_WITH and "collated_first_two" in case["outputs"]
}
PAIR = {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]}
OTHER_PAIR = {"prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10, 11, 12]}
ANSWER = {"prompt_ids": [1, 2], "completion_ids": [3], "KL_completion_ids": [4, 5], "label": True}


def as_lists(batch: dict) -> dict:
    return {key: value.tolist() if torch.is_tensor(value) else value for key, value in batch.items()}


# ---- Token ids ----


@pytest.mark.parametrize(
    ("name", "collator_class"),
    [(name, collator) for prefix, collator in COLLATORS.items() for name in CASES if name.startswith(prefix)],
)
def test_reference_batches(name, collator_class):
    case = CASES[name]
    batch = collator_class(**case["config"])(case["inputs"]["examples"])
    assert as_lists(batch) == case["outputs"]


def test_rows_of_the_dataset_are_left_alone():
    pair, answer = copy.deepcopy(PAIR), copy.deepcopy(ANSWER)
    DataCollatorForPreference(pad_token_id=0, max_length=3)([pair])
    DataCollatorForUnpairedPreference(pad_token_id=0, max_length=3)([answer])
    assert pair == PAIR and answer == ANSWER


def test_stop_token_equal_to_padding_counts():
    """pad == eos: the stop token an answer ends with stays in both masks, the padding after it is in neither."""
    rows = [{"prompt_ids": [1], "chosen_ids": [5, 0], "rejected_ids": [0]}]
    batch = DataCollatorForPreference(pad_token_id=0)(rows)
    assert batch["input_ids"].tolist() == [[1, 5, 0], [1, 0, 0]]
    assert batch["completion_mask"].tolist() == [[0, 1, 1], [0, 1, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_types():
    """Ids and masks are int64 whether rows hold lists or tensors; labels are bool, log-probs and margins float32."""
    tensors = {key: torch.tensor(value, dtype=torch.int32) for key, value in PAIR.items()}
    logps = {"ref_chosen_logps": -1, "ref_rejected_logps": -2.5}
    batch = DataCollatorForPreference(pad_token_id=0)([{**tensors, **logps}, {**PAIR, **logps}])
    assert batch["input_ids"].tolist()[::2] == [[1, 2, 3, 4, 5], [1, 2, 3, 6, 0]]
    assert {batch[key].dtype for key in ("input_ids", "attention_mask", "completion_mask")} == {torch.int64}
    assert batch["ref_chosen_logps"].tolist() == [-1.0, -1.0]
    assert batch["ref_rejected_logps"].tolist() == [-2.5, -2.5]
    assert batch["ref_chosen_logps"].dtype == batch["ref_rejected_logps"].dtype == torch.float32

    row = {**ANSWER, "ref_logps": -3.0, "ref_KL_logps": -4.0}
    batch = DataCollatorForUnpairedPreference(pad_token_id=0)([row, {**row, "label": False}])
    assert batch["label"].dtype == torch.bool
    assert batch["ref_logps"].tolist() == [-3.0, -3.0] and batch["ref_KL_logps"].tolist() == [-4.0, -4.0]
    assert batch["ref_logps"].dtype == torch.float32

    rows = [{"chosen_ids": [1], "rejected_ids": [2], "margin": margin} for margin in (1, 0.25)]
    assert DataCollatorForRewardPreference(pad_token_id=0)(rows)["margin"].dtype == torch.float32


def test_optional_columns_are_absent():
    answer = {key: value for key, value in ANSWER.items() if key != "KL_completion_ids"}
    batch = DataCollatorForUnpairedPreference(pad_token_id=0)([answer])
    assert set(batch) == {"input_ids", "attention_mask", "completion_mask", "label"}
    batch = DataCollatorForRewardPreference(pad_token_id=0)([{"chosen_ids": [1], "rejected_ids": [2]}])
    assert set(batch) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(
    ("collator", "row", "name"),
    [
        (DataCollatorForPreference, {**PAIR, "ref_chosen_logps": -1.0}, "ref_chosen_logps"),
        (DataCollatorForUnpairedPreference, {**ANSWER, "ref_logps": -1.0}, "ref_logps"),
        (DataCollatorForRewardPreference, {"chosen_ids": [1], "rejected_ids": [2], "margin": 1.0}, "margin"),
    ],
)
def test_number_missing_in_a_row(collator, row, name):
    with pytest.raises(ValueError, match=rf"`{name}` is missing in row\(s\) \[1\] of a batch of 2"):
        collator(pad_token_id=0)([row, {**row, name: None}])


def test_each_sequence_of_a_pair_is_cut_for_itself():
    """A long rejected answer takes nothing from the chosen one."""
    batch = DataCollatorForPreference(pad_token_id=0, max_length=5, truncation_mode="keep_end")(
        [{"prompt_ids": [1, 2, 3], "chosen_ids": [4], "rejected_ids": [5, 6, 7, 8, 9, 10]}]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 0], [6, 7, 8, 9, 10]]
    assert batch["completion_mask"].tolist() == [[0, 0, 0, 1, 0], [1, 1, 1, 1, 1]]


def test_unknown_truncation_mode():
    with pytest.raises(ValueError, match="truncation_mode='keep_middle' is unknown; use one of 'keep_start'"):
        DataCollatorForPreference(pad_token_id=0, truncation_mode="keep_middle")


def test_names_and_pickling():
    """Loader workers may be spawned, so collators travel pickled, the two of one name included."""
    collators = (DataCollatorForPreference(pad_token_id=3, max_length=7), DataCollatorForRewardPreference(3, 8))
    for collator in collators:
        copied = pickle.loads(pickle.dumps(collator))
        assert type(copied) is type(collator) and copied == collator
        assert type(collator).__name__ == "DataCollatorForPreference"
    assert DataCollatorForPreference is not DataCollatorForRewardPreference


@pytest.mark.parametrize("name", TRAINED)
def test_batches_of_recorded_runs(name):
    """The rows that a trainer prepared become the batch that it trained on."""
    case = TRAINED[name]
    options = {key: case["config"][key] for key in ("max_length", "truncation_mode") if key in case["config"]}
    if case["trainer"] == "RewardTrainer":
        options.pop("max_length", None)  # such rows are dropped, not cut
    collator = RECORDED_WITH[case["trainer"]](pad_token_id=0, **options)
    assert as_lists(collator(case["outputs"]["rows"][:2])) == case["outputs"]["collated_first_two"]


# ---- Images ----

USER = [{"role": "user", "content": "what is this?"}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


@pytest.fixture
def processor(tokenizer):
    return build_processor(tokenizer)


@pytest.fixture
def pairs():
    """Two pairs with one image each; answers of different lengths."""
    return [
        {"prompt": USER, "chosen": assistant("blue"), "rejected": assistant("the sky"), "images": [build_image()]},
        {
            "prompt": [{"role": "user", "content": "look"}],
            "chosen": assistant("the sea is deep and blue"),
            "rejected": assistant("red"),
            "image": build_image((0, 0, 250)),
        },
    ]


@pytest.fixture
def answers(pairs):
    return [
        {"prompt": pair["prompt"], "completion": pair["chosen"], "label": good, "images": [build_image((shade, 0, 0))]}
        for pair, good, shade in zip(pairs, (True, False), (10, 240), strict=True)
    ]


def texts(processor, batch, mask, prefix=""):
    """The text under a mask, row by row."""
    rows = zip(batch[f"{prefix}input_ids"], batch[f"{prefix}{mask}"].bool(), strict=True)
    return [processor.tokenizer.decode(ids[kept]) for ids, kept in rows]


def prompt_text(question):
    return f"user:{'<image>' * IMAGE_TOKENS}{question}<|im_end|>assistant:"


def test_image_pairs(processor, pairs):
    """Chosen rows, then rejected ones; the whole text once, the completion mask on the answers alone."""
    batch = DataCollatorForVisionPreference(processor)(pairs)
    prompts = [prompt_text("what is this?"), prompt_text("look")] * 2
    replies = [f"{text}<|im_end|>" for text in ("blue", "the sea is deep and blue", "the sky", "red")]
    assert texts(processor, batch, "attention_mask") == [p + r for p, r in zip(prompts, replies, strict=True)]
    assert texts(processor, batch, "completion_mask") == replies
    # Padded on the right: each mask is a run of ones, then zeros.
    assert (batch["attention_mask"].diff(dim=1) <= 0).all() and (batch["attention_mask"][:, 0] == 1).all()
    assert {batch[key].dtype for key in ("input_ids", "attention_mask", "completion_mask")} == {torch.int64}


def test_images_serve_both_answers(processor, pairs):
    """Each image stands twice, in the order of the rows, as the processor makes it of the repeated rows."""
    batch = DataCollatorForVisionPreference(processor)(pairs)
    images = [pairs[0]["images"], [pairs[1]["image"]]]
    repeated = processor(images=images * 2, text=["<image>"] * 4, return_tensors="pt")
    assert torch.equal(batch["pixel_values"], repeated["pixel_values"])
    assert not torch.equal(batch["pixel_values"][0], batch["pixel_values"][1])


def test_implicit_prompt(processor, pairs):
    explicit = DataCollatorForVisionPreference(processor)(pairs[:1])
    pair = {name: pairs[0]["prompt"] + pairs[0][name] for name in ("chosen", "rejected")}
    implicit = DataCollatorForVisionPreference(processor)([{**pair, "images": pairs[0]["images"]}])
    assert as_lists(implicit) == as_lists(explicit)


def test_plain_text_with_images(processor):
    """The tokenizer's special tokens open the prompt, and nothing else."""
    from tokenizers.processors import TemplateProcessing

    start = processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", start)]
    )
    row = {"prompt": "<image>what?", "chosen": " blue", "rejected": " a red one", "images": [build_image()]}
    batch = DataCollatorForVisionPreference(processor)([row])
    assert texts(processor, batch, "completion_mask") == [" blue", " a red one"]
    assert (batch["input_ids"] == start).sum(dim=1).tolist() == [1, 1]
    assert batch["input_ids"][:, 0].tolist() == [start, start]


def test_stop_token_equal_to_padding_counts_with_images(processor, pairs):
    processor.tokenizer.pad_token = processor.tokenizer.eos_token
    batch = DataCollatorForVisionPreference(processor)(pairs)
    assert [text.endswith("<|im_end|>") for text in texts(processor, batch, "completion_mask")] == [True] * 4


def test_template_options_of_a_row(processor, pairs):
    """`tools` and `chat_template_kwargs` reach the template."""
    processor.chat_template += "{% if tools %}{{ tools[0].name }}{% endif %}{{ flag }}"
    options = {"tools": [{"name": "zoom"}], "chat_template_kwargs": {"flag": "quick"}}
    plain = DataCollatorForVisionPreference(processor)(pairs[:1])
    batch = DataCollatorForVisionPreference(processor)([{**pairs[0], **options}])
    assert texts(processor, plain, "attention_mask")[0].endswith("blue<|im_end|>")
    assert texts(processor, batch, "attention_mask")[0].endswith("blue<|im_end|>zoomquick")


@pytest.mark.parametrize("collator_class", [DataCollatorForVisionPreference, DataCollatorForVisionUnpairedPreference])
def test_cut_keeps_the_start(collator_class, processor, pairs, answers):
    rows = pairs if collator_class is DataCollatorForVisionPreference else answers
    whole = collator_class(processor)(rows)
    length = whole["input_ids"].shape[1] - 2
    cut = collator_class(processor, max_length=length)(rows)
    for key in ("input_ids", "attention_mask", "completion_mask"):
        assert cut[key].tolist() == whole[key][:, :length].tolist()
        if f"KL_{key}" in whole:
            assert cut[f"KL_{key}"].tolist() == whole[f"KL_{key}"][:, :length].tolist()
    assert torch.equal(cut["pixel_values"], whole["pixel_values"])


@pytest.mark.filterwarnings("ignore:.*leaves nothing of the answer")
@pytest.mark.parametrize("collator_class", [DataCollatorForVisionPreference, DataCollatorForVisionUnpairedPreference])
def test_cut_into_an_image_is_refused(collator_class, processor, pairs, answers):
    rows = pairs if collator_class is DataCollatorForVisionPreference else answers
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    needed = int((collator_class(processor)(rows)["input_ids"][0] == image_token).nonzero().max()) + 1
    with pytest.raises(ValueError, match=rf"max_length={needed - 1} cuts image tokens.*at least {needed}; raise"):
        collator_class(processor, max_length=needed - 1)(rows)
    collator_class(processor, max_length=needed + 4)(rows)


def test_answers_that_are_cut_away_are_told(processor, pairs):
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    ids = DataCollatorForVisionPreference(processor)(pairs)["input_ids"][0]
    needed = int((ids == image_token).nonzero().max()) + 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DataCollatorForVisionPreference(processor, max_length=len(ids))(pairs)
    with pytest.warns(UserWarning, match=f"max_length={needed} leaves nothing of the answer in some rows"):
        DataCollatorForVisionPreference(processor, max_length=needed)(pairs)


@pytest.mark.parametrize("collator_class", [DataCollatorForVisionPreference, DataCollatorForVisionUnpairedPreference])
def test_multiple_with_images(collator_class, processor):
    with pytest.raises(NotImplementedError, match=f"{collator_class.__name__} does not support pad_to_multiple_of=8"):
        collator_class(processor, pad_to_multiple_of=8)


@pytest.mark.parametrize(
    ("collator_class", "row", "message"),
    [
        (
            DataCollatorForVisionPreference,
            {"prompt": "x", "completion": "y"},
            "needs `chosen`, `rejected`. Found: `pro",
        ),
        (DataCollatorForVisionUnpairedPreference, {"prompt": "x"}, "needs `prompt`, `completion`, `label`. Found: `p"),
    ],
)
def test_columns_that_are_missing_with_images(collator_class, row, message, processor):
    with pytest.raises(KeyError, match=message):
        collator_class(processor)([row])


def test_image_answers(processor, answers):
    """Each prompt with its answer, and under `KL_` with the answer of the row before it."""
    answers.append({**answers[0], "completion": assistant("user"), "label": True})
    batch = DataCollatorForVisionUnpairedPreference(processor)(answers)
    replies = [f"{text}<|im_end|>" for text in ("blue", "the sea is deep and blue", "user")]
    prompts = [prompt_text(question) for question in ("what is this?", "look", "what is this?")]
    rotated = [replies[2], replies[0], replies[1]]
    assert texts(processor, batch, "attention_mask") == [p + r for p, r in zip(prompts, replies, strict=True)]
    assert texts(processor, batch, "attention_mask", "KL_") == [p + r for p, r in zip(prompts, rotated, strict=True)]
    assert texts(processor, batch, "completion_mask") == replies
    assert texts(processor, batch, "completion_mask", "KL_") == rotated
    assert batch["label"].tolist() == [True, False, True] and batch["label"].dtype == torch.bool
    assert batch["pixel_values"].shape[0] == 3
    assert batch["KL_pixel_values"] is batch["pixel_values"]


def test_image_answers_without_kl(processor, answers):
    batch = DataCollatorForVisionUnpairedPreference(processor, calculate_kl=False)(answers)
    assert set(batch) == {"input_ids", "attention_mask", "completion_mask", "pixel_values", "label"}


def test_token_types_follow_the_tokens(tokenizer, pairs, answers):
    """Types stay aligned with the ids in every row, those of the KL rows too; an answer's type is 0."""
    processor = build_gemma_processor(tokenizer)
    soft = processor.tokenizer.convert_tokens_to_ids("<soft>")
    collators = (DataCollatorForVisionPreference(processor), DataCollatorForVisionUnpairedPreference(processor))
    for collator, rows, prefixes in zip(collators, (pairs, answers), ([""], ["", "KL_"]), strict=True):
        batch = collator(rows)
        name = "token_type_ids" if "token_type_ids" in batch else "mm_token_type_ids"
        for prefix in prefixes:
            is_image = batch[f"{prefix}input_ids"] == soft
            assert is_image.sum(dim=1).tolist() == [IMAGE_TOKENS] * len(is_image)
            assert batch[f"{prefix}{name}"].tolist() == is_image.long().tolist()


def test_empty_answers_with_images(processor, pairs):
    """A batch of nothing but empty texts still has ids of whole numbers."""
    rows = [{"prompt": "<image>what?", "chosen": "", "rejected": "", "images": [build_image()]}]
    batch = DataCollatorForVisionPreference(processor)(rows)
    assert batch["input_ids"].dtype == torch.int64
    assert batch["completion_mask"].sum() == 0


def test_rows_without_images(processor, pairs):
    rows = [{key: value for key, value in pair.items() if not key.startswith("image")} for pair in pairs]
    batch = DataCollatorForVisionPreference(processor)(rows)
    assert "pixel_values" not in batch
    assert texts(processor, batch, "completion_mask")[0] == "blue<|im_end|>"


def test_rows_from_arrow(processor, pairs):
    """In a dataset every content block has the keys of all others, as None; an image is there only where it is one."""
    content = [{"type": "image"}, {"type": "text", "text": "what is this?"}]
    row = {
        "prompt": [{"role": "user", "content": content}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "blue"}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "the sky"}]}],
        "images": [build_image()],
    }
    batch = DataCollatorForVisionPreference(processor)([Dataset.from_list([row])[0]])
    assert as_lists(batch) == as_lists(DataCollatorForVisionPreference(processor)(pairs[:1]))
