"""
Direct preference optimization as a script of your own: what `trl dpo` runs.

Full fine-tuning. The log-probs of the reference are computed once, before training, so that it takes no memory then:

    python examples/scripts/dpo.py \
        --model_name_or_path Qwen/Qwen3-0.6B \
        --dataset_name trl-lib/ultrafeedback_binarized \
        --learning_rate 1e-6 \
        --precompute_ref_log_probs \
        --output_dir Qwen3-0.6B-DPO

A LoRA adapter, on several GPUs; the reference is the model without the adapter:

    accelerate launch --num_processes 4 examples/scripts/dpo.py \
        --model_name_or_path Qwen/Qwen3-0.6B \
        --dataset_name trl-lib/ultrafeedback_binarized \
        --learning_rate 1e-5 \
        --use_peft --lora_r 32 \
        --output_dir Qwen3-0.6B-DPO

Several losses at once, each with its weight (here those of MPO):

    python examples/scripts/dpo.py ... --loss_type sigmoid bco_pair sft --loss_weights 0.8 0.2 1.0

The same from a file, `--config run.yaml`, with flags that overrule it. To change more than flags can say, copy
`trl/scripts/dpo.py` and what its `main` calls in `trl/scripts/training.py`: the whole script is there.
"""

from trl.scripts.dpo import main, make_parser
from trl.scripts.utils import read_script_arguments

if __name__ == "__main__":
    main(*read_script_arguments(make_parser()))
