"""Flags of a short run, for every training script."""

import json

import pytest


@pytest.fixture
def make_flags(tmp_path, tiny_model_path):
    """Flags for two steps of the tiny model on `rows`, in a folder as people have it: one file per split."""

    def make(rows: list[dict]) -> list[str]:
        folder = tmp_path / "data"
        folder.mkdir()
        for split, part in (("train", rows), ("test", rows[:4])):
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        return [
            *["--model_name_or_path", tiny_model_path, "--dataset_name", str(folder)],
            *["--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--per_device_train_batch_size", "2"],
            *["--max_length", "64", "--logging_steps", "1", "--save_strategy", "no", "--report_to", "none"],
        ]

    return make
