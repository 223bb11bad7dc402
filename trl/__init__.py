"""Post-training of language models on Hugging Face Transformers. Public names are imported when first used."""

import importlib.util
import os
from importlib.metadata import PackageNotFoundError, version

from ._lazy import lazy_exports

try:
    __version__ = version("trl")
except PackageNotFoundError:  # a source tree on the path, never installed
    __version__ = "unknown"

# vLLM logs its whole start-up at INFO; a user who wants that sets the variable.
if importlib.util.find_spec("vllm") is not None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "trl.chat_template_utils": [
            "add_response_schema",
            "clone_chat_template",
            "get_training_chat_template",
            "supports_tool_calling",
        ],
        "trl.data_utils": [
            "apply_chat_template",
            "extract_prompt",
            "is_conversational",
            "is_conversational_from_value",
            "maybe_apply_chat_template",
            "maybe_convert_to_chatml",
            "maybe_extract_prompt",
            "maybe_unpair_preference_dataset",
            "pack_dataset",
            "prepare_multimodal_messages",
            "prepare_multimodal_messages_vllm",
            "unpair_preference_dataset",
        ],
        "trl.models": [],
        "trl.models.utils": ["create_reference_model"],
        "trl.reports.doctor": ["DoctorCallback"],
        "trl.scripts": [],
        "trl.scripts.utils": [
            "DatasetMixtureConfig",
            "ScriptArguments",
            "TrlParser",
            "get_dataset",
            "init_zero_verbose",
        ],
        "trl.trainer": [],
        "trl.trainer.callbacks": [
            "BEMACallback",
            "LogCompletionsCallback",
            "RichProgressCallback",
            "SyncRefModelCallback",
            "WeaveCallback",
        ],
        "trl.trainer.dpo_config": ["DPOConfig"],
        "trl.trainer.dpo_trainer": ["DPOTrainer"],
        "trl.trainer.grpo_config": ["GRPOConfig"],
        "trl.trainer.grpo_trainer": ["GRPOTrainer"],
        "trl.trainer.kto_config": ["KTOConfig"],
        "trl.trainer.kto_trainer": ["KTOTrainer"],
        "trl.trainer.model_config": ["ModelConfig"],
        "trl.trainer.reward_config": ["RewardConfig"],
        "trl.trainer.reward_trainer": ["RewardTrainer"],
        "trl.trainer.rloo_config": ["RLOOConfig"],
        "trl.trainer.rloo_trainer": ["RLOOTrainer"],
        "trl.trainer.sft_config": ["SFTConfig"],
        "trl.trainer.sft_trainer": ["SFTTrainer"],
        "trl.trainer.text_evaluation": ["TextEvalPrediction", "pass_at_k", "pass_at_k_metric"],
        "trl.trainer.utils": ["get_peft_config", "get_quantization_config"],
    },
)
