"""
The LM head and what follows it, fused: hidden states in, log-probabilities of given tokens out.

The logits of all positions are the largest tensor of language-model training by far. Here they exist for one chunk of
tokens at a time: two buffers of [chunk, vocabulary] are reused from chunk to chunk, whatever the number of tokens.

Two ways through, both exact:

- `token_statistics`: log-probabilities and entropies are differentiable; the backward pass projects again.
- `token_objective`: the derivative of the loss with respect to each log-probability is known (see
  `trl.losses.language_modeling`), so that the gradients of the hidden states and of the head are made in the forward
  pass, and the backward pass only scales them. Nothing is projected twice.

Shapes: N tokens, C tokens of one chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

OPTIONAL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

# Upper bound on the tokens of one chunk; also what a chunk size of 0 or None never exceeds.
TOKEN_CHUNK_SIZE = 4096
# Columns of a half-precision head that are converted at a time where the device has no product with float32 output.
VOCAB_CHUNK_SIZE = 32768
# Size of one [chunk, vocabulary] buffer when the caller names no chunk size.
_BUFFER_BYTES = {"cpu": 96 * 2**20, "cuda": 512 * 2**20}


@dataclass(frozen=True)
class LogitTransform:
    """
    What happens to the head's output before the softmax: `softcap * tanh(logits * scale / softcap) / temperature`.

    Args:
        scale: factor of the logits.
        softcap: bound c of the soft-capping c * tanh(x / c), applied after the scale; `None` for none.
        temperature: divides the logits, last.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def apply_(self, x_CV: Tensor, slope_CV: Tensor | None = None) -> None:
        """Transform in place; `slope_CV`, where given, receives the derivative of the soft-capping."""
        if self.softcap is None:
            if self.scale != self.temperature:
                x_CV.mul_(self.scale / self.temperature)
            return
        x_CV.mul_(self.scale / self.softcap).tanh_()
        if slope_CV is not None:
            torch.mul(x_CV, x_CV, out=slope_CV)
            slope_CV.neg_().add_(1.0)
        x_CV.mul_(self.softcap / self.temperature)

    def __call__(self, logits: Tensor) -> Tensor:
        """The same, out of place and differentiable."""
        logits = logits * self.scale if self.scale != 1.0 else logits
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits / self.temperature if self.temperature != 1.0 else logits


def default_chunk_size(vocab_size: int, device: torch.device) -> int:
    """Tokens per chunk such that one float32 buffer of [chunk, vocabulary] stays within the device's budget."""
    budget = _BUFFER_BYTES.get(device.type, _BUFFER_BYTES["cuda"])
    return max(16, min(TOKEN_CHUNK_SIZE, budget // (4 * vocab_size)))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for everything but float64 (which tests use)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def maybe_gather_lm_head_ctx(*params: torch.nn.Parameter | None) -> contextlib.AbstractContextManager:
    """
    Context in which parameters that DeepSpeed ZeRO-3 has partitioned are whole; does nothing for any other.

    Inside the head's forward they are whole already, and DeepSpeed refuses to free what a running module holds.

    Args:
        *params: the head's weight and bias; `None` is skipped.
    """
    partitioned = [
        param
        for param in params
        if param is not None and hasattr(param, "ds_id") and not getattr(param, "ds_active_sub_modules", None)
    ]
    if not partitioned:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=None)


@contextlib.contextmanager
def _without_autocast(device: torch.device) -> Iterator[None]:
    """The precision of every product is chosen here, by hand; autocast would round the sums that must not be."""
    with torch.autocast(device.type, enabled=False):
        yield


@functools.cache
def _has_mixed_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device multiplies half-precision matrices into float32 without rounding in between (CUDA does)."""
    operand, out = torch.ones(16, 16, dtype=dtype, device=device), torch.empty(16, 16, device=device)
    try:
        torch.mm(operand, operand.t(), out_dtype=torch.float32, out=out)
    except (RuntimeError, TypeError):
        return False
    return bool((out == 16).all())


class _Head:
    """Products with the head's weight: half-precision operands, sums and results in float32."""

    def __init__(self, weight_VD: Tensor, bias_V: Tensor | None, dtype: torch.dtype):
        self.out_dtype = accumulation_dtype(dtype)
        self.weight_VD = weight_VD.detach().to(dtype)
        self.bias_V = None if bias_V is None else bias_V.detach().to(self.out_dtype)
        self.vocab_size = weight_VD.shape[0]
        self.native = dtype == self.out_dtype
        self.mixed = not self.native and _has_mixed_products(weight_VD.device, dtype)

    def _column_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, self.vocab_size, VOCAB_CHUNK_SIZE):
            columns = slice(start, start + VOCAB_CHUNK_SIZE)
            yield columns, self.weight_VD[columns].to(self.out_dtype)

    def project(self, hidden_CD: Tensor, out_CV: Tensor) -> None:
        if self.native:
            torch.mm(hidden_CD, self.weight_VD.t(), out=out_CV)
        elif self.mixed:
            torch.mm(hidden_CD, self.weight_VD.t(), out_dtype=self.out_dtype, out=out_CV)
        else:
            hidden_CD = hidden_CD.to(self.out_dtype)
            for columns, block_vD in self._column_blocks():
                torch.mm(hidden_CD, block_vD.t(), out=out_CV[:, columns])
        if self.bias_V is not None:
            out_CV.add_(self.bias_V)

    def hidden_grad(self, grad_CV: Tensor) -> Tensor:
        if self.native:
            return grad_CV @ self.weight_VD
        if self.mixed:
            return torch.mm(grad_CV.to(self.weight_VD.dtype), self.weight_VD, out_dtype=self.out_dtype)
        total_CD = grad_CV.new_zeros(grad_CV.shape[0], self.weight_VD.shape[1])
        for columns, block_vD in self._column_blocks():
            total_CD.addmm_(grad_CV[:, columns], block_vD)
        return total_CD

    def add_weight_grad(self, total_VD: Tensor, grad_CV: Tensor, hidden_CD: Tensor) -> None:
        if self.mixed:
            product_VD = torch.mm(grad_CV.to(hidden_CD.dtype).t(), hidden_CD, out_dtype=self.out_dtype)
            total_VD.add_(product_VD)
        else:
            total_VD.addmm_(grad_CV.t(), hidden_CD.to(self.out_dtype))


class _Chunk:
    """
    One chunk of tokens between projection and gradient, in two reused buffers.

    After `load`, `x` holds the logits minus their maximum, and after `statistics` `e` holds their exponentials.
    """

    def __init__(self, head: _Head, transform: LogitTransform, size: int, device: torch.device, two_buffers: bool):
        self.head, self.transform = head, transform
        shape = (size, head.vocab_size)
        self.x_buffer = torch.empty(shape, dtype=head.out_dtype, device=device)
        self.e_buffer = torch.empty_like(self.x_buffer) if two_buffers else self.x_buffer
        self.slope_buffer = None

    def load(self, hidden_CD: Tensor, targets_C: Tensor, need_slope: bool) -> None:
        """Project, transform, subtract the maximum."""
        rows = hidden_CD.shape[0]
        self.x, self.e, self.slope = self.x_buffer[:rows], self.e_buffer[:rows], None
        if need_slope and self.transform.softcap is not None:
            if self.slope_buffer is None:
                self.slope_buffer = torch.empty_like(self.x_buffer)
            self.slope = self.slope_buffer[:rows]
        self.index = targets_C.unsqueeze(1)
        self.head.project(hidden_CD, self.x)
        self.transform.apply_(self.x, self.slope)

    def exponentiate(self) -> Tensor:
        """`x` becomes x - max x, `e` its exponential; returns the target's value of `x`."""
        self.max = self.x.amax(dim=-1)
        self.x.sub_(self.max.unsqueeze(1))
        target = self.x.gather(1, self.index).squeeze(1)
        torch.exp(self.x, out=self.e)
        self.sum = self.e.sum(dim=-1)
        return target

    def is_top1(self) -> Tensor:
        """Whether the target's logit is the maximum, and the first of its kind."""
        is_top1 = self.x.gather(1, self.index).squeeze(1) == self.x.amax(dim=-1)
        candidates = is_top1.nonzero().squeeze(1)
        if len(candidates):
            is_top1[candidates] = self.x[candidates].argmax(dim=-1) == self.index[candidates, 0]
        return is_top1

    def statistics(self, outputs: tuple[str, ...]) -> dict[str, Tensor]:
        """Log-probabilities and the named statistics; leaves `e`, but not `x`, intact for `to_logit_grad_`."""
        values = {}
        if "mean_logits" in outputs:
            values["mean_logits"] = self.x.mean(dim=-1)
        if "is_top1" in outputs:
            values["is_top1"] = self.is_top1()
        target = self.exponentiate()
        log_sum = self.sum.log()
        values["logps"] = target - log_sum
        if "entropy" in outputs:
            values["entropy"] = log_sum - self.x.mul_(self.e).sum(dim=-1) / self.sum
        if "log_sum_sq_probs" in outputs:
            values["log_sum_sq_probs"] = torch.mul(self.e, self.e, out=self.x).sum(dim=-1).log() - 2 * log_sum
        return values

    def to_logit_grad_(self, grad_logps: Tensor | None, grad_entropy: Tensor | None, entropy: Tensor | None) -> Tensor:
        """
        The gradient of the head's raw output, in place of the buffers.

        d logp / d x_j = [j is the target] - p_j and d H / d x_j = -p_j (log p_j + H).
        """
        probs = self.e.div_(self.sum.unsqueeze(1))
        if grad_entropy is None:
            grad = probs.mul_(grad_logps.neg().unsqueeze(1))
        else:
            grad = self.x.add_((entropy - self.sum.log()).unsqueeze(1)).mul_(grad_entropy.neg().unsqueeze(1))
            if grad_logps is not None:
                grad.sub_(grad_logps.unsqueeze(1))
            grad.mul_(probs)
        if grad_logps is not None:
            grad.scatter_add_(1, self.index, grad_logps.unsqueeze(1))
        if self.slope is not None:
            grad.mul_(self.slope)
        factor = self.transform.scale / self.transform.temperature
        return grad.mul_(factor) if factor != 1.0 else grad


class _Gradients:
    """Accumulators in float32 for those of hidden states, weight and bias that ask for a gradient."""

    def __init__(self, needed: tuple[bool, bool, bool], hidden_ND: Tensor, weight_VD: Tensor, dtype: torch.dtype):
        need_hidden, need_weight, need_bias = needed
        device = hidden_ND.device
        self.hidden = torch.empty_like(hidden_ND) if need_hidden else None
        self.weight = torch.zeros(weight_VD.shape, dtype=dtype, device=device) if need_weight else None
        self.bias = torch.zeros(weight_VD.shape[0], dtype=dtype, device=device) if need_bias else None

    def add(self, head: _Head, rows: slice, grad_CV: Tensor, hidden_CD: Tensor) -> None:
        if self.hidden is not None:
            self.hidden[rows] = head.hidden_grad(grad_CV)
        if self.weight is not None:
            head.add_weight_grad(self.weight, grad_CV, hidden_CD)
        if self.bias is not None:
            self.bias += grad_CV.sum(dim=0)


def _chunks(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _prepare(hidden_ND: Tensor, weight_VD: Tensor, chunk_size: int | None, compute_dtype: torch.dtype | None):
    """The chunk's size in tokens and the precision of the products' operands."""
    if not chunk_size:
        chunk_size = default_chunk_size(weight_VD.shape[0], hidden_ND.device)
    return max(1, min(chunk_size, hidden_ND.shape[0])), compute_dtype or weight_VD.dtype


def _empty_outputs(hidden_ND: Tensor, outputs: tuple[str, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    shape, device = hidden_ND.shape[:1], hidden_ND.device
    values = {name: torch.empty(shape, dtype=dtype, device=device) for name in ("logps", *outputs)}
    if "is_top1" in outputs:
        values["is_top1"] = torch.empty(shape, dtype=torch.bool, device=device)
    return values


class ChunkedLogProbFunction(torch.autograd.Function):
    """
    Log-probabilities of given tokens from hidden states, in chunks, with recomputation in the backward pass.

    The log-probabilities and the entropy are differentiable; the other outputs are not. A target below 0 is not
    scored: it gives 0 in every output and no gradient.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int | None,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OPTIONAL_OUTPUTS,
        compute_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """
        Args:
            hidden: hidden states, [N, D].
            weight: the head's weight, [V, D].
            bias: the head's bias, [V], or `None`.
            targets: token ids, [N]; below 0 where a position is not scored.
            temperature: divides the logits.
            chunk_size: tokens per chunk; `None` or 0 picks one for the vocabulary.
            final_logit_softcapping: bound of the soft-capping; default: none.
            logit_scale: factor of the logits, before the soft-capping.
            outputs: which of `entropy`, `log_sum_sq_probs`, `mean_logits`, `is_top1` to compute; default: all.
            compute_dtype: precision of the products' operands; default: the weight's.

        Returns:
            log-probabilities, entropy, log of the sum of squared probabilities, mean logit and `is_top1`, each [N]
            and `None` where not asked for. Floating-point outputs are float32.
        """
        transform = LogitTransform(logit_scale, final_logit_softcapping, temperature)
        size, dtype = _prepare(hidden, weight, chunk_size, compute_dtype)
        ignored = targets < 0
        safe_targets = targets.masked_fill(ignored, 0)
        values = _empty_outputs(hidden, outputs, accumulation_dtype(dtype))
        with torch.no_grad(), _without_autocast(hidden.device):
            head = _Head(weight, bias, dtype)
            hidden_ND = hidden.detach().to(dtype)
            two_buffers = "entropy" in outputs or "log_sum_sq_probs" in outputs
            chunk = _Chunk(head, transform, size, hidden.device, two_buffers)
            for rows in _chunks(hidden.shape[0], size):
                chunk.load(hidden_ND[rows], safe_targets[rows], need_slope=False)
                for name, value in chunk.statistics(outputs).items():
                    values[name][rows] = value
        for value in values.values():
            value.masked_fill_(ignored, 0)

        ctx.transform, ctx.size, ctx.dtype = transform, size, dtype
        # A parameter is kept by reference, so that ZeRO-3 may partition it until the backward pass gathers it again,
        # and activation offloading leaves it where it is.
        ctx.parameters = [tensor if tensor is not None and tensor.is_leaf else None for tensor in (weight, bias)]
        derived = [
            None if kept is not None else tensor for kept, tensor in zip(ctx.parameters, (weight, bias), strict=True)
        ]
        ctx.save_for_backward(hidden, targets, values.get("entropy"), *derived)
        others = [values.get(name) for name in ("log_sum_sq_probs", "mean_logits", "is_top1")]
        ctx.mark_non_differentiable(*(value for value in others if value is not None))
        ctx.set_materialize_grads(False)
        return values["logps"], values.get("entropy"), *others

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_):
        hidden, targets, entropy, *derived = ctx.saved_tensors
        no_gradients = (None,) * 10
        if grad_logprobs is None and grad_entropy is None:
            return no_gradients
        weight, bias = (
            kept if kept is not None else tensor for kept, tensor in zip(ctx.parameters, derived, strict=True)
        )
        ignored = targets < 0
        safe_targets = targets.masked_fill(ignored, 0)
        grad_logps, grad_entropy = (
            None if grad is None else grad.to(accumulation_dtype(ctx.dtype)).masked_fill(ignored, 0)
            for grad in (grad_logprobs, grad_entropy)
        )
        with maybe_gather_lm_head_ctx(weight, bias), _without_autocast(hidden.device):
            head = _Head(weight, bias, ctx.dtype)
            hidden_ND = hidden.to(ctx.dtype)
            chunk = _Chunk(head, ctx.transform, ctx.size, hidden.device, two_buffers=grad_entropy is not None)
            gradients = _Gradients(ctx.needs_input_grad[:3], hidden, weight, head.out_dtype)
            for rows in _chunks(hidden.shape[0], ctx.size):
                chunk.load(hidden_ND[rows], safe_targets[rows], need_slope=True)
                chunk.exponentiate()
                grad_CV = chunk.to_logit_grad_(
                    None if grad_logps is None else grad_logps[rows],
                    None if grad_entropy is None else grad_entropy[rows],
                    None if grad_entropy is None else entropy[rows],
                )
                gradients.add(head, rows, grad_CV, hidden_ND[rows])
        return (
            gradients.hidden,
            None if gradients.weight is None else gradients.weight.to(weight.dtype),
            None if gradients.bias is None else gradients.bias.to(bias.dtype),
            *no_gradients[3:],
        )


class ChunkedObjectiveFunction(torch.autograd.Function):
    """
    The sum of an objective over the tokens, whose gradients are made in the forward pass, chunk by chunk.

    Inputs as of `ChunkedLogProbFunction`, and `needs_grad`, which says for hidden states, weight and bias whether a
    gradient is wanted at all. Every output but the first is a constant.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        objective: Callable[[Tensor], tuple[Tensor, Tensor]],
        transform: LogitTransform,
        chunk_size: int | None,
        outputs: tuple[str, ...],
        compute_dtype: torch.dtype | None,
        needs_grad: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, ...]:
        size, dtype = _prepare(hidden, weight, chunk_size, compute_dtype)
        values = _empty_outputs(hidden, outputs, accumulation_dtype(dtype))
        loss_sum = torch.zeros((), dtype=accumulation_dtype(dtype), device=hidden.device)
        with torch.no_grad(), _without_autocast(hidden.device):
            head = _Head(weight, bias, dtype)
            hidden_ND = hidden.detach().to(dtype)
            two_buffers = "entropy" in outputs or "log_sum_sq_probs" in outputs
            chunk = _Chunk(head, transform, size, hidden.device, two_buffers)
            gradients = _Gradients(needs_grad, hidden, weight, head.out_dtype)
            for rows in _chunks(hidden.shape[0], size):
                chunk.load(hidden_ND[rows], targets[rows], need_slope=any(needs_grad))
                for name, value in chunk.statistics(outputs).items():
                    values[name][rows] = value
                losses, derivatives = objective(values["logps"][rows])
                loss_sum += losses.sum()
                if any(needs_grad):
                    gradients.add(head, rows, chunk.to_logit_grad_(derivatives, None, None), hidden_ND[rows])
        ctx.gradients, ctx.dtypes = gradients, (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        results = [values.get(name) for name in ("logps", *OPTIONAL_OUTPUTS)]
        ctx.mark_non_differentiable(*(value for value in results if value is not None))
        ctx.set_materialize_grads(False)
        return loss_sum, *results

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor | None, *_):
        if grad_loss is None:
            return (None,) * 10
        if ctx.gradients is None:
            raise RuntimeError(
                "The gradients of this loss were handed out by an earlier backward pass. "
                "Pass retain_graph=True to the first one, or compute the loss again."
            )
        gradients = ctx.gradients
        keep_graph = _graph_is_kept()
        if not keep_graph:
            ctx.gradients = None  # the buffers become the gradients, no copy of [V, D] is made
        scaled = []
        for gradient, dtype in zip((gradients.hidden, gradients.weight, gradients.bias), ctx.dtypes, strict=True):
            if gradient is not None:
                gradient = gradient * grad_loss if keep_graph else gradient.mul_(grad_loss)
                gradient = gradient.to(dtype)
            scaled.append(gradient)
        return *scaled, *(None,) * 7


def _graph_is_kept() -> bool:
    """Whether the running backward pass was called with `retain_graph=True`; yes, where PyTorch does not tell."""
    query = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if query is None else query()


def token_statistics(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    transform: LogitTransform,
    outputs: tuple[str, ...] = (),
    chunk_size: int | None = None,
    compute_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """
    Log-probabilities (`logps`) of the targets and the named statistics, [N] each; differentiable.

    Arguments as of `ChunkedLogProbFunction.forward`; `transform` says what is done to the logits.
    """
    results = ChunkedLogProbFunction.apply(
        hidden_ND,
        weight_VD,
        bias_V,
        targets_N,
        transform.temperature,
        chunk_size,
        transform.softcap,
        transform.scale,
        tuple(outputs),
        compute_dtype,
    )
    named = zip(("logps", *OPTIONAL_OUTPUTS), results, strict=True)
    return {name: value for name, value in named if value is not None}


def token_objective(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    transform: LogitTransform,
    objective: Callable[[Tensor], tuple[Tensor, Tensor]],
    outputs: tuple[str, ...] = (),
    chunk_size: int | None = None,
    compute_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """
    The objective summed over all tokens (`loss_sum`, differentiable), and `logps` and the named statistics as constants.

    Args:
        objective: maps log-probabilities to losses and to the derivatives of the losses.

    The other arguments are those of `token_statistics`; every target must be a token id.
    """
    needs_grad = tuple(
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (hidden_ND, weight_VD, bias_V)
    )
    loss_sum, *results = ChunkedObjectiveFunction.apply(
        hidden_ND,
        weight_VD,
        bias_V,
        targets_N,
        objective,
        transform,
        chunk_size,
        tuple(outputs),
        compute_dtype,
        needs_grad,
    )
    named = zip(("logps", *OPTIONAL_OUTPUTS), results, strict=True)
    return {"loss_sum": loss_sum, **{name: value for name, value in named if value is not None}}
