"""Fields that the configs of the methods share which sample completions and learn from rewards."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..choices import check_choice, check_number
from .base_config import _ModelConfig, _PolicyFields, warn_deprecated

VLLM_MODES = ("server", "colocate")
VLLM_MODEL_IMPLS = ("vllm", "transformers")
VLLM_DTYPES = ("float32", "bfloat16", "float16")
VERIFY_LEVELS = ("off", "probe", "full")
ON_REWARD_ERROR = ("raise", "count")


@dataclass
class _OnlineConfig(_PolicyFields, _ModelConfig):
    """Fields of every method that samples completions. Not for direct use."""

    _VALID_DICT_FIELDS = [
        *_ModelConfig._VALID_DICT_FIELDS,
        "transformers_continuous_batching_config",
        "generation_kwargs",
        "chat_template_kwargs",
    ]

    # --- Model ---
    disable_dropout: bool = field(
        default=False,
        metadata={"help": "Set the dropout of all layers to 0, so that old and new log-probs of a policy agree."},
    )

    # --- Data ---
    remove_unused_columns: bool | None = field(
        default=False,
        metadata={"help": "Drop columns other than the prompt's. Off, because reward functions get all columns."},
    )
    shuffle_dataset: bool | None = field(default=True, metadata={"help": "Shuffle the prompts with `seed`."})
    num_generations: int | None = field(
        default=8,
        metadata={
            "help": "Completions for each prompt: a group, whose rewards are compared. At least 2; "
            "`generation_batch_size` is a multiple of it."
        },
    )
    num_generations_eval: int | None = field(
        default=None, metadata={"help": "The same while evaluating. By default `num_generations`."}
    )
    chat_template_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": "Variables for the chat template, as a dictionary or JSON text."},
    )

    # --- Generation ---
    max_completion_length: int | None = field(
        default=512, metadata={"help": "Longest completion, in tokens. None: what the model's context has room for."}
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Divides the logits, when sampling and in all log-probs of the loss."}
    )
    top_p: float = field(
        default=1.0, metadata={"help": "Sample from the smallest set of tokens with this probability. 1.0: all."}
    )
    top_k: int = field(default=0, metadata={"help": "Sample from so many most probable tokens. 0: all."})
    min_p: float | None = field(
        default=None,
        metadata={"help": "Sample from tokens with at least this share of the most probable one's probability."},
    )
    repetition_penalty: float = field(
        default=1.0, metadata={"help": "Above 1, tokens that occurred before become less probable."}
    )
    generation_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": "Further generation settings, in the engine's words. They win over the fields above."},
    )
    cache_implementation: str | None = field(
        default=None, metadata={"help": "Key-value cache of Transformers' `generate`, e.g. `static`."}
    )
    generation_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Completions sampled at a time, over all processes. By default the batch of an optimizer step. "
            "Excludes `steps_per_generation`."
        },
    )
    steps_per_generation: int | None = field(
        default=None,
        metadata={"help": "Micro-batches that one generation is cut into. By default `gradient_accumulation_steps`."},
    )
    ds3_gather_for_generation: bool = field(
        default=True,
        metadata={"help": "Under ZeRO-3, gather all weights to generate: faster, but they have to fit on one device."},
    )
    use_transformers_continuous_batching: bool = field(
        default=False,
        metadata={"help": "Generate with Transformers' continuous batching: finished rows make room for others."},
    )
    transformers_continuous_batching_config: dict | str | None = field(
        default=None, metadata={"help": "Its settings, as a dictionary or JSON text."}
    )
    use_transformers_paged: bool = field(
        default=False, metadata={"help": "Deprecated name of `use_transformers_continuous_batching`."}
    )

    # --- vLLM ---
    use_vllm: bool = field(default=False, metadata={"help": "Generate with vLLM."})
    vllm_mode: str = field(
        default="colocate",
        metadata={
            "help": "`colocate`: in the training process(es); `server`: over HTTP, from `trl vllm-serve`.",
            "choices": list(VLLM_MODES),
        },
    )
    vllm_model_impl: str = field(
        default="vllm",
        metadata={"help": "Model code that vLLM runs: its own, or Transformers'.", "choices": list(VLLM_MODEL_IMPLS)},
    )
    vllm_structured_outputs_regex: str | None = field(
        default=None, metadata={"help": "Regular expression that completions have to match."}
    )
    vllm_server_base_url: str | None = field(
        default=None,
        metadata={"help": "URL of the server, instead of host and port; of several servers, separated by commas."},
    )
    vllm_server_host: str = field(default="0.0.0.0", metadata={"help": "Host of the server."})
    vllm_server_port: int = field(default=8000, metadata={"help": "Port of the server."})
    vllm_server_timeout: float = field(default=240.0, metadata={"help": "Seconds to wait for the server to be up."})
    vllm_group_port: int = field(default=51216, metadata={"help": "Port of the weight transfer."})
    vllm_gpu_memory_utilization: float = field(
        default=0.3, metadata={"help": "Share of the device's memory for vLLM in `colocate` mode."}
    )
    vllm_max_model_length: int | None = field(
        default=None, metadata={"help": "Longest prompt with completion for vLLM. By default the model's context."}
    )
    vllm_tensor_parallel_size: int = field(
        default=1, metadata={"help": "Devices that a vLLM engine is cut over in `colocate` mode."}
    )
    vllm_enable_sleep_mode: bool = field(
        default=False, metadata={"help": "Free vLLM's memory while the model is trained."}
    )

    vllm_dtype: str | None = field(
        default=None,
        metadata={
            "help": "What vLLM computes in with `colocate`: `float32`, `bfloat16` or `float16`. By default what the "
            "trainer computes in."
        },
    )
    vllm_verify: str = field(
        default="probe",
        metadata={
            "help": "How vLLM has to prove, after every update, that it has the trainer's weights: `probe` compares the "
            "log-probs of a few fixed tokens, `full` every layer besides (slow, for debugging), `off` nothing.",
            "choices": list(VERIFY_LEVELS),
        },
    )
    vllm_request_timeout: float = field(
        default=1800.0,
        metadata={"help": "Seconds that an answer of the server is waited for, repetitions included."},
    )

    # --- Training ---
    learning_rate: float = field(default=1e-6, metadata={"help": "The initial learning rate of AdamW."})
    beta: float = field(
        default=0.0,
        metadata={"help": "Coefficient of the KL divergence from the reference. 0: no reference is loaded."},
    )
    num_iterations: int = field(default=1, metadata={"help": "Times that each generation batch is trained on (μ)."})
    epsilon: float = field(
        default=0.2, metadata={"help": "By how much a ratio may fall below 1 before it is clipped."}
    )
    epsilon_high: float | None = field(
        default=None, metadata={"help": "By how much it may exceed 1. By default `epsilon`."}
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each reward function. By default 1 each."}
    )
    mask_truncated_completions: bool = field(
        default=False, metadata={"help": "Do not train on completions that reached `max_completion_length`."}
    )

    reward_time_limits: list[float] | None = field(
        default=None,
        metadata={
            "help": "Seconds that a reward function is waited for: one number for all, or one for each. By default no "
            "limit."
        },
    )
    reward_on_error: str = field(
        default="raise",
        metadata={
            "help": "What happens when a reward function raises, takes too long or returns an infinite value: `raise` "
            "stops the run and names it, `count` counts it and goes on without its values.",
            "choices": list(ON_REWARD_ERROR),
        },
    )
    balance_micro_batches: bool = field(
        default=False,
        metadata={
            "help": "Cut a step's completions into micro-batches of about equally many tokens rather than equally many "
            "completions. The loss is the same; the largest micro-batch needs less memory."
        },
    )

    # --- Evaluation ---
    eval_temperature: float | None = field(
        default=None,
        metadata={
            "help": "Temperature of completions sampled for evaluation; 0 takes the most probable token, and then one "
            "completion for each prompt unless `num_generations_eval` says otherwise. By default `temperature`."
        },
    )

    # --- Logging ---
    log_completions: bool = field(
        default=False,
        metadata={"help": "Log prompts, completions and rewards: on the console, as files, to trackers."},
    )
    num_completions_to_print: int | None = field(
        default=None, metadata={"help": "How many of them on the console. By default all."}
    )
    log_unique_prompts: bool = field(
        default=False, metadata={"help": "One completion for each prompt in the trackers' tables."}
    )
    log_multimodal: bool = field(default=True, metadata={"help": "Log images too."})

    def __post_init__(self):
        if self.use_transformers_paged:
            warn_deprecated("`use_transformers_paged` is an old name of `use_transformers_continuous_batching`.")
            self.use_transformers_continuous_batching = True
        check_choice("vllm_mode", self.vllm_mode, VLLM_MODES)
        check_choice("vllm_model_impl", self.vllm_model_impl, VLLM_MODEL_IMPLS)
        check_choice("vllm_verify", self.vllm_verify, VERIFY_LEVELS)
        if self.vllm_dtype is not None:
            check_choice("vllm_dtype", self.vllm_dtype, VLLM_DTYPES)
        check_choice("reward_on_error", self.reward_on_error, ON_REWARD_ERROR)
        self._check_policy_fields()
        self._check_evaluation()
        super().__post_init__()
        self._check_training()
        self._resolve_generation_batch()
        self._check_groups()

    def _check_training(self) -> None:
        if self.auto_find_batch_size:
            raise ValueError(
                "`auto_find_batch_size=True` would change the batch size while running, but a generation batch is cut "
                "by it and its groups have to stay whole. Set `per_device_train_batch_size`."
            )
        parallelism = self.parallelism_config
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
            raise ValueError(
                "Context and sequence parallelism cut rows over devices, which completions of different lengths do not "
                "allow. Turn them off in `parallelism_config`."
            )
        check_number("temperature", self.temperature, "a number above 0", lambda temperature: temperature > 0)
        if self.num_iterations < 1:
            raise ValueError(f"`num_iterations` is at least 1. Found {self.num_iterations}.")

    def _check_evaluation(self) -> None:
        if self.eval_temperature is None:
            return
        check_number("eval_temperature", self.eval_temperature, "a number of at least 0, or None", lambda x: x >= 0)
        if self.eval_temperature == 0 and self.num_generations_eval is None:
            self.num_generations_eval = 1  # the others would be the same

    def _resolve_generation_batch(self) -> None:
        """One of `generation_batch_size` and `steps_per_generation` follows from the other."""
        per_micro_step = self.per_device_train_batch_size * self.world_size
        if self.generation_batch_size is not None and self.steps_per_generation is not None:
            raise ValueError(
                f"`generation_batch_size={self.generation_batch_size}` and `steps_per_generation="
                f"{self.steps_per_generation}` say the same thing twice: the one is the other times the "
                f"{per_micro_step} completions of a micro-batch over all processes. Keep one of them."
            )
        if self.generation_batch_size is None:
            if self.steps_per_generation is None:
                self.steps_per_generation = self.gradient_accumulation_steps
            self.generation_batch_size = per_micro_step * self.steps_per_generation
        elif self.generation_batch_size % per_micro_step:
            raise ValueError(
                f"`generation_batch_size={self.generation_batch_size}` is no multiple of the {per_micro_step} "
                f"completions of a micro-batch (per_device_train_batch_size={self.per_device_train_batch_size} × "
                f"{self.world_size} processes), so it cannot be cut into micro-batches."
            )
        else:
            self.steps_per_generation = self.generation_batch_size // per_micro_step

    def _check_groups(self) -> None:
        count = self.num_generations
        if count < 2:
            raise ValueError(
                f"`num_generations={count}`: rewards are compared within a group, so it takes at least 2 completions "
                "for each prompt."
            )
        if self.generation_batch_size % count:
            raise ValueError(
                f"`generation_batch_size={self.generation_batch_size}` is no multiple of `num_generations={count}`: a "
                "group would be cut. Change `num_generations`, `per_device_train_batch_size` or "
                "`gradient_accumulation_steps`."
            )
        in_evaluation = self.num_generations_eval or count
        per_eval_step = self.per_device_eval_batch_size * self.world_size
        if self.do_eval and self.eval_strategy != "no" and per_eval_step % in_evaluation:
            raise ValueError(
                f"An evaluation batch has {per_eval_step} completions (per_device_eval_batch_size="
                f"{self.per_device_eval_batch_size} × {self.world_size} processes), no multiple of the {in_evaluation} "
                "for each prompt. Change `per_device_eval_batch_size` or `num_generations_eval`."
            )
