"""Load-balancing loss of mixture-of-experts models."""

from __future__ import annotations

from transformers import PreTrainedModel


def resolve_router_aux_loss(model: PreTrainedModel, coef: float | None) -> tuple[float, bool]:
    """
    The weight of the router's auxiliary loss, and whether it is computed at all.

    The model's config is brought into line, so that a checkpoint says what it was trained with.

    Args:
        model: the policy.
        coef: weight asked for; None takes the model config's own.

    Returns:
        The weight, and True where the model has routers and the weight is not 0.

    Raises:
        ValueError: a weight for a model without routers.
    """
    config = model.config.get_text_config()
    has_routers = hasattr(config, "output_router_logits")
    if coef is None:
        coef = getattr(config, "router_aux_loss_coef", None) or 0.0
    elif coef != 0 and not has_routers:
        raise ValueError(
            f"`router_aux_loss_coef={coef}`, but {type(model).__name__} has no expert routers (its config has no "
            "`output_router_logits`). Remove the option or set it to 0."
        )
    enabled = has_routers and coef != 0
    if has_routers:
        config.output_router_logits = enabled
        config.router_aux_loss_coef = coef
    return coef, enabled
