"""
Group relative policy optimization as a script of your own: what `trl grpo` runs.

Full fine-tuning on questions with a `solution`, which a built-in reward compares with the answer's mathematics:

    python examples/scripts/grpo.py \
        --model_name_or_path Qwen/Qwen3-0.6B \
        --dataset_name trl-lib/DeepMath-103K \
        --reward_funcs accuracy_reward \
        --max_completion_length 1024 \
        --gradient_accumulation_steps 8 \
        --output_dir Qwen3-0.6B-GRPO

A LoRA adapter, on several GPUs; rewards of three kinds, each with its weight, the model's first:

    accelerate launch --num_processes 4 examples/scripts/grpo.py \
        --model_name_or_path Qwen/Qwen3-0.6B \
        --dataset_name prompts.jsonl \
        --reward_model_name_or_path Skywork/Skywork-Reward-V2-Qwen3-0.6B \
        --reward_funcs think_format_reward my_rewards.short_and_right \
        --reward_weights 0.2 0.1 1.0 \
        --learning_rate 1e-5 \
        --use_peft --lora_r 32 \
        --output_dir Qwen3-0.6B-GRPO

`my_rewards.short_and_right` is a function in the file my_rewards.py of the working directory; docs/rewards.md tells what
it is called with. See what a run samples, before and while it learns, with `--log_completions`.

The same from a file, `--config run.yaml`, with flags that overrule it. To change more than flags can say, copy
`trl/scripts/grpo.py` and what its `main` calls in `trl/scripts/training.py`: the whole script is there. Beside this one,
`grpo_math.py` prepares its data itself, and `grpo_tools.py` and `grpo_environment.py` train a model that calls tools.
"""

from trl.scripts.grpo import main, make_parser
from trl.scripts.utils import read_script_arguments

if __name__ == "__main__":
    main(*read_script_arguments(make_parser()))
