"""
GRPO that samples with a vLLM server of its own: reasoning on grade-school mathematics, as in `grpo_math.py`. The server
and the training share nothing but the connection, so each has its devices whole.

First the server, here on two GPUs of one machine; the trainer waits for it, for `--vllm_server_timeout` seconds:

    CUDA_VISIBLE_DEVICES=0,1 trl vllm-serve --model Qwen/Qwen3-0.6B --data_parallel_size 2 --dtype bfloat16 --max_model_len 2048

Then the training on the others:

    CUDA_VISIBLE_DEVICES=2,3 accelerate launch --num_processes 2 examples/scripts/grpo_vllm_server.py \
        --model_name_or_path Qwen/Qwen3-0.6B \
        --per_device_train_batch_size 8 --gradient_accumulation_steps 8 \
        --max_completion_length 1024 \
        --output_dir Qwen3-0.6B-gsm8k

Without a GPU, in two terminals, with a dataset of a few questions (columns `question` and `answer`):

    VLLM_CPU_KVCACHE_SPACE=1 trl vllm-serve --model HuggingFaceTB/SmolLM2-135M-Instruct --dtype float32 --enforce_eager
    python examples/scripts/grpo_vllm_server.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --dataset_name questions.jsonl --max_completion_length 64 --max_steps 3 --output_dir tried

A server on another machine wants a key: see docs/vllm.md, and `examples/slurm/grpo_vllm_server.slurm` for several nodes.
"""

import grpo_math

from trl import GRPOConfig, ModelConfig
from trl.scripts.utils import DatasetMixtureConfig, ScriptArguments, TrlParser, read_script_arguments


def make_parser() -> TrlParser:
    parser = grpo_math.make_parser()
    parser.set_defaults(use_vllm=True, vllm_mode="server")
    return parser


def main(
    script_args: ScriptArguments,
    training_args: GRPOConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> None:
    grpo_math.main(script_args, training_args, model_args, dataset_args)


if __name__ == "__main__":
    main(*read_script_arguments(make_parser()))
