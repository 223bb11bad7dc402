"""Trainers and their configs, imported when first used."""

from .._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
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
        "trl.trainer.utils": [
            "add_fused_lm_head",
            "disable_dropout_in_model",
            "ensure_master_addr_port",
            "get_peft_config",
            "get_quantization_config",
            "patch_chunked_lm_head",
        ],
    },
)
