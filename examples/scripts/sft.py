"""
Supervised fine-tuning as a script of your own: what `trl sft` runs.

Full fine-tuning:

    python examples/scripts/sft.py \
        --model_name_or_path Qwen/Qwen3-0.6B \
        --dataset_name trl-lib/Capybara \
        --learning_rate 2e-5 \
        --packing \
        --output_dir Qwen3-0.6B-SFT

A LoRA adapter, on several GPUs:

    accelerate launch --num_processes 4 examples/scripts/sft.py \
        --model_name_or_path Qwen/Qwen3-0.6B \
        --dataset_name trl-lib/Capybara \
        --learning_rate 2e-4 \
        --use_peft --lora_r 32 \
        --output_dir Qwen3-0.6B-SFT

The same from a file, `--config run.yaml`, with flags that overrule it. To change more than flags can say, copy
`trl/scripts/sft.py` and what its `main` calls in `trl/scripts/training.py`: the whole script is there.
"""

from trl.scripts.sft import main, make_parser
from trl.scripts.utils import read_script_arguments

if __name__ == "__main__":
    main(*read_script_arguments(make_parser()))
