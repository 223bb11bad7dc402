"""Loading, adapting and preparing models."""

from .._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "trl.models.activation_offloading": ["get_act_offloading_ctx_manager"],
        "trl.models.selective_activation_checkpointing": ["enable_selective_activation_checkpointing"],
        "trl.models.utils": [
            "create_reference_model",
            "prepare_deepspeed",
            "prepare_fsdp",
            "unwrap_model_for_generation",
        ],
    },
)
