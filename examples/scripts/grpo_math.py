"""
Reasoning on grade-school mathematics with GRPO: data prepared in the script, a verifier as reward, and accuracy on the
test questions apart from it.

    python examples/scripts/grpo_math.py \
        --model_name_or_path Qwen/Qwen3-0.6B \
        --per_device_train_batch_size 8 --gradient_accumulation_steps 8 \
        --max_completion_length 1024 \
        --eval_strategy steps --eval_steps 50 --num_generations_eval 4 \
        --load_best_model_at_end --metric_for_best_model pass@1 --greater_is_better true \
        --output_dir Qwen3-0.6B-gsm8k

Without `--dataset_name` the questions are those of GSM8K (https://huggingface.co/papers/2110.14168). Another dataset
needs its columns: `question`, and `answer`, which ends in `#### ` and the number.
"""

from trl import GRPOConfig, GRPOTrainer, ModelConfig
from trl.rewards import accuracy_reward
from trl.scripts.training import train_and_save, trainer_arguments
from trl.scripts.utils import DatasetMixtureConfig, ScriptArguments, TrlParser, read_script_arguments
from trl.trainer.text_evaluation import pass_at_k_metric

INSTRUCTION = "Think step by step, then put the final answer, a number, within \\boxed{}."


def make_problem(row: dict) -> dict:
    """The chat that a question begins, and the number at the end of its answer."""
    number = row["answer"].rpartition("####")[2].strip().replace(",", "")
    messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": row["question"]}]
    return {"prompt": messages, "solution": f"${number}$"}


def make_parser() -> TrlParser:
    return TrlParser((ScriptArguments, GRPOConfig, ModelConfig, DatasetMixtureConfig))


def main(
    script_args: ScriptArguments,
    training_args: GRPOConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> None:
    if script_args.dataset_name is None and not dataset_args.datasets:
        script_args.dataset_name, script_args.dataset_config = "openai/gsm8k", "main"
    arguments = trainer_arguments(script_args, training_args, model_args, dataset_args)
    for name in ("train_dataset", "eval_dataset"):
        if arguments[name] is not None:
            arguments[name] = arguments[name].map(make_problem, remove_columns=["question", "answer"])

    samples = training_args.num_generations_eval or training_args.num_generations
    trainer = GRPOTrainer(
        reward_funcs=accuracy_reward,
        compute_metrics=pass_at_k_metric(accuracy_reward, ks=(1, samples)),
        **arguments,
    )
    train_and_save(trainer, script_args, training_args)


if __name__ == "__main__":
    main(*read_script_arguments(make_parser()))
