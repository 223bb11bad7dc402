"""
Getting a model, its tokenizer or processor, and its quantization, from a name or a folder.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.integrations import is_deepspeed_zero3_enabled

if TYPE_CHECKING:
    from transformers import (
        BitsAndBytesConfig,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
    )
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

DTYPES = ("auto", "bfloat16", "float16", "float32")


# ---- Errors ----


def _looks_like_path(model_id: str) -> bool:
    return Path(model_id).exists() or model_id.startswith((".", "/", "~")) or model_id.count("/") > 1


def _explain_missing(model_id: str, what: str, error: Exception) -> OSError:
    """The error for a model that cannot be read: what was tried, and the nearest fix."""
    folder = Path(model_id)
    if folder.is_dir():
        files = sorted(file.name for file in folder.iterdir())
        if "adapter_config.json" in files and what == "model":
            hint = (
                "It holds a PEFT adapter, not a model. Load both and pass the result:\n"
                f"    AutoPeftModelForCausalLM.from_pretrained({model_id!r}, is_trainable=True)"
            )
        else:
            checkpoints = [name for name in files if name.startswith("checkpoint-")]
            hint = f"It holds: {', '.join(files[:8]) or 'nothing'}{', ...' if len(files) > 8 else ''}."
            if checkpoints:
                hint += f" Did you mean {folder / checkpoints[-1]}?"
        return OSError(f"The folder {folder.resolve()} has no {what} that can be loaded. {hint}\n{error}")
    if _looks_like_path(model_id):
        parent = folder.expanduser().absolute().parent
        while not parent.exists():
            parent = parent.parent
        hint = "Write the home folder out; `~` is not expanded." if model_id.startswith("~") else "Check the spelling."
        return OSError(
            f"There is no folder {folder.absolute()} to load the {what} from (what exists of it: {parent}). {hint}"
        )
    offline = "1" in (os.environ.get("HF_HUB_OFFLINE"), os.environ.get("TRANSFORMERS_OFFLINE"))
    tried = "the local cache (offline mode is on: HF_HUB_OFFLINE)" if offline else "the local cache and the Hub"
    return OSError(
        f"No {what} {model_id!r} was found. Tried: the folder {folder.absolute()}, then {tried}.\n"
        "Check the spelling (`owner/name`), log in with `hf auth login` where it is private or gated, or give the path "
        f"of a folder that `save_pretrained` wrote.\nThe reason given: {error}"
    )


# ---- The model ----


def _check_dtype(dtype: str | torch.dtype | None) -> str | torch.dtype | None:
    """A dtype as Transformers takes it. The command line and JSON can only give names."""
    if dtype is None or dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype
    if isinstance(dtype, str) and dtype in DTYPES:
        return getattr(torch, dtype)
    raise ValueError(f"`dtype` is one of {', '.join(map(repr, DTYPES))} or a torch.dtype, found {dtype!r}.")


def _default_device_map() -> str | None:
    """`"auto"` on one process with an accelerator; otherwise the trainer places the model itself."""
    several_processes = int(os.environ.get("WORLD_SIZE", "1")) > 1
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true" or is_deepspeed_zero3_enabled()
    accelerator = torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())
    return "auto" if accelerator and not several_processes and not deepspeed else None


def _architecture_of(config: PreTrainedConfig) -> Any:
    """The class the checkpoint was saved from, or the Auto class its remote code registers, or the causal LM one."""
    for name in config.architectures or []:
        if hasattr(transformers, name):
            return getattr(transformers, name)
        break
    remote = getattr(config, "auto_map", None) or {}
    return AutoModelForImageTextToText if "AutoModelForImageTextToText" in remote else AutoModelForCausalLM


def create_model_from_path(
    model_id: str, architecture: _BaseAutoModelClass | None = None, **kwargs: Any
) -> PreTrainedModel:
    """
    Load a model by name or path, with defaults made for training.

    Args:
        model_id: name on the Hub, or path of a folder.
        architecture: class to load with. Default: the one named in the checkpoint's config.
        **kwargs: passed to `from_pretrained`. `dtype` is float32 by default (weights that train want the precision;
            activations follow `bf16` or `fp16`), `device_map` is `"auto"` on a single process with an accelerator and
            None elsewhere.

    Returns:
        The model.

    Raises:
        ValueError: `dtype` is not one of the four names nor a torch.dtype.
        OSError: there is no such model; says what was tried.
    """
    if "torch_dtype" in kwargs:  # its name until Transformers 4.56
        kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
    kwargs["dtype"] = _check_dtype(kwargs.get("dtype", "float32"))
    kwargs.setdefault("device_map", _default_device_map())
    trust_remote_code = kwargs.get("trust_remote_code", False)
    hub_options = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "subfolder") if key in kwargs}
    try:
        config = kwargs.pop("config", None) or AutoConfig.from_pretrained(
            model_id, trust_remote_code=trust_remote_code, **hub_options
        )
    except (OSError, ValueError) as error:
        # Of the ValueErrors only one means "no usable config here"; the others (unknown or remote code) say it best.
        if isinstance(error, ValueError) and ("trust_remote_code" in str(error) or "model_type" not in str(error)):
            raise
        raise _explain_missing(model_id, "model", error) from error
    architecture = architecture or _architecture_of(config)
    try:
        return architecture.from_pretrained(model_id, config=config, **kwargs)
    except OSError as error:  # a config without weights
        raise _explain_missing(model_id, "model", error) from error


def get_config_model_id(config: PreTrainedConfig) -> str:
    """The name or path a model's config was loaded from; empty for a model made in memory."""
    return getattr(config, "_name_or_path", "") or getattr(config.get_text_config(), "_name_or_path", "") or ""


# ---- Its tokenizer or processor ----


def load_processing_class(
    model_id: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    padding_side: str | None = None,
    truncation_side: str | None = None,
    text_only: bool = False,
) -> PreTrainedTokenizerBase | ProcessorMixin:
    """
    Load the processor, or for a text model the tokenizer, that was published with a model.

    Args:
        model_id: name on the Hub, or path of a folder.
        revision: branch, tag or commit; default the main branch.
        trust_remote_code: allow code from the repository to run.
        padding_side: `"left"` or `"right"`; default the tokenizer's own.
        truncation_side: likewise.
        text_only: the tokenizer, even where there is a processor.

    Returns:
        The processor or tokenizer.

    Raises:
        OSError: there is none; says what was tried.
        ValueError: the model was made in memory and so has no name.
    """
    if not model_id:
        raise ValueError(
            "The model was made in memory and has no name to find a tokenizer by. Pass one as `processing_class`."
        )
    auto_class = AutoTokenizer if text_only else AutoProcessor
    options = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        options["revision"] = revision
    try:
        processing_class = auto_class.from_pretrained(model_id, **options)
    except OSError as error:
        raise _explain_missing(model_id, "tokenizer", error) from error
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if padding_side is not None:
        tokenizer.padding_side = padding_side
    if truncation_side is not None:
        tokenizer.truncation_side = truncation_side
    return processing_class


# ---- Quantization ----


def get_quantization_config(model_args: Any) -> BitsAndBytesConfig | None:
    """
    The quantization asked for by a `ModelConfig`.

    Args:
        model_args: a `ModelConfig` (`load_in_4bit`, `load_in_8bit`, `bnb_4bit_*`, `use_bnb_nested_quant`, `dtype`).

    Returns:
        A `BitsAndBytesConfig`, or None where neither 4 nor 8 bits are asked for. 4-bit weights are computed with in
        `dtype` (bfloat16 for `"auto"`). QLoRA: https://huggingface.co/papers/2305.14314.
    """
    if not (model_args.load_in_4bit or model_args.load_in_8bit):
        return None
    from transformers import BitsAndBytesConfig

    if not model_args.load_in_4bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    dtype = _check_dtype(model_args.dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else dtype,
        bnb_4bit_quant_type=model_args.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=model_args.use_bnb_nested_quant,
        bnb_4bit_quant_storage=model_args.bnb_4bit_quant_storage,
    )
