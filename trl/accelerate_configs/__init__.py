"""Ready-made configurations for Accelerate: `trl sft --accelerate_config zero3`."""
