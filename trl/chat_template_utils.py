"""Chat template functions under the path users know; they live in `trl.data` and are imported when first used.

What a tokenizer's template needs is worked out by rendering it, so no copies of vendors' templates are kept here. The
formats of answers (`qwen3_template`, ...) are our own and resolve; a name that stood for a vendor's text
(`qwen3_chat_template`, ...) raises an error that says which function to call.
"""

from __future__ import annotations

from typing import Any

from ._lazy import lazy_exports

_lazy_getattr, _lazy_dir, __all__ = lazy_exports(
    __name__,
    {
        "trl.data.chat_templates": ["has_generation_markers", "tokenize_conversation"],
        "trl.data.template_checks": ["is_chat_template_prefix_preserving", "is_chat_template_stop_token_trained"],
        "trl.data.template_cloning": ["clone_chat_template"],
        "trl.data.tool_formats": [
            "_SUPPORTS_RESPONSE_TEMPLATE",
            "add_response_schema",
            "parse_response",
            "supports_tool_calling",
        ],
        "trl.data.training_templates": ["get_training_chat_template"],
    },
)

_CHATML = ("<|im_start|>assistant",)
_DEEPSEEK = ("<｜Assistant｜>", "<｜tool▁outputs▁end｜>")
_LLAMA = ("<|start_header_id|>assistant<|end_header_id|>",)

# Name -> syntax, marks that start the assistant's turn, mark that ends it, key of the reasoning and the marks around it.
_RESPONSE_TEMPLATES: dict[str, tuple] = {
    "deepseek_r1_distill_template": ("fenced_json", _DEEPSEEK, "<｜end▁of▁sentence｜>", "reasoning_content"),
    "gemma4_template": (
        "braced",
        ("<|turn>model", "<tool_response|>"),
        "<turn|>",
        "reasoning_content",
        "<|channel>thought",
        "<channel|>",
    ),
    "glm4moe_template": ("tagged_keys", ("<|assistant|>",), "", "reasoning_content"),
    "gptoss_template": ("channels", ("<|start|>assistant",), "<|return|>", "thinking"),
    "lfm2_2_5_template": ("pythonic", _CHATML, "<|im_end|>", "thinking"),
    "llama3_template": ("bare_json_parameters", _LLAMA, "<|eot_id|>"),
    "nemotron_3_template": ("tagged_function", _CHATML, "<|im_end|>", "reasoning_content"),
    "qwen3_5_template": ("tagged_function", _CHATML, "<|im_end|>", "reasoning_content"),
    "qwen3_template": ("tagged_json", _CHATML, "<|im_end|>", "reasoning_content"),
}


def __getattr__(name: str) -> Any:
    if name in _RESPONSE_TEMPLATES:
        from .data.tool_syntaxes import TurnFormat, build_response_template

        syntax, *turn = _RESPONSE_TEMPLATES[name]
        return build_response_template(syntax, TurnFormat(*turn))
    if name in __all__:
        return _lazy_getattr(name)
    if name.endswith("_training_chat_template"):
        raise AttributeError(
            f"module {__name__!r} keeps no {name!r}: the template for training is derived from the tokenizer's own. "
            "Call `get_training_chat_template(tokenizer)`."
        )
    if name.endswith("_chat_template"):
        raise AttributeError(
            f"module {__name__!r} keeps no {name!r}: vendors' templates are not copied here. Read the model's own from "
            "`tokenizer.chat_template`."
        )
    if name.endswith("_schema"):
        raise AttributeError(
            f"module {__name__!r} keeps no {name!r}: Transformers reads response templates instead of schemas. Call "
            "`add_response_schema(tokenizer)`, which sets `tokenizer.response_template`."
        )
    return _lazy_getattr(name)


def __dir__() -> list[str]:
    return sorted({*_lazy_dir(), *_RESPONSE_TEMPLATES})
