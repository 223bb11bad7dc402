"""
Training a reward model as a script of your own: what `trl reward` runs.

A full model, which gets a new head with one output:

    python examples/scripts/reward.py \
        --model_name_or_path Qwen/Qwen3-0.6B \
        --dataset_name trl-lib/ultrafeedback_binarized \
        --learning_rate 1e-5 \
        --eval_strategy steps --eval_steps 100 \
        --output_dir Qwen3-0.6B-Reward

A LoRA adapter together with the head, on several GPUs:

    accelerate launch --num_processes 4 examples/scripts/reward.py \
        --model_name_or_path Qwen/Qwen3-0.6B \
        --dataset_name trl-lib/ultrafeedback_binarized \
        --learning_rate 1e-4 \
        --use_peft --lora_r 32 \
        --output_dir Qwen3-0.6B-Reward

The same from a file, `--config run.yaml`, with flags that overrule it. To change more than flags can say, copy
`trl/scripts/reward.py`: its `main` is the whole method in a dozen lines.
"""

from trl.scripts.reward import main, make_parser
from trl.scripts.utils import read_script_arguments

if __name__ == "__main__":
    main(*read_script_arguments(make_parser()))
