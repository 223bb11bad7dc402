"""Helpers under the path users know; each lives in the room of its subject and is imported when first used."""

from .._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "trl.data.samplers": ["RepeatSampler", "repeat_iterable_dataset"],
        "trl.data.vision": ["strip_images_from_messages"],
        "trl.distributed": ["ensure_master_addr_port", "global_then_local_main_first"],
        "trl.extras.plain": [
            "get_callable_name",
            "identity",
            "is_async_callable",
            "remove_none_values",
            "shutdown_event_loop_in_daemon",
            "start_event_loop_in_daemon",
        ],
        "trl.import_utils": ["is_trackio_available"],
        "trl.models.adapters": ["get_peft_config", "use_adapter"],
        "trl.models.fused_head": [
            "FusedCausalLMOutput",
            "add_fused_lm_head",
            "maybe_gather_lm_head_ctx",
            "patch_chunked_lm_head",
        ],
        "trl.models.loading": ["create_model_from_path", "get_config_model_id", "get_quantization_config"],
        "trl.models.reference": ["disable_dropout_in_model", "hash_module"],
        "trl.ops.tensors": [
            "entropy_from_logits",
            "flush_left",
            "nanmax",
            "nanmin",
            "nanstd",
            "pad",
            "selective_log_softmax",
            "selective_log_softmax_and_entropy",
            "shuffle_sequence_dict",
            "split_pixel_values_by_grid",
            "split_tensor_dict",
            "unsplit_pixel_values_by_grid",
        ],
        "trl.reports.completions_table": ["print_prompt_completions_sample"],
        "trl.reports.flops": [
            "adjusted_mfu",
            "compute_flops_per_token",
            "compute_mfu",
            "get_peak_flops",
            "get_peak_flops_per_device",
        ],
        "trl.reports.model_card": ["generate_model_card"],
        "trl.reports.tracking": [
            "get_comet_experiment_url",
            "get_trackio_space_url",
            "log_table_to_comet_experiment",
        ],
    },
)
