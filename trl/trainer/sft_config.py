"""Config of supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..choices import check_choice
from .base_config import _OfflineConfig, _TemplateFields, warn_deprecated

LOSS_TYPES = ("nll", "dft")
PACKING_STRATEGIES = ("bfd", "bfd_split", "wrapped")
TRUNCATION_MODES = ("keep_start", "keep_end")


@dataclass
class SFTConfig(_TemplateFields, _OfflineConfig):
    """
    Arguments of [`SFTTrainer`]: those of `transformers.TrainingArguments`, and the fields below.

    Defaults that differ from `TrainingArguments`: `logging_steps` 10, `gradient_checkpointing` True, `bf16` on where
    the hardware has it, `learning_rate` 2e-5.

    Raises:
        ValueError: for a value outside its choices, a JSON field that is not JSON, or options that exclude each other.
    """

    _VALID_DICT_FIELDS = [*_OfflineConfig._VALID_DICT_FIELDS, "dataset_kwargs"]

    # --- Model ---
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the load-balancing loss of a mixture-of-experts model. By default the model config's "
            "own value; 0 turns it off."
        },
    )

    # --- Data ---
    dataset_text_field: str = field(
        default="text", metadata={"help": "Column that holds the text of a plain dataset."}
    )
    dataset_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Options of the dataset preparation. Known key: `skip_prepare_dataset` (True: the dataset is used "
            "as it is)."
        },
    )
    max_length: int | None = field(
        default=1024,
        metadata={
            "help": "Longest example in tokens; longer ones are cut. With packing, the length of a packed row. "
            "None: no limit."
        },
    )
    truncation_mode: str = field(
        default="keep_start",
        metadata={
            "help": "Which part of a too long example is kept. `keep_end` is deprecated.",
            "choices": list(TRUNCATION_MODES),
        },
    )
    shuffle_dataset: bool = field(
        default=False, metadata={"help": "Shuffle the dataset with `seed` before packing, and again after it."}
    )
    packing: bool = field(
        default=False,
        metadata={"help": "Put several examples into one row of `max_length` tokens. They never see each other."},
    )
    packing_strategy: str = field(
        default="bfd",
        metadata={
            "help": "`bfd`: best fit by decreasing length, overlong examples are cut; `bfd_split`: overlong examples "
            "are split into pieces; `wrapped`: one stream cut into rows, ignoring boundaries.",
            "choices": list(PACKING_STRATEGIES),
        },
    )
    eval_packing: bool | None = field(
        default=None, metadata={"help": "Pack the evaluation dataset. By default as `packing`."}
    )
    padding_free: bool = field(
        default=False,
        metadata={"help": "Lay a batch out as one row without padding. Same numbers as padded, less work."},
    )

    # --- Training ---
    learning_rate: float = field(default=2e-5, metadata={"help": "The initial learning rate of AdamW."})
    loss_type: str = field(
        default="nll",
        metadata={
            "help": "`nll`: negative log-likelihood; `dft`: each token's loss times its own (detached) probability "
            "(Dynamic Fine-Tuning, https://huggingface.co/papers/2508.05629). `chunked_nll` is a deprecated name of "
            "`nll`.",
        },
    )
    completion_only_loss: bool | None = field(
        default=None,
        metadata={
            "help": "Train on the completion only. By default on for datasets with `prompt` and `completion`, off "
            "for others."
        },
    )
    assistant_only_loss: bool = field(
        default=False, metadata={"help": "Train on the assistant's words only. Needs conversational data."}
    )

    def __post_init__(self):
        if self.loss_type is None:  # the default of earlier versions
            self.loss_type = "nll"
        if self.loss_type == "chunked_nll":
            warn_deprecated("`loss_type='chunked_nll'` is an old name of `'nll'`, which is computed in chunks.")
            self.loss_type = "nll"
        if self.packing_strategy == "bfd-requeue":
            warn_deprecated("`packing_strategy='bfd-requeue'` is an old name of `'bfd_split'`.")
            self.packing_strategy = "bfd_split"
        self._check_template_fields()
        if self.truncation_mode == "keep_end":
            warn_deprecated(
                "`truncation_mode='keep_end'` is deprecated: cut the dataset yourself if you need its end."
            )
        check_choice("loss_type", self.loss_type, LOSS_TYPES)
        check_choice("packing_strategy", self.packing_strategy, PACKING_STRATEGIES)
        check_choice("truncation_mode", self.truncation_mode, TRUNCATION_MODES)
        super().__post_init__()
