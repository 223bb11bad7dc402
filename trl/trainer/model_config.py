"""Which model a script loads and how: precision, attention, quantization, and the adapter that is trained."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ModelConfig:
    """
    Model, quantization and adapter of a script; each field is an option of its command line.

    Raises:
        ValueError: 8-bit and 4-bit loading asked for at once.
    """

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model to start from: a name on the Hub or a folder."}
    )
    model_revision: str = field(
        default="main", metadata={"help": "Revision of the model on the Hub: a branch, a tag or a commit."}
    )
    dtype: str | None = field(
        default="float32",
        metadata={
            "help": "Type in which the weights are loaded. 'auto' takes the type they are stored in.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "Attention implementation, e.g. 'sdpa', 'eager', 'flex_attention', 'flash_attention_2', or a "
            "kernel of the Hub. By default Transformers chooses."
        },
    )

    # --- Adapter (PEFT) ---
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of all weights."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the LoRA matrices."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA scale: the update is multiplied by alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout in front of the LoRA matrices."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the modules that get LoRA matrices; 'all-linear' for every linear layer."},
    )
    lora_target_parameters: list[str] | None = field(
        default=None,
        metadata={"help": "Names of parameters that get LoRA matrices, for weights that are no module of their own."},
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained whole and saved with the adapter."}
    )
    lora_task_type: str = field(
        default="CAUSAL_LM", metadata={"help": "PEFT's task type ('SEQ_CLS' for reward models)."}
    )
    use_rslora: bool = field(
        default=False,
        metadata={
            "help": "Rank-stabilized LoRA: scale by alpha / sqrt(r) (https://huggingface.co/papers/2312.03732)."
        },
    )
    use_dora: bool = field(
        default=False,
        metadata={
            "help": "DoRA: train the weights' magnitude apart from their direction "
            "(https://huggingface.co/papers/2402.09353)."
        },
    )

    # --- Quantization (bitsandbytes) ---
    load_in_8bit: bool = field(default=False, metadata={"help": "Load the base model in 8 bit."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Load the base model in 4 bit (QLoRA)."})
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"help": "4-bit data type.", "choices": ["fp4", "nf4"]})
    use_bnb_nested_quant: bool = field(
        default=False, metadata={"help": "Quantize the quantization constants of 4-bit loading as well."}
    )
    bnb_4bit_quant_storage: str | None = field(
        default=None,
        metadata={"help": "Type in which packed 4-bit weights are stored (FSDP wants that of the model)."},
    )

    def __post_init__(self):
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError(
                "`load_in_8bit` and `load_in_4bit` cannot both be set: the weights are stored in one of them."
            )
        # `--lora_target_modules all-linear` arrives as a list; PEFT knows the word (or a pattern) only as text.
        if isinstance(self.lora_target_modules, list) and len(self.lora_target_modules) == 1:
            self.lora_target_modules = self.lora_target_modules[0]
