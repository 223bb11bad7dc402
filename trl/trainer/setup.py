"""
What a trainer works out before `transformers.Trainer` starts: its config, model, tokenizer, special tokens, adapter.

Each step is a function of its inputs. The order is the trainer's business.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from accelerate.utils import DistributedType
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainingArguments, set_seed
from transformers.utils import logging

from ..data.template_cloning import clone_chat_template
from ..data.template_rendering import inner_tokenizer
from ..models.loading import create_model_from_path, get_config_model_id, load_processing_class
from .base_config import _BaseConfig

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import BitsAndBytesConfig

logger = logging.get_logger(__name__)

ConfigT = TypeVar("ConfigT", bound=_BaseConfig)
ProcessingClass = PreTrainedTokenizerBase | ProcessorMixin


def resolve_args(
    args: TrainingArguments | None, config_class: type[ConfigT], model: str | nn.Module, method: str
) -> ConfigT:
    """The trainer's config: the given one, one made from plain `TrainingArguments`, or the defaults."""
    if args is None:
        model_id = model if isinstance(model, str) else get_config_model_id(model.config)
        return config_class(f"{model_id.rstrip('/').split('/')[-1]}-{method}")
    if isinstance(args, config_class):
        return args
    if isinstance(args, TrainingArguments):
        values = args.to_dict()
        values["hub_token"] = args.hub_token  # `to_dict` hides it
        values.pop("push_to_hub_token", None)
        return config_class(**values)
    raise TypeError(
        f"`args` is a {config_class.__name__} (or transformers.TrainingArguments), found {type(args).__name__}."
    )


def check_single_device_per_process(args: TrainingArguments, trainer_name: str) -> None:
    """Refuse `nn.DataParallel`: its replicas would each see a part of a batch that the loss counts as one."""
    if args.n_gpu > 1:
        raise ValueError(
            f"{trainer_name} runs one process per device, but this process sees {args.n_gpu} GPUs and would use "
            "nn.DataParallel. Start it with `accelerate launch` or `torchrun` (or `trl`), or choose one GPU with "
            "CUDA_VISIBLE_DEVICES=0."
        )


def resolve_model(
    model: str | nn.Module,
    args: _BaseConfig,
    quantization_config: BitsAndBytesConfig | None = None,
    architecture: Any = None,
) -> nn.Module:
    """
    The model itself, loaded where it was given as a name or path.

    Raises:
        ValueError: two quantization configs.
    """
    set_seed(args.seed)  # before anything random is initialised, an adapter included
    init_kwargs = dict(args.model_init_kwargs or {})
    if not isinstance(model, str):
        if init_kwargs:
            warnings.warn(
                "`model_init_kwargs` is ignored, because `model` is a model already. Pass its name or path, or apply "
                "the options when you load it."
            )
        if quantization_config is not None:
            warnings.warn(
                "`quantization_config` is ignored, because `model` is a model already. Pass its name or path, or load "
                "it quantized."
            )
        return model
    if quantization_config is not None:
        if "quantization_config" in init_kwargs:
            raise ValueError(
                "A quantization config was given twice: as the argument `quantization_config` and inside "
                "`model_init_kwargs`. Keep one of them."
            )
        init_kwargs["quantization_config"] = quantization_config
    init_kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    one_process_per_device = args.distributed_state.distributed_type in (
        DistributedType.MULTI_GPU,
        DistributedType.DEEPSPEED,
    )
    if one_process_per_device or args.device.type in ("cpu", "mps"):
        init_kwargs["device_map"] = None
    else:
        init_kwargs.setdefault("device_map", "auto")
    return create_model_from_path(model, architecture, **init_kwargs)


def resolve_processing_class(
    processing_class: ProcessingClass | None, model: nn.Module, args: _BaseConfig, **load_kwargs: Any
) -> ProcessingClass:
    """The tokenizer or processor given, or the one that was published with the model."""
    if processing_class is None:
        return load_processing_class(
            get_config_model_id(model.config),
            revision=(args.model_init_kwargs or {}).get("revision"),
            trust_remote_code=args.trust_remote_code,
            **load_kwargs,
        )
    if not isinstance(processing_class, (PreTrainedTokenizerBase, ProcessorMixin)):
        raise TypeError(
            "`processing_class` is a tokenizer (PreTrainedTokenizerBase) or a processor (ProcessorMixin), found "
            f"{type(processing_class).__name__}."
        )
    return processing_class


def check_is_processor(processing_class: ProcessingClass) -> None:
    """Refuse a tokenizer where the dataset has images."""
    if not isinstance(processing_class, ProcessorMixin):
        raise ValueError(
            "The dataset has images, but the `processing_class` is a tokenizer, which cannot read them. Pass the "
            "processor of a vision-language model (AutoProcessor.from_pretrained)."
        )


def expect_unused_parameters(args: TrainingArguments) -> None:
    """Tell DDP that a batch may leave weights without gradients: text alone does not reach a vision tower."""
    reentrant = (args.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)
    if args.ddp_find_unused_parameters is None and not reentrant:
        args.ddp_find_unused_parameters = True


def _token_id_in_vocabulary(tokenizer: PreTrainedTokenizerBase, token: str, field: str) -> int:
    token_id = tokenizer.convert_tokens_to_ids(token)
    if token_id is None or token not in tokenizer.get_vocab():
        raise ValueError(
            f"The specified `{field}` ({token!r}) is not found in the vocabulary of the given `processing_class` "
            f"({type(tokenizer).__name__}, {len(tokenizer)} tokens). Choose a token it has (its eos token is "
            f"{tokenizer.eos_token!r}), or add it with `tokenizer.add_tokens` and resize the model's embeddings."
        )
    return token_id


def set_pad_token(processing_class: ProcessingClass, model: PreTrainedModel, pad_token: str | None = None) -> int:
    """
    Give the tokenizer a pad token (the given one, its own, or its end-of-sequence token) and tell the model.

    Padding and stop token may share an id: masks follow positions, never token values.

    Returns:
        The pad token's id.
    """
    tokenizer = inner_tokenizer(processing_class)
    pad_token = pad_token or tokenizer.pad_token or tokenizer.eos_token
    if pad_token is None:
        raise ValueError(
            "The tokenizer has neither a pad nor an eos token. Set one: `tokenizer.pad_token = ...` (a token of its "
            "vocabulary), and pass it as `processing_class`."
        )
    pad_token_id = _token_id_in_vocabulary(tokenizer, pad_token, "pad_token")
    tokenizer.pad_token = pad_token
    model.config.get_text_config().pad_token_id = pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = pad_token_id
    return pad_token_id


def set_eos_token(processing_class: ProcessingClass, model: PreTrainedModel, eos_token: str) -> int:
    """
    Make `eos_token` the token that ends a text, for the tokenizer, the model, and generation with it.

    Returns:
        Its id.
    """
    tokenizer = inner_tokenizer(processing_class)
    eos_token_id = _token_id_in_vocabulary(tokenizer, eos_token, "eos_token")
    tokenizer.eos_token = eos_token
    model.config.get_text_config().eos_token_id = eos_token_id
    if getattr(model, "generation_config", None) is not None:
        stops = model.generation_config.eos_token_id
        stops = [] if stops is None else list(stops) if isinstance(stops, (list, tuple)) else [stops]
        model.generation_config.eos_token_id = [eos_token_id, *(stop for stop in stops if stop != eos_token_id)]
    return eos_token_id


def apply_chat_template_path(
    path: str, model: PreTrainedModel, processing_class: ProcessingClass
) -> tuple[PreTrainedModel, ProcessingClass, list[int]]:
    """
    Take the chat template from a Jinja file, or from another tokenizer together with its special tokens.

    Returns:
        The model (its embeddings may have been resized), the processing class, and the ids of added tokens.
    """
    if path.endswith((".jinja", ".j2")):
        file = Path(path)
        if not file.is_file():
            raise ValueError(f"`chat_template_path` names a template file, but {file.resolve()} does not exist.")
        processing_class.chat_template = file.read_text(encoding="utf-8")
        return model, processing_class, []
    return clone_chat_template(model, processing_class, path)


def train_added_tokens(peft_config: PeftConfig, added_token_ids: list[int], head: str | None = "lm_head") -> None:
    """
    Make an adapter learn the embeddings of added tokens too, and the output `head` where there is one: frozen, they
    would stay random.
    """
    if not added_token_ids:
        return
    indices = getattr(peft_config, "trainable_token_indices", None)
    if indices is None:
        indices = {"embed_tokens": []}
    elif not isinstance(indices, dict):
        indices = {"embed_tokens": list(indices)}
    known = indices.setdefault("embed_tokens", [])
    known.extend(token_id for token_id in added_token_ids if token_id not in known)
    peft_config.trainable_token_indices = indices
    modules_to_save = list(peft_config.modules_to_save or [])
    if head is not None and head not in modules_to_save:
        warnings.warn(
            f"The cloned chat template added tokens, so the output head (`{head}`) is trained and saved along with the "
            "adapter. Add it to `modules_to_save` yourself to silence this warning."
        )
        peft_config.modules_to_save = [*modules_to_save, head]
