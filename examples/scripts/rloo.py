"""
REINFORCE leave-one-out as a script of your own: what `trl rloo` runs.

Full fine-tuning on the judgement of a reward model. The divergence from the model as it was is taken off the reward:

    python examples/scripts/rloo.py \
        --model_name_or_path Qwen/Qwen3-0.6B \
        --dataset_name trl-lib/ultrafeedback-prompt \
        --reward_model_name_or_path Skywork/Skywork-Reward-V2-Qwen3-0.6B \
        --num_generations 4 \
        --beta 0.05 \
        --reward_clip_range -10 10 \
        --output_dir Qwen3-0.6B-RLOO

A LoRA adapter, on several GPUs, with functions as rewards; the reference is the model without the adapter:

    accelerate launch --num_processes 4 examples/scripts/rloo.py \
        --model_name_or_path Qwen/Qwen3-0.6B \
        --dataset_name trl-lib/DeepMath-103K \
        --reward_funcs accuracy_reward my_rewards.short_and_right \
        --num_generations 8 --normalize_advantages \
        --learning_rate 1e-5 \
        --use_peft --lora_r 32 \
        --output_dir Qwen3-0.6B-RLOO

`my_rewards.short_and_right` is a function in the file my_rewards.py of the working directory; docs/rewards.md tells what
it is called with. The same from a file, `--config run.yaml`, with flags that overrule it. To change more than flags can
say, copy `trl/scripts/rloo.py` and what its `main` calls in `trl/scripts/training.py`.
"""

from trl.scripts.rloo import main, make_parser
from trl.scripts.utils import read_script_arguments

if __name__ == "__main__":
    main(*read_script_arguments(make_parser()))
