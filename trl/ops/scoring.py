"""
The one door to a causal language model: which log-probability does it give the tokens of a batch?

`score_tokens` runs the backbone once and projects only the positions that are scored, chunk by chunk (`trl.ops.head`);
no tensor of [batch, length, vocabulary] ever exists. What a model does to its logits (scale, soft-capping) is read
from its config; a model whose forward is not "backbone, then head" is asked for its logits and pays for them.

The call goes through the model's own `__call__`, and that of its head, so that whatever wraps them (PEFT, DDP, FSDP,
DeepSpeed, accelerate's hooks) does its part.

Shapes: B rows, T tokens, D hidden size, V vocabulary, N scored tokens.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, logging

from .head import (
    OPTIONAL_OUTPUTS,
    LogitTransform,
    accumulation_dtype,
    default_chunk_size,
    maybe_gather_lm_head_ctx,
    token_objective,
    token_statistics,
)
from .layouts import (
    IGNORE_INDEX,
    LayoutChoice,
    ScoredPositions,
    choose_layout,
    find_backbone,
    find_scored_positions,
    is_packed,
    make_shared_prefix_masks,
    pack_padded,
    prepare_packed,
)
from .shared_prefix import Sight, lay_out

logger = logging.get_logger(__name__)

Objective = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ScoreRequest:
    """
    What a call of the model with `scoring=` is to compute; made by `score_tokens`.

    Args:
        temperature: divides the logits, after the model's own scale and soft-capping.
        outputs: any of `entropy`, `log_sum_sq_probs`, `mean_logits`, `is_top1`.
        objective: from log-probabilities to losses and their derivatives (`trl.losses.language_modeling`); with it,
            gradients are made in the forward pass and only `loss_sum` carries one.
        chunk_size: tokens projected at a time; `None` picks a size for the vocabulary.
        aux_mask: how often a token counts in the router loss of a mixture of experts, [B, T]; default: the attention
            mask.
        head_in_fp32: project in float32, autocast or not.
        positions: what to score, for a batch laid out anew; default: as the labels say.
        sight: which tokens see which, for rows that share a beginning.
    """

    temperature: float = 1.0
    outputs: tuple[str, ...] = ()
    objective: Objective | None = None
    chunk_size: int | None = None
    aux_mask: Tensor | None = None
    head_in_fp32: bool = False
    positions: ScoredPositions | None = None
    sight: Sight | None = None

    def __post_init__(self):
        unknown = set(self.outputs) - set(OPTIONAL_OUTPUTS)
        if unknown:
            raise ValueError(f"Unknown outputs {sorted(unknown)}; choose from {', '.join(OPTIONAL_OUTPUTS)}.")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}.")
        if self.objective is not None and not callable(self.objective):
            raise TypeError(
                f"objective must be a function of the log-probabilities, got {self.objective!r}; "
                "the known ones are in trl.losses.language_modeling.LANGUAGE_MODELING_LOSSES."
            )


@dataclass
class TokenScores(ModelOutput):
    """
    Scores of the tokens of a batch. A position that is not scored has 0 in every field.

    Position t belongs to token t + 1, so that a batch of [B, T] gives [B, T - 1] (with `shift_labels`: [B, T]).

    Args:
        loss_sum: sum of the objective over the scored tokens, scalar; differentiable. `None` without an objective.
        logps: log-probabilities of the labels, in nats; differentiable unless there is an objective.
        entropies: entropy of the prediction, in nats; differentiable unless there is an objective.
        log_sum_sq_probs: log of the sum of squared probabilities.
        mean_logits: mean of the logits over the vocabulary, after temperature.
        is_top1: whether the label is the most probable token.
        mask: whether the position is scored.
        aux_loss: load-balancing loss of a mixture of experts, scalar, if the model's config asks for it.
    """

    loss_sum: Tensor | None = None
    logps: Tensor | None = None
    entropies: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    mask: Tensor | None = None
    aux_loss: Tensor | None = None


def score_tokens(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    outputs: tuple[str, ...] = (),
    objective: Objective | None = None,
    layout: str = "auto",
    groups: Tensor | None = None,
    chunk_size: int | None = None,
    head_in_fp32: bool = False,
) -> TokenScores:
    """
    Score the labelled tokens of a batch.

    Args:
        model: causal language model, bare or wrapped (PEFT, DDP, FSDP, DeepSpeed, `torch.compile`).
        batch: inputs of the model with `labels` ([B, T], -100 where a token is not scored) or `shift_labels` (already
            moved by one), and `attention_mask` for padded rows, or `position_ids` that restart at 0 with every
            document for rows packed end to end.
        temperature: divides the logits.
        with_entropy: compute entropies; the same as `"entropy"` among the outputs.
        outputs: further statistics: `entropy`, `log_sum_sq_probs`, `mean_logits`, `is_top1`.
        objective: from log-probabilities to losses and derivatives; see `TokenScores.loss_sum`.
        layout: how to lay out a padded batch for the model: `"padded"` as it is, `"packed"` as one row without
            padding, `"shared_prefix"` with the common beginning of a group of rows computed once, `"auto"` whichever
            is cheapest for what the model can do. The numbers are the same. What was chosen, and why, is in the
            causal language model's `_layout_choice` afterwards.
        groups: int64, [B]; rows with the same number may share a beginning, such as a prompt. The beginning itself is
            found from the tokens. Default: no sharing.
        chunk_size: tokens projected at a time; `None` picks a size for the vocabulary.
        head_in_fp32: project in float32, autocast or not.

    Returns:
        The scores, in the shape of the batch.

    Raises:
        ValueError: if the batch has no labels, or the model cannot take the layout.
    """
    causal_lm = install_scoring(model)
    if with_entropy and "entropy" not in outputs:
        outputs = (*outputs, "entropy")
    inputs = {name: value for name, value in batch.items() if value is not None}
    if "labels" not in inputs and "shift_labels" not in inputs:
        raise ValueError("score_tokens needs `labels` or `shift_labels` in the batch, to know which tokens to score.")
    request = ScoreRequest(temperature, tuple(outputs), objective, chunk_size, head_in_fp32=head_in_fp32)

    causal_lm._layout_choice = choice = _choose(causal_lm, inputs, layout, groups)
    if is_packed(inputs):
        inputs, aux_mask = prepare_packed(causal_lm, inputs)
        request = replace(request, aux_mask=aux_mask)
    elif choice.name == "packed":
        inputs, positions = pack_padded(inputs)
        inputs, aux_mask = prepare_packed(causal_lm, inputs)
        request = replace(request, aux_mask=aux_mask, positions=positions)
    elif choice.name == "shared_prefix":
        laid_out = lay_out(inputs, *choice.sharing)
        positions = find_scored_positions(inputs, laid_out.mask_BT, laid_out.index_BT)
        inputs = laid_out.inputs
        request = replace(request, aux_mask=laid_out.weight_RW, positions=positions, sight=laid_out.sight)

    scores = model(**inputs, use_cache=False, scoring=request)
    if request.positions is None:
        length = (inputs.get("shift_labels") if "shift_labels" in inputs else inputs["labels"][:, 1:]).shape[1]
        scores = _drop_virtual_tokens(scores, length)
    return scores


def _choose(causal_lm: PreTrainedModel, inputs: dict[str, Any], layout: str, groups: Tensor | None) -> LayoutChoice:
    if is_packed(inputs):
        return LayoutChoice("packed", "The batch came as one row of documents")
    return choose_layout(causal_lm, inputs, layout, groups)


def _drop_virtual_tokens(scores: TokenScores, length: int) -> TokenScores:
    """Prompt tuning puts learned tokens before the row; they are not scored, and not part of the answer."""
    if scores.mask.shape[1] != length:
        for name, value in scores.items():
            if value.dim() == 2:
                scores[name] = value[:, -length:]
    return scores


# ---------------------------------------------------------------------------------------------------------------------
# Reaching the model


def find_causal_lm(model: nn.Module) -> PreTrainedModel:
    """The outermost Transformers model with an LM head, inside whatever wraps it."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None:
            return module
    raise ValueError(
        f"{type(model).__name__} holds no Transformers model with a language-modeling head "
        "(`get_output_embeddings()` is None), so it cannot score tokens. Load it with AutoModelForCausalLM, for example."
    )


def install_scoring(model: nn.Module) -> PreTrainedModel:
    """
    Let the causal language model inside `model` answer calls with `scoring=ScoreRequest(...)`.

    Every other call is the model's own. Installing twice does nothing. Install before `Accelerator.prepare`, which
    puts its autocast around the forward method that it finds.

    Args:
        model: causal language model, bare or wrapped.

    Returns:
        The bare causal language model.
    """
    causal_lm = find_causal_lm(model)
    if "_plain_forward" not in causal_lm.__dict__:
        if causal_lm.config.is_encoder_decoder:
            raise ValueError(
                f"{type(causal_lm).__name__} is an encoder-decoder; scoring is made for decoder-only language models."
            )
        causal_lm._is_backbone_and_head = _is_backbone_and_head(causal_lm)
        redirect_forward(causal_lm, "_plain_forward", _model_forward)
    causal_lm._has_virtual_tokens = _has_virtual_tokens(model, causal_lm)
    return causal_lm


def _has_virtual_tokens(model: nn.Module, causal_lm: nn.Module) -> bool:
    """Whether an adapter around the model puts learned tokens or keys before each row (prompt and prefix tuning)."""
    for module in model.modules():
        if module is causal_lm:
            return False
        adapter = getattr(module, "active_peft_config", None)
        if adapter is not None:
            return adapter.is_prompt_learning
    return False


def redirect_forward(module: nn.Module, name: str, function: Callable) -> None:
    """
    Make `function(module, *args, **kwargs)` the module's forward and keep the present one as attribute `name`.

    Bound to the instance, so that a deep copy is redirected to itself. The signature stays visible for those who
    inspect it (Trainer, generate), without `__wrapped__`, which accelerate would follow back past us.
    """
    plain = module.forward

    def forward(self, *args, **kwargs):
        return function(self, *args, **kwargs)

    forward.__name__, forward.__doc__ = "forward", plain.__doc__
    signature = inspect.signature(plain)
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if "self" not in signature.parameters:
        forward.__signature__ = signature.replace(parameters=[first, *signature.parameters.values()])
    setattr(module, name, plain)
    module.forward = types.MethodType(forward, module)


def _model_forward(self: PreTrainedModel, *args, scoring: ScoreRequest | None = None, **kwargs):
    if scoring is None:
        return self._plain_forward(*args, **kwargs)
    if args:  # only PEFT's prompt tuning and plain calls pass input_ids by position
        kwargs["input_ids"] = args[0]
    return run_scoring(self, scoring, **kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# Inside the model's forward


def run_scoring(
    model: PreTrainedModel,
    request: ScoreRequest,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    **inputs,
) -> TokenScores:
    """
    The scoring forward of a bare causal language model: backbone, selection of positions, fused head.

    Args:
        model: the causal language model.
        request: what to compute.
        labels: [B, T], -100 where a token is not scored.
        shift_labels: labels moved by one, [B, T]; takes precedence.
        inputs: the model's own inputs.

    Returns:
        The scores; see `TokenScores`.
    """
    inputs.pop("num_items_in_batch", None)
    inputs.pop("return_dict", None)
    if request.sight is not None:
        inputs["attention_mask"] = make_shared_prefix_masks(model, request.sight)
    head, backbone = _split(model)
    if head is None:
        hidden_BTD, outputs = _full_logits(model, inputs)
    else:
        if _wants_router_logits(model, inputs):
            inputs["output_router_logits"] = True
        outputs = backbone(**inputs, return_dict=True)
        hidden_BTD = outputs.last_hidden_state

    if request.positions is None:
        targets = shift_labels if shift_labels is not None else labels[:, 1:]
        hidden_BTD = hidden_BTD[:, : targets.shape[1]]
        targets = targets.to(hidden_BTD.device)
        mask = targets != IGNORE_INDEX
        hidden_ND, targets_N = hidden_BTD[mask], targets[mask]
    else:
        mask, targets_N = request.positions.mask, request.positions.targets_N.to(hidden_BTD.device)
        # Several tokens may be predicted at one position; the gradients of an embedding add up in a fixed order.
        hidden_ND = F.embedding(request.positions.index_N.to(hidden_BTD.device), hidden_BTD.flatten(0, 1))

    if head is None:
        transform = LogitTransform(temperature=request.temperature)  # the model has applied its own
        values = _score_with_module(nn.Identity(), hidden_ND, targets_N, transform, request)
    else:
        values = _score_hidden(head, hidden_ND, targets_N, logit_transform(model, request.temperature), request)
    return _to_scores(values, mask, _aux_loss(model, outputs, request, inputs.get("attention_mask")))


def _to_scores(values: dict[str, Tensor], mask: Tensor, aux_loss: Tensor | None) -> TokenScores:
    """Put the values of the scored tokens back at their positions."""

    def spread(values_N: Tensor | None) -> Tensor | None:
        if values_N is None:
            return None
        mask_here = mask.to(values_N.device)
        zeros = torch.zeros(mask.shape, dtype=values_N.dtype, device=values_N.device)
        return zeros.masked_scatter(mask_here, values_N)

    return TokenScores(
        loss_sum=values.get("loss_sum"),
        logps=spread(values["logps"]),
        entropies=spread(values.get("entropy")),
        log_sum_sq_probs=spread(values.get("log_sum_sq_probs")),
        mean_logits=spread(values.get("mean_logits")),
        is_top1=spread(values.get("is_top1")),
        mask=mask.to(values["logps"].device),
        aux_loss=aux_loss,
    )


@torch.compiler.disable  # the loop over chunks depends on the number of scored tokens, which differs in every batch
def _score_hidden(
    head: nn.Module, hidden_ND: Tensor, targets_N: Tensor, transform: LogitTransform, request: ScoreRequest
) -> dict[str, Tensor]:
    """Score hidden states with the fused head where the head is a plain linear map, through the module otherwise."""
    if not _is_plain_linear(head):
        return _score_with_module(head, hidden_ND, targets_N, transform, request)
    if "_plain_forward" not in head.__dict__:
        redirect_forward(head, "_plain_forward", _head_forward)
    if _is_dtensor(head.weight) and not _is_fsdp(head):
        # Tensor parallelism splits inputs and outputs in hooks made for logits; call past them.
        return _head_forward(head, hidden_ND, targets_N, scoring=(transform, request))
    return head(hidden_ND, targets_N, scoring=(transform, request))


def _head_forward(self: nn.Module, hidden_ND: Tensor, *args, scoring=None, **kwargs):
    """The head's forward: with `scoring`, straight from hidden states to scores, inside the head's own hooks."""
    if scoring is None:
        return self._plain_forward(hidden_ND, *args, **kwargs)
    transform, request = scoring
    weight_VD, bias_V = _full(self.weight), _full(self.bias)
    hidden_ND, targets_N = hidden_ND.to(weight_VD.device), args[0].to(weight_VD.device)
    compute_dtype = weight_VD.dtype
    if request.head_in_fp32:
        compute_dtype = torch.float32
    elif torch.is_autocast_enabled(hidden_ND.device.type) and compute_dtype == torch.float32:
        compute_dtype = torch.get_autocast_dtype(hidden_ND.device.type)
    with maybe_gather_lm_head_ctx(weight_VD, bias_V):
        arguments = (hidden_ND, weight_VD, bias_V, targets_N, transform)
        options = (request.outputs, request.chunk_size, compute_dtype)
        if request.objective is None:
            return token_statistics(*arguments, *options)
        return token_objective(*arguments, request.objective, *options)


def _score_with_module(
    head: nn.Module, hidden_ND: Tensor, targets_N: Tensor, transform: LogitTransform, request: ScoreRequest
) -> dict[str, Tensor]:
    """
    The same numbers for any module as head (LoRA on the head, a quantized head): chunk by chunk, recomputed by
    checkpointing, with autograd's own derivatives.
    """
    size = request.chunk_size
    if not size:
        vocab_size = getattr(head, "out_features", None) or hidden_ND.shape[-1]
        size = default_chunk_size(vocab_size, hidden_ND.device)

    def score(hidden_CD: Tensor, targets_C: Tensor) -> dict[str, Tensor]:
        logits_CV = head(hidden_CD)
        logits_CV = transform(logits_CV.to(accumulation_dtype(logits_CV.dtype)))
        return _statistics_of_logits(logits_CV, targets_C.to(logits_CV.device), request.outputs)

    pieces = []
    for hidden_CD, targets_C in zip(hidden_ND.split(size), targets_N.split(size), strict=True):
        if torch.is_grad_enabled():
            pieces.append(checkpoint(score, hidden_CD, targets_C, use_reentrant=False))
        else:
            pieces.append(score(hidden_CD, targets_C))
    values = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
    if request.objective is not None:
        losses_N, derivatives_N = request.objective(values["logps"].detach())
        # The value of the loss with the derivative that the objective states.
        surrogate_N = (values["logps"] - values["logps"].detach()) * derivatives_N + losses_N
        values = {name: value.detach() for name, value in values.items()}
        values["loss_sum"] = surrogate_N.sum()
    return values


def _statistics_of_logits(logits_CV: Tensor, targets_C: Tensor, outputs: tuple[str, ...]) -> dict[str, Tensor]:
    logps_CV = logits_CV.log_softmax(dim=-1)
    values = {"logps": logps_CV.gather(1, targets_C.unsqueeze(1)).squeeze(1)}
    if "entropy" in outputs:
        values["entropy"] = -(logps_CV.exp() * logps_CV).sum(dim=-1)
    if "log_sum_sq_probs" in outputs:
        values["log_sum_sq_probs"] = (2 * logps_CV.detach()).logsumexp(dim=-1)
    if "mean_logits" in outputs:
        values["mean_logits"] = logits_CV.detach().mean(dim=-1)
    if "is_top1" in outputs:
        values["is_top1"] = logits_CV.argmax(dim=-1) == targets_C
    return values


# ---------------------------------------------------------------------------------------------------------------------
# What kind of model is it


def _split(model: PreTrainedModel) -> tuple[nn.Module | None, nn.Module | None]:
    """The head and the backbone; `None` where the model is more than one after the other."""
    if model._is_backbone_and_head:
        return _active_module(model.get_output_embeddings()), find_backbone(model)
    logger.warning_once(
        f"{type(model).__name__} is not a backbone followed by a linear head: its full logits are computed, "
        "which takes more memory."
    )
    return None, None


def _is_backbone_and_head(model: PreTrainedModel) -> bool:
    """
    Whether the model's logits are `logit_transform(head(backbone(inputs)))`.

    Nothing but the two may have parameters, and where weights are at hand the model is asked: two tokens go through
    its own forward, and its logits are compared with those of the head on the hidden states seen on the way.
    """
    head, backbone = model.get_output_embeddings(), find_backbone(model)
    known = (head, backbone)
    if backbone is model or not any(child is head for child in model.children()):
        return False
    for child in model.children():
        if not any(child is module for module in known) and any(True for _ in child.parameters()):
            return False
    if any(
        parameter.is_meta or _is_dtensor(parameter) or hasattr(parameter, "ds_id") for parameter in model.parameters()
    ):
        return True  # sharded: a forward of one part would wait for the other processes
    return _logits_agree(model, head, backbone)


@torch.no_grad()
def _logits_agree(model: PreTrainedModel, head: nn.Module, backbone: nn.Module) -> bool:
    seen = []
    hook = backbone.register_forward_hook(lambda module, args, outputs: seen.append(outputs))
    device = model.get_input_embeddings().weight.device
    input_ids = torch.tensor([[0, 1]], device=device)
    try:
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            logits = model(input_ids=input_ids, use_cache=False, return_dict=True).logits
        transform = replace(logit_transform(model), temperature=1.0)
        expected = transform(head(seen[0].last_hidden_state.to(logits.device)))
    except Exception as error:  # a model that cannot take two bare tokens is judged by its parts alone
        logger.debug(f"{type(model).__name__} could not be asked for the logits of two tokens: {error}")
        return True
    finally:
        hook.remove()
    return logits.shape == expected.shape and torch.allclose(logits.float(), expected.float(), rtol=0.05, atol=0.05)


def _active_module(head: nn.Module) -> nn.Module:
    """The module that computes: PEFT keeps a trained copy of a head beside the original (`modules_to_save`)."""
    if not (hasattr(head, "modules_to_save") and hasattr(head, "original_module")):
        return head
    active = [name for name in getattr(head, "active_adapters", []) if name in head.modules_to_save]
    if getattr(head, "disable_adapters", False) or not active:
        return head.original_module
    return head.modules_to_save[active[0]]


def _is_plain_linear(head: nn.Module) -> bool:
    return (
        isinstance(head, nn.Linear)
        and type(head).forward is nn.Linear.forward
        and head.weight.is_floating_point()
        and not hasattr(head, "parametrizations")
    )


def _is_dtensor(tensor: Tensor | None) -> bool:
    return tensor is not None and hasattr(tensor, "full_tensor")


def _is_fsdp(module: nn.Module) -> bool:
    """Whether the module is sharded on its own by FSDP2, whose hooks gather its parameters."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def _full(tensor: Tensor | None) -> Tensor | None:
    return tensor.full_tensor() if _is_dtensor(tensor) else tensor


def _full_logits(model: PreTrainedModel, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
    outputs = model._plain_forward(**inputs, return_dict=True)
    return outputs.logits, outputs


# Config fields that scale logits, in the order in which they are looked for.
_SCALE_FIELDS = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
_SOFTCAP_FIELDS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def logit_transform(model: PreTrainedModel, temperature: float = 1.0) -> LogitTransform:
    """The scale and the soft-capping that the model's config asks for, followed by the temperature."""
    config = model.config.get_text_config()
    scale = 1.0
    for name in _SCALE_FIELDS:
        value = getattr(config, name, None)
        if value is not None:
            divides = name == "logits_scaling" and not config.model_type.startswith("hyperclovax")
            scale = 1.0 / value if divides else float(value)
            break
    softcap = next((value for name in _SOFTCAP_FIELDS if (value := getattr(config, name, None))), None)
    return LogitTransform(scale, softcap, temperature)


# ---------------------------------------------------------------------------------------------------------------------
# Mixtures of experts


def _wants_router_logits(model: PreTrainedModel, inputs: dict[str, Any]) -> bool:
    asked = inputs.get("output_router_logits")
    if asked is None:
        asked = getattr(model.config.get_text_config(), "output_router_logits", False)
    return bool(asked)


def _aux_loss(
    model: PreTrainedModel, outputs: Any, request: ScoreRequest, attention_mask: Tensor | None
) -> Tensor | None:
    """The load-balancing loss (https://huggingface.co/papers/2101.03961) over the router logits of all layers."""
    router_logits = getattr(outputs, "router_logits", None)
    if not router_logits:
        return None
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model.config.get_text_config()
    num_experts = _first(config, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    top_k = _first(config, "num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token")
    mask = request.aux_mask if request.aux_mask is not None else attention_mask
    if mask is not None and getattr(mask, "dim", lambda: 0)() != 2:
        mask = None
    return load_balancing_loss_func(tuple(router_logits), num_experts, top_k, mask)


def _first(config: Any, *names: str) -> int:
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    raise ValueError(f"{type(config).__name__} names neither of {', '.join(names)}; set router_aux_loss_coef=0.")
