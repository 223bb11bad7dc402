"""
Kahneman-Tversky optimization as a script of your own: what `trl kto` runs.

It learns from single answers with a `label` (good or bad). A dataset of pairs is taken apart by itself.

    python examples/scripts/kto.py \
        --model_name_or_path Qwen/Qwen3-0.6B \
        --dataset_name trl-lib/kto-mix-14k \
        --per_device_train_batch_size 8 \
        --learning_rate 1e-6 \
        --output_dir Qwen3-0.6B-KTO

A LoRA adapter, where bad answers are three times as many as good ones:

    python examples/scripts/kto.py \
        --model_name_or_path Qwen/Qwen3-0.6B \
        --dataset_name feedback.jsonl \
        --per_device_train_batch_size 8 \
        --learning_rate 1e-5 \
        --desirable_weight 3.0 \
        --use_peft --lora_r 32 \
        --output_dir Qwen3-0.6B-KTO

The batch size per device is at least 2, and better more: the KL term is estimated on the answers of a batch, each
given to its neighbour's prompt. The same from a file, `--config run.yaml`, with flags that overrule it. To change more
than flags can say, copy `trl/scripts/kto.py` and what its `main` calls in `trl/scripts/training.py`.
"""

from trl.scripts.kto import main, make_parser
from trl.scripts.utils import read_script_arguments

if __name__ == "__main__":
    main(*read_script_arguments(make_parser()))
