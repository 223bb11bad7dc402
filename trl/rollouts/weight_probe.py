"""
Proof that an engine samples with the weights that the trainer holds.

An update that reports success may still leave a part of the old weights behind: a packed copy, a tied head, a cache. So
after every update the engine is asked for the log-probs of a few fixed tokens, and they are held against the trainer's.
For debugging, every layer is applied to a fixed vector on both sides besides, which names the layer that is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.utils import logging

from ..models.weight_export import base_model_of, has_tied_head, iter_weights
from ..ops.scoring import score_tokens
from .transformers_engine import context_length, evaluation_mode

logger = logging.get_logger(__name__)

VerifyLevel = Literal["off", "probe", "full"]
VERIFY_LEVELS = ("off", "probe", "full")

# Tokens of the longer of the two sequences. Both sides compute the probe after every update, so it is short.
LONGEST_PROBE = 24
# Largest mean difference in log-probs, in nats, between two correct computations in a precision. What is measured: 1e-6
# to 3e-5 in float32 (TF32 matrices on a GPU: up to 1e-3), 0.02 to 0.1 in bfloat16.
TOLERANCES = {torch.float32: 2e-3, torch.float16: 0.06, torch.bfloat16: 0.4}
# Of single layers, relative to the length of their output.
LAYER_TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}

Fingerprints = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Probe:
    """
    What both sides score.

    Args:
        sequences: token ids.
        tolerance: largest mean difference of log-probs, in nats.
        layer_tolerance: largest difference of a layer's output, relative to its length.
        temperature: that the engine's log-probs are at.
    """

    sequences: tuple[tuple[int, ...], ...]
    tolerance: float
    layer_tolerance: float
    temperature: float = 1.0


def make_probe(
    model: nn.Module,
    dtypes: Iterable[torch.dtype],
    special_ids: Iterable[int] = (),
    temperature: float = 1.0,
    longest: int | None = None,
) -> Probe:
    """
    Two sequences of tokens from all over the vocabulary, always the same for a model.

    Args:
        model: the model, not wrapped.
        dtypes: that trainer and engine compute in; the coarsest one decides the tolerance.
        special_ids: tokens that stand for something else, such as an image.
        temperature: that the engine's log-probs are at.
        longest: most tokens the engine takes.
    """
    vocab_size = model.get_input_embeddings().weight.shape[0]
    limits = [LONGEST_PROBE, *(limit - 1 for limit in (longest, context_length(model)) if limit)]
    generator = torch.Generator().manual_seed(0)
    special = set(special_ids)
    drawn = torch.randint(vocab_size, (4 * LONGEST_PROBE,), generator=generator).tolist()
    ids = [token for token in drawn if token not in special]
    length = min(limits)
    sequences = (tuple(ids[:length]), tuple(ids[length : length + max(2, length // 2)]))
    coarsest = max(dtypes, key=lambda dtype: TOLERANCES.get(dtype, 0.4))
    return Probe(sequences, TOLERANCES.get(coarsest, 0.4), LAYER_TOLERANCES.get(coarsest, 3e-2), temperature)


def trainer_logps(model: nn.Module, accelerator: Accelerator, probe: Probe) -> list[list[float]]:
    """Log-probs of a probe's tokens, each from the second on, by the model under training. All processes together."""
    width = max(map(len, probe.sequences))
    ids = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in probe.sequences])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in probe.sequences])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
    with torch.no_grad(), evaluation_mode(model), accelerator.autocast():
        logps = score_tokens(model, batch, temperature=probe.temperature, layout="padded").logps
    return [row[: len(ids) - 1] for row, ids in zip(logps.float().tolist(), probe.sequences, strict=True)]


def verify_weights(
    model: nn.Module,
    accelerator: Accelerator,
    probe: Probe,
    score: Callable[[Sequence[Sequence[int]]], list[list[float]]],
    repair: Callable[[], None],
    where: str,
    fingerprints: Callable[[], Fingerprints] | None = None,
) -> float:
    """
    Hold an engine against the trainer; where they differ, repair it once. All processes call this together.

    Args:
        model: as the trainer holds it.
        accelerator: the trainer's.
        probe: what is scored.
        score: log-probs of given sequences by the engine, each token from the second on, the same on all processes.
        repair: gives the engine its weights once more.
        where: names the engine in messages.
        fingerprints: of the engine's layers, for a full check; see `compare_fingerprints`.

    Returns:
        Mean difference of the log-probs, in nats.

    Raises:
        RuntimeError: the engine is still wrong after the repair.
    """
    expected = trainer_logps(model, accelerator, probe)

    def look() -> tuple[float, str | None]:
        mean, largest = difference(expected, score(probe.sequences))
        problem = None
        if not mean <= probe.tolerance:
            problem = (
                f"log-probs of a fixed probe differ by {mean:.2g} nats on average (at most {largest:.2g}); "
                f"{probe.tolerance:g} is expected of this precision"
            )
        if fingerprints is not None:
            wrong = compare_fingerprints(_own_fingerprints(model, accelerator), fingerprints(), probe.layer_tolerance)
            if wrong:
                problem = "; ".join([*filter(None, [problem]), f"these layers differ: {', '.join(wrong[:8])}"])
        return mean, problem

    mean, problem = look()
    if problem is None:
        return mean
    if accelerator.is_main_process:
        logger.warning(f"After an update of its weights {where} does not compute what the trainer does: {problem}. "
                       "The weights are loaded once more.")  # fmt: skip
    repair()
    mean, still = look()
    if still is None:
        if accelerator.is_main_process:
            logger.warning(f"{where} has the trainer's weights now.")
        return mean
    raise RuntimeError(
        f"{where} does not have the trainer's weights, also after they were loaded a second time: {still}. Completions "
        "would come from another policy than the one that is trained. Likely causes: the engine computes in another "
        'precision or quantization (`vllm_dtype`), its model code differs (try `vllm_model_impl="transformers"`), or '
        'it was started with another checkpoint or vocabulary. `vllm_verify="full"` names the layers; '
        '`vllm_verify="off"` goes on without this check.'
    )


def difference(expected: Sequence[Sequence[float]], found: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Mean and largest absolute difference; NaN on either side, or another number of values, is infinitely far."""
    if [len(row) for row in expected] != [len(row) for row in found]:
        return math.inf, math.inf
    pairs = zip(chain.from_iterable(expected), chain.from_iterable(found), strict=True)
    differences = [abs(one - other) if other is not None else math.inf for one, other in pairs]
    if any(math.isnan(value) for value in differences):
        return math.inf, math.inf
    return sum(differences) / len(differences), max(differences)


# ---------------------------------------------------------------------------------------------------------------------
# Layer by layer
# ---------------------------------------------------------------------------------------------------------------------


def probe_vector(size: int) -> Tensor:
    """
    A fixed vector that a matrix is applied to, float32. Its values are the same in bfloat16: what rounding the vector
    takes from one product it takes from all rows alike, and their sum would tell nothing of the weights.
    """
    vector = torch.randn(size, generator=torch.Generator().manual_seed(size)) / math.sqrt(size)
    return vector.bfloat16().float()


def fingerprint(output: Tensor) -> tuple[float, float]:
    """
    Sum and sum of squares of a layer's output for the probe vector. Matrices that an engine puts on top of each other
    (query, key and value) add up, in whatever order.
    """
    output = output.detach().double()
    return output.sum().item(), output.square().sum().item()


def _own_fingerprints(model: nn.Module, accelerator: Accelerator) -> Fingerprints:
    """Of the trainer's weights, by published name: matrices applied to the probe vector, vectors themselves."""
    found = {}
    for name, tensor in iter_weights(model, accelerator):
        if tensor.dim() <= 2 and tensor.is_floating_point():
            value = tensor.float()
            found[name] = fingerprint(value @ probe_vector(value.shape[1]).to(value) if value.dim() == 2 else value)
    head, embeddings = _names_of_tied_head(accelerator.unwrap_model(model))
    if head is not None:
        found[head] = found[embeddings]
    return found


def _names_of_tied_head(model: nn.Module) -> tuple[str, str] | tuple[None, None]:
    """Published names of a head and of the embeddings that it is; the engine keeps the head apart, packed."""
    if not has_tied_head(model):
        return None, None
    base = base_model_of(model)
    names = {id(module): name for name, module in base.named_modules()}
    return tuple(f"{names[id(part)]}.weight" for part in (base.get_output_embeddings(), base.get_input_embeddings()))


def compare_fingerprints(own: Mapping[str, tuple[float, float]], engine: Fingerprints, tolerance: float) -> list[str]:
    """
    Names of the engine's layers that differ from the trainer's weights.

    Args:
        own: by published name.
        engine: by the published names that a layer is made of, joined by `+`.
        tolerance: largest difference, relative to the length of a layer's output.
    """
    wrong = []
    for names, (total, squares) in engine.items():
        parts = [own[name] for name in names.split("+") if name in own]
        if len(parts) != len(names.split("+")):
            continue  # under other names on the two sides: the probe covers it
        expected = [sum(part[index] for part in parts) for index in range(2)]
        scale = math.sqrt(expected[1]) + 1e-6
        near = abs(total - expected[0]) <= tolerance * scale and abs(squares - expected[1]) <= tolerance * scale**2
        if not near:  # nor is what is no number
            wrong.append(names)
    return wrong
