import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.conftest import load_reference
from trl.ops.tensors import (
    entropy_from_logits,
    flush_left,
    nanmax,
    nanmin,
    nanstd,
    pad,
    selective_log_softmax,
    selective_log_softmax_and_entropy,
    shuffle_sequence_dict,
    split_pixel_values_by_grid,
    split_tensor_dict,
    unsplit_pixel_values_by_grid,
)

REFERENCE = load_reference("sft")
SAMPLER = load_reference("sampler")


def _tensor(values, dtype=torch.float64):
    return torch.tensor(np.array(values, dtype=float).tolist(), dtype=dtype)  # None becomes NaN


def _close(actual, expected):
    expected = [float(x) for x in np.array(expected, dtype=object).ravel()]
    torch.testing.assert_close(
        actual.flatten(), torch.tensor(expected, dtype=actual.dtype), rtol=1e-6, atol=1e-6, equal_nan=True
    )


# ---- Against the recorded figures ----


def test_selective_log_softmax_reference():
    case = REFERENCE["selective_log_softmax"]
    _close(
        selective_log_softmax(_tensor(case["inputs"]["logits"]), torch.tensor(case["inputs"]["index"])),
        case["outputs"]["out"],
    )


def test_entropy_reference():
    case = REFERENCE["entropy_from_logits"]
    for chunk_size in (1, 3, 128):
        _close(entropy_from_logits(_tensor(case["inputs"]["logits"]), chunk_size), case["outputs"]["out"])


def test_nan_statistics_reference():
    case = REFERENCE["nanstd"]
    x = _tensor(case["inputs"]["x"])
    _close(nanstd(x), [case["outputs"]["all"]])
    _close(nanstd(x, dim=1), case["outputs"]["dim1"])
    _close(nanstd(x, dim=0), case["outputs"]["dim0"])
    case = REFERENCE["nanmin_nanmax"]
    x = _tensor(case["inputs"]["x"])
    _close(nanmin(x), [case["outputs"]["min"]])
    _close(nanmax(x), [case["outputs"]["max"]])


def test_flush_left_reference():
    case = REFERENCE["flush_left"]
    mask, tensor = flush_left(torch.tensor(case["inputs"]["mask"]), torch.tensor(case["inputs"]["tensor"]))
    assert mask.tolist() == case["outputs"]["mask"]
    assert tensor.tolist() == case["outputs"]["tensor"]


@pytest.mark.parametrize("name", [name for name in REFERENCE if name.startswith("pad_")])
def test_pad_reference(name):
    case = REFERENCE[name]
    tensors = [torch.tensor(values) for values in case["inputs"]["tensors"]]
    assert pad(tensors, **case["config"]).tolist() == case["outputs"]["out"]


@pytest.mark.parametrize("name", [name for name in SAMPLER if name.startswith("split_tensor_dict")])
def test_split_tensor_dict_reference(name):
    case = SAMPLER[name]
    batch = {key: value if value is None else torch.tensor(value) for key, value in case["inputs"].items()}
    chunks = split_tensor_dict(batch, case["config"]["num_chunks"])
    plain = [{key: v if v is None else v.tolist() for key, v in chunk.items()} for chunk in chunks]
    assert plain == case["outputs"]["chunks"]


# ---- Log-probs and entropies ----


def _plain(logits, index, temperature):
    logps = F.log_softmax(logits.double() / temperature, dim=-1)
    several = index if index.ndim == logits.ndim else index[..., None]
    chosen = logps.gather(-1, several)
    return chosen.reshape(index.shape), -(logps.exp() * logps).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("index_shape", [(2, 5), (2, 5, 3)])
def test_values_and_gradients_match_the_plain_form(dtype, temperature, index_shape):
    torch.manual_seed(0)
    logits = (3 * torch.randn(2, 5, 11)).to(dtype).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    index = torch.randint(0, 11, index_shape)
    logps, entropy = selective_log_softmax_and_entropy(logits, index, temperature=temperature)
    alone = selective_log_softmax(logits, index, temperature=temperature)
    exact_logps, exact_entropy = _plain(exact, index, temperature)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for actual, expected in ((logps, exact_logps), (alone, exact_logps), (entropy, exact_entropy)):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)
    (gradient,) = torch.autograd.grad(logps.sum() + 0.5 * entropy.sum() + alone.sum(), logits)
    (expected,) = torch.autograd.grad(2 * exact_logps.sum() + 0.5 * exact_entropy.sum(), exact)
    torch.testing.assert_close(gradient.double(), expected, rtol=tolerance, atol=10 * tolerance)


def test_half_precision_is_computed_in_float32():
    """One rounding at the end: in bfloat16 arithmetic the error would be that of every step."""
    torch.manual_seed(0)
    logits, index = (4 * torch.randn(64, 1000)).bfloat16(), torch.randint(0, 1000, (64,))
    exact, _ = _plain(logits, index, 1.0)
    assert torch.equal(selective_log_softmax(logits, index), exact.bfloat16())


def test_row_mask_computes_only_the_kept_rows():
    torch.manual_seed(0)
    logits, index = torch.randn(2, 4, 7), torch.randint(0, 7, (2, 4))
    logits[0, 1] = math.nan  # would spread if it were computed
    logits.requires_grad_()
    mask = torch.tensor([[1, 0, 1, 1], [0, 1, 1, 0]])
    logps = selective_log_softmax(logits, index, row_mask=mask)
    both, entropy = selective_log_softmax_and_entropy(logits, index, row_mask=mask)
    kept = mask.bool()
    expected_logps, expected_entropy = _plain(logits.detach(), index, 1.0)
    for actual in (logps, both):
        torch.testing.assert_close(actual[kept].double(), expected_logps[kept], rtol=1e-5, atol=1e-5)
        assert torch.equal(actual[~kept], torch.zeros(3))
    torch.testing.assert_close(entropy[kept].double(), expected_entropy[kept], rtol=1e-5, atol=1e-5)
    logps.sum().backward()
    assert not logits.grad.isnan().any()
    assert logits.grad[~kept].abs().sum() == 0


def test_no_row_kept_is_a_differentiable_zero():
    logits = torch.randn(1, 3, 5, requires_grad=True)
    logps, entropy = selective_log_softmax_and_entropy(
        logits, torch.zeros(1, 3, dtype=torch.long), row_mask=torch.zeros(1, 3)
    )
    assert logps.tolist() == entropy.tolist() == [[0.0, 0.0, 0.0]]
    (logps + entropy).sum().backward()
    assert logits.grad.abs().sum() == 0


def test_entropy_gradient_can_be_left_out():
    logits = torch.randn(1, 3, 5, requires_grad=True)
    _, entropy = selective_log_softmax_and_entropy(
        logits, torch.zeros(1, 3, dtype=torch.long), entropy_requires_grad=False
    )
    assert not entropy.requires_grad


def test_impossible_tokens_have_no_entropy():
    logits = torch.tensor([[0.0, 0.0, -math.inf]], requires_grad=True)
    entropy = entropy_from_logits(logits)
    torch.testing.assert_close(entropy, torch.tensor([math.log(2)]))
    entropy.sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_above_zero(temperature):
    with pytest.raises(ValueError, match="must be above 0"):
        selective_log_softmax(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), temperature)
    with pytest.raises(ValueError, match="must be above 0"):
        selective_log_softmax_and_entropy(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), temperature=temperature)


# ---- Statistics ----


def test_nanstd_is_torch_std_without_nan():
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5)
    for dim, keepdim in ((None, False), (1, False), ((0, 2), True), (-1, True)):
        torch.testing.assert_close(nanstd(x, dim, keepdim), x.std(dim, keepdim=keepdim))


def test_nan_statistics_of_nothing():
    nothing = torch.tensor([math.nan, math.nan])
    assert nanmin(nothing).isnan()
    assert nanmax(nothing).isnan()
    assert nanstd(nothing).isnan()
    assert nanstd(torch.tensor([1.0])).isnan()


# ---- Padding ----


def test_pad_fills_every_dimension():
    padded = pad([torch.ones(1, 2), torch.ones(3, 1)], padding_value=0, padding_side="left")
    assert padded.tolist() == [[[0, 0], [0, 0], [1, 1]], [[1, 0], [1, 0], [1, 0]]]


def test_pad_refuses():
    with pytest.raises(ValueError, match="'left' or 'right'"):
        pad([torch.ones(1)], padding_side="middle")
    with pytest.raises(ValueError, match="empty"):
        pad([])


def test_flush_left_keeps_holes_and_moves_higher_ranks():
    mask = torch.tensor([[0, 1, 0, 1], [0, 0, 1, 0]])
    assert flush_left(mask).tolist() == [[1, 0, 1], [1, 0, 0]]
    moved_mask, features = flush_left(mask, torch.arange(16).reshape(2, 4, 2))
    assert features[0, 0].tolist() == [2, 3]
    assert features[moved_mask.bool()].tolist() == [[2, 3], [6, 7], [12, 13]]


def test_flush_left_of_nothing_kept():
    assert flush_left(torch.zeros(2, 3, dtype=torch.long)).shape == (2, 0)


# ---- Batches ----


def test_shuffle_keeps_rows_together():
    torch.manual_seed(0)
    batch = {"x": torch.arange(6).reshape(6, 1), "y": list("abcdef"), "none": None, "scalar": torch.tensor(3.0)}
    shuffled = shuffle_sequence_dict(batch)
    order = shuffled["x"].flatten().tolist()
    assert order != list(range(6))
    assert sorted(order) == list(range(6))
    assert shuffled["y"] == [batch["y"][index] for index in order]
    assert shuffled["none"] is None
    assert shuffled["scalar"] == 3.0


def _images():
    grids = torch.tensor([[1, 2, 2], [1, 1, 3], [1, 2, 1]])
    return {"pixel_values": torch.arange(18).reshape(9, 2), "image_grid_thw": grids, "num_images": [2, 0, 1], "a": 1}


def test_pixel_values_follow_their_sample():
    split = split_pixel_values_by_grid(_images())
    assert [len(patches) for patches in split["pixel_values"]] == [7, 0, 2]
    assert [len(grid) for grid in split["image_grid_thw"]] == [2, 0, 1]
    joined = unsplit_pixel_values_by_grid(split)
    assert torch.equal(joined["pixel_values"], _images()["pixel_values"])
    assert torch.equal(joined["image_grid_thw"], _images()["image_grid_thw"])


def test_pixel_values_that_do_not_fit():
    with pytest.raises(ValueError, match="counts 9 patches in 3 images, `pixel_values` has 8 rows"):
        split_pixel_values_by_grid({**_images(), "pixel_values": torch.zeros(8, 2)})
    assert split_pixel_values_by_grid({"x": 1}) == {"x": 1}
