"""Config of direct preference optimization."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..choices import check_choice
from ..losses.preference_options import F_DIVERGENCE_TYPES, PREFERENCE_LOSS_TYPES, PreferenceLossOptions
from .base_config import warn_deprecated
from .preference_config import _ReferenceConfig

TRUNCATION_MODES = ("keep_start", "keep_end")


@dataclass
class DPOConfig(_ReferenceConfig):
    """
    Arguments of [`DPOTrainer`]: those of `transformers.TrainingArguments`, and the fields below.

    Defaults that differ from `TrainingArguments`: `logging_steps` 10, `gradient_checkpointing` True, `bf16` on where
    the hardware has it, `learning_rate` 1e-6.

    Raises:
        ValueError: for a value outside its range or choices, a JSON field that is not JSON, or options that exclude
            each other.
        NotImplementedError: for `use_weighting` with a loss that sorts the batch.
    """

    # --- Data ---
    pad_token: str | None = field(
        default=None, metadata={"help": "Deprecated: set `pad_token` on the tokenizer that you pass in."}
    )
    truncation_mode: str = field(
        default="keep_start",
        metadata={
            "help": "Which part of a too long prompt with completion is kept. `keep_end` is deprecated.",
            "choices": list(TRUNCATION_MODES),
        },
    )
    padding_free: bool = field(
        default=False,
        metadata={"help": "Lay a batch out without padding: the same as `layout='packed'`."},
    )

    # --- Loss ---
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={
            "help": f"One loss or several, which are added: {', '.join(PREFERENCE_LOSS_TYPES)}.",
        },
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each loss in `loss_type`. By default 1 each."}
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={
            "help": "Assumed probability that a preference is the wrong way round. Read by `robust`, `exo_pair`, `aot` "
            "and `aot_unpaired`."
        },
    )
    f_divergence_type: str = field(
        default="reverse_kl",
        metadata={
            "help": f"Divergence between policy and reference: {', '.join(F_DIVERGENCE_TYPES)} "
            "(https://huggingface.co/papers/2309.16240)."
        },
    )
    f_alpha_divergence_coef: float = field(
        default=0.5, metadata={"help": "α of `f_divergence_type='alpha_divergence'`."}
    )
    discopop_tau: float = field(default=0.05, metadata={"help": "Temperature of the blend in the `discopop` loss."})
    ld_alpha: float | None = field(
        default=None,
        metadata={
            "help": "Weight, from 0 to 1, of the tokens by which a completion is longer than the other of its pair "
            "(LD-DPO, https://huggingface.co/papers/2409.06411). By default they count in full."
        },
    )
    use_weighting: bool = field(
        default=False,
        metadata={
            "help": "Weigh each pair by how probable the policy finds it (WPO, https://huggingface.co/papers/2406.11827)."
        },
    )

    def __post_init__(self):
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        if self.pad_token is not None:
            warn_deprecated("`pad_token` is deprecated: set it on the tokenizer and pass that as `processing_class`.")
        if self.truncation_mode == "keep_end":
            warn_deprecated(
                "`truncation_mode='keep_end'` is deprecated: cut the dataset yourself if you need its end."
            )
        check_choice("truncation_mode", self.truncation_mode, TRUNCATION_MODES)
        PreferenceLossOptions.of(self)  # says what is wrong with the loss
        if self.padding_free:
            if self.layout not in ("auto", "packed"):
                raise ValueError(
                    f"`padding_free=True` is `layout='packed'`, but `layout={self.layout!r}`. Drop one of them."
                )
            self.layout = "packed"
        super().__post_init__()
