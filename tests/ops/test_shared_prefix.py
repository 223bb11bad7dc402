"""Rows that share a beginning score as they do alone, whatever the model, its masks, and the cut of the batch."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.test_layouts import MODELS, REFUSED, make_model
from trl.losses.language_modeling import nll
from trl.losses.policy import PolicyLossInputs, PolicyLossOptions, aggregate, policy_loss
from trl.ops import layouts, shared_prefix
from trl.ops.layouts import PackingNotSupportedError, choose_layout
from trl.ops.scoring import install_scoring, score_tokens
from trl.ops.shared_prefix import arrange, block_mask, dense_mask, find_shared, lay_out
from trl.rollouts.types import Rollout
from trl.trainer.rollout_batches import completion_values, labels_of, rollouts_to_batch

ALL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
# Rows by group: (group, tokens of the prompt, tokens of the answer, what the answer begins with).
PAIRS = [(0, 9, 6, ""), (1, 5, 3, ""), (2, 11, 1, ""), (0, 9, 2, ""), (1, 5, 8, ""), (2, 11, 4, "")]
CASES = {
    "pairs": PAIRS,
    "pairs whose answers begin alike": [(0, 6, 5, "ab"), (1, 4, 5, "abc"), (0, 6, 3, "ab"), (1, 4, 7, "abc")],
    "groups of 1, 2 and 5": [(7, 8, 3, ""), *[(3, 6, n, "") for n in (2, 9, 1, 5, 4)], (-1, 3, 2, ""), (-1, 3, 5, "")],
    "identical rows": [(0, 5, 3, "abc"), (1, 4, 4, ""), (0, 5, 3, "abc"), (1, 4, 2, "")],
    "a row that is the beginning of another": [(0, 5, 2, "ab"), (0, 5, 6, "ab"), (0, 5, 0, "")],
}


def make_batch(rows, left=0, seed=0, trained_from=None):
    """Padded rows; the labels begin with the answer, or at token `trained_from`."""
    generator = torch.Generator().manual_seed(seed)
    prompts, sequences, labels = {}, [], []
    for group, n_prompt, n_answer, start in rows:
        if group not in prompts:
            prompts[group] = torch.randint(4, 500, (n_prompt,), generator=generator)
        answer = torch.randint(4, 500, (n_answer,), generator=generator)
        answer[: len(start)] = torch.tensor([ord(letter) for letter in start])
        sequences.append(torch.cat([prompts[group], answer]))
        labels.append(sequences[-1].clone())
        labels[-1][: n_prompt if trained_from is None else trained_from] = -100
    width = max(len(sequence) for sequence in sequences)

    def pad(values, padding):
        shape = [(left if row % 2 else 0, width + left) for row in range(len(values))]
        out = torch.stack([value.new_full((total,), padding) for value, (_, total) in zip(values, shape, strict=True)])
        for row, (value, (offset, _)) in enumerate(zip(values, shape, strict=True)):
            out[row, offset : offset + len(value)] = value
        return out

    ones = [torch.ones_like(sequence) for sequence in sequences]
    batch = {"input_ids": pad(sequences, 0), "attention_mask": pad(ones, 0), "labels": pad(labels, -100)}
    return batch, torch.tensor([row[0] for row in rows])


def score_and_gradients(model, batch, layout, groups=None, **kwargs):
    model.zero_grad()
    scores = score_tokens(model, batch, outputs=ALL_OUTPUTS, layout=layout, groups=groups, **kwargs)
    if scores.loss_sum is not None:
        scores.loss_sum.backward()
    else:
        generator = torch.Generator().manual_seed(3)
        weights = torch.randn(scores.logps.shape, generator=generator)
        (weights * (scores.logps - 0.1 * scores.entropies)).sum().backward()
    return scores, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_agrees(model, batch, groups, rtol=1e-5, atol=1e-5, **kwargs):
    """Scores and gradients of the shared-prefix layout are those of the padded rows; returns the laid-out choice."""
    want, want_gradients = score_and_gradients(model, batch, "padded", **kwargs)
    got, gradients = score_and_gradients(model, batch, "shared_prefix", groups, **kwargs)
    choice = layouts_choice(model)
    assert choice.name == "shared_prefix"
    assert got.keys() == want.keys()
    assert torch.equal(got.mask, want.mask)
    for name in want:
        torch.testing.assert_close(
            got[name], want[name], rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )
    assert gradients.keys() == want_gradients.keys()
    for name, gradient in want_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=rtol, atol=atol)
    return choice


def layouts_choice(model):
    return install_scoring(model)._layout_choice


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_models_agree(name, attention):
    """Full, sliding and chunked attention, soft-capping, learned positions, experts: in training and evaluation."""
    model, (batch, groups) = make_model(name, attention), make_batch(PAIRS)
    for training in (True, False):
        assert_agrees(model.train(training), batch, groups)


@pytest.mark.parametrize("objective", [None, nll])
@pytest.mark.parametrize("trained_from", [None, 0, 2])
@pytest.mark.parametrize("case", CASES)
def test_cases_agree(case, trained_from, objective):
    """Whatever the rows have in common, with labels inside the shared beginning too."""
    batch, groups = make_batch(CASES[case], trained_from=trained_from)
    assert_agrees(make_model("llama"), batch, groups, objective=objective)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_parts_of_large_groups_agree(name, monkeypatch):
    """A group that is cut into parts, several of which stand in one row."""
    rows = [(group, 7, 2 + (3 * row + group) % 5, "") for row in range(8) for group in range(3)]
    rows += [(3, 2, 3, ""), (3, 2, 2, "")]
    batch, groups = make_batch(rows)
    monkeypatch.setattr(layouts, "_token_cost", lambda model: 30)
    choice = assert_agrees(make_model(name), batch, groups)
    arrangement = choice.sharing[1]
    assert 3 < len(set(arrangement.parts_B)) < len(rows)
    assert arrangement.shape[0] < len(set(arrangement.parts_B))


def sampled_groups(n_groups, completions, prompt, shortest, longest):
    """Rollouts as a trainer keeps them, with some completion tokens that the policy did not write; rows shuffled."""
    generator = torch.Generator().manual_seed(7)

    def tokens(length):
        return torch.randint(4, 500, (int(length),), generator=generator).tolist()

    prompts = [tokens(prompt - 3 * group) for group in range(n_groups)]
    lengths = torch.linspace(shortest, longest, completions).round().int().tolist()
    rows = [(group, length) for group in range(n_groups) for length in lengths]
    rows = [rows[row] for row in torch.randperm(len(rows), generator=generator)]
    rollouts = []
    for group, length in rows:
        written = (torch.rand(length, generator=generator) < 0.9).int().tolist()
        rollouts.append(Rollout(prompts[group], tokens(length), policy_mask=written))
    groups = [group for group, _ in rows]
    return rollouts_to_batch(rollouts, groups, pad_token_id=0, device=torch.device("cpu"))


GROUPS = {
    "a group of 8 after a long prompt": (1, 8, 900, 64, 128),
    "four groups of 4": (4, 4, 200, 20, 40),
    "three groups of 8 after short prompts": (3, 8, 12, 1, 30),
}


@pytest.mark.parametrize("case", GROUPS)
def test_groups_of_completions_learn_alike(case):
    """The learn phase of methods that sample: log-probs, entropies, policy loss with entropy bonus, gradients."""
    model, batch = make_model("llama", max_position_embeddings=2048), sampled_groups(*GROUPS[case])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    inputs["labels"] = labels_of(batch, batch["train_mask"])
    advantages = torch.randn(len(batch["groups"]), generator=torch.Generator().manual_seed(1))
    options = PolicyLossOptions(loss_type="dapo", beta=0.0, entropy_coef=0.1)
    with torch.no_grad():
        old = completion_values(score_tokens(model, inputs, layout="padded").logps, batch)
    old_logps = old + 0.1 * torch.randn(old.shape, generator=torch.Generator().manual_seed(2))

    results = {}
    for layout in ("padded", "shared_prefix"):
        model.zero_grad()
        scores = score_tokens(model, inputs, with_entropy=True, layout=layout, groups=batch["groups"])
        assert layouts_choice(model).name == layout
        logps, entropies = (completion_values(values, batch) for values in (scores.logps, scores.entropies))
        loss = policy_loss(
            PolicyLossInputs(logps, advantages, batch["train_mask"], old_logps, entropies_BT=entropies), options
        )
        total = sum(term.weight * term.total / term.count for term in aggregate(loss, options))
        total.backward()
        results[layout] = (logps, entropies, total, *(parameter.grad.clone() for parameter in model.parameters()))
    for got, want in zip(results["shared_prefix"], results["padded"], strict=True):
        # A mean over many tokens has small gradients: the bound is relative to the largest of a tensor.
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max().item())


def test_shifted_labels_agree():
    model, (batch, groups) = make_model("llama"), make_batch(PAIRS)
    labels = batch.pop("labels")
    batch["shift_labels"] = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)
    assert_agrees(model, batch, groups)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_rows_padded_on_the_left_agree_on_request(name):
    """Rotary positions are relative; where the padding stands makes no difference."""
    model, (batch, groups) = make_model(name), make_batch(PAIRS, left=3)
    assert_agrees(model, batch, groups)
    assert choose_layout(model, batch, "auto", groups).name == "padded"


@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
def test_first_tokens_of_rows_padded_on_the_left_are_not_scored(layout):
    """What stands before them is padding, which predicts nothing."""
    batch, groups = make_batch(PAIRS, left=3, trained_from=0)
    scores = score_tokens(make_model("llama"), batch, layout=layout, groups=groups)
    assert scores.mask.sum() == batch["attention_mask"].sum() - len(PAIRS)
    assert not scores.mask[1, :3].any()


def test_truncated_rows_agree():
    """Cut on the right, at different places; cut on the left, so that nothing is shared but by chance."""
    model, (batch, groups) = make_model("llama"), make_batch(PAIRS)
    for width in (13, 10):
        assert_agrees(model, {name: value[:, :width] for name, value in batch.items()}, groups)
    batch["attention_mask"][3:, :2] = 0  # the second half of each pair lost its first two tokens
    batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    rows = find_shared(batch, groups)
    assert rows.starts_B.tolist() == [0, 0, 0, 2, 2, 2]
    assert rows.shared_B.tolist() == [0] * 6
    score_tokens(model, batch, layout="shared_prefix", groups=groups)
    assert layouts_choice(model).name == "padded"


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_agrees(reentrant):
    model, (batch, groups) = make_model("gemma2").train(), make_batch(PAIRS)
    expected = score_and_gradients(model, batch, "padded")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    got = score_and_gradients(model, batch, "shared_prefix", groups)
    torch.testing.assert_close(got[0].logps, expected[0].logps, rtol=1e-5, atol=1e-5)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("modules", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_lora_agrees(modules):
    from peft import LoraConfig, get_peft_model

    model, (batch, groups) = make_model("qwen3"), make_batch(PAIRS)
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=modules, init_lora_weights=False))
    assert_agrees(model, batch, groups)
    with torch.no_grad(), model.disable_adapter():  # the reference of a preference method
        got = score_tokens(model, batch, layout="shared_prefix", groups=groups).logps
        torch.testing.assert_close(got, score_tokens(model, batch, layout="padded").logps, rtol=1e-5, atol=1e-5)


def test_router_loss_counts_tokens_as_often_as_rows_have_them():
    model, (batch, groups) = (
        make_model("mixtral", output_router_logits=True),
        make_batch(CASES["groups of 1, 2 and 5"]),
    )
    model.zero_grad()
    results = {}
    for layout in ("padded", "shared_prefix"):
        aux_loss = score_tokens(model, batch, layout=layout, groups=groups).aux_loss
        gates = [p for name, p in model.named_parameters() if "gate.weight" in name]
        results[layout] = (aux_loss, *torch.autograd.grad(aux_loss, gates))
    for got, want in zip(results["shared_prefix"], results["padded"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_autocast_agrees():
    model, (batch, groups) = make_model("llama"), make_batch(PAIRS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = score_tokens(model, batch, layout="padded").logps
        scores = score_tokens(model, batch, layout="shared_prefix", groups=groups).logps
    torch.testing.assert_close(scores, expected, rtol=0.03, atol=0.03)
    scores.sum().backward()


def test_gradients_are_the_same_every_time():
    """Many tokens scored at one position: their gradients add up in a fixed order."""
    torch.manual_seed(0)
    rows = [(0, 5, 3 + row, "") for row in range(12)]
    model, (batch, groups) = make_model("llama"), make_batch(rows)
    first = score_and_gradients(model, batch, "shared_prefix", groups)[1]
    for _ in range(3):
        again = score_and_gradients(model, batch, "shared_prefix", groups)[1]
        assert all(torch.equal(again[name], gradient) for name, gradient in first.items())


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 6), st.sampled_from(["", "a", "ab"])), min_size=1, max_size=9
    ),
    left=st.integers(0, 2),
    dense=st.booleans(),
    token_cost=st.sampled_from([0, 10, 1000]),
)
def test_every_token_sees_its_row_and_nothing_else(rows, left, dense, token_cost):
    """For any batch: walking the mask from a token gives back the row that the token came from, in its order."""
    lengths = {0: 5, 1: 2, 2: 1, 3: 4}
    rows = [(group, lengths[group], max(own, len(start)), start) for group, own, start in rows]
    batch, groups = make_batch(rows, left=left)
    shared = find_shared(batch, groups)
    arrangement = arrange(shared, token_cost, dense=dense)
    laid_out = lay_out(batch, shared, arrangement)
    seen = dense_mask(laid_out.sight, torch.float32)[:, 0] == 0
    width = seen.shape[1]
    for row, (ids, real) in enumerate(zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)):
        places = laid_out.index_BT[row, real]
        for n, place in enumerate(places.tolist()):
            keys = seen[place // width, place % width].nonzero().squeeze(1) + place // width * width
            assert set(keys.tolist()) == set(places[: n + 1].tolist())
            assert laid_out.inputs["input_ids"].view(-1)[place] == ids[real][n]
            assert laid_out.inputs["position_ids"].view(-1)[place] == n
    assert laid_out.weight_RW.sum() == batch["attention_mask"].sum()
    assert (laid_out.weight_RW > 0).sum() == arrangement.tokens
    # Padding sees padding: a query that sees nothing would be NaN.
    assert seen.any(dim=-1).all()


@pytest.mark.parametrize(("window", "chunk"), [(None, None), (4, None), (None, 4)])
def test_windows_and_chunks_follow_the_positions_of_the_row(window, chunk):
    batch, groups = make_batch(PAIRS)
    shared = find_shared(batch, groups)
    laid_out = lay_out(batch, shared, arrange(shared, 1000, dense=True))
    seen = dense_mask(laid_out.sight, torch.float32, window, chunk)[:, 0] == 0
    for row in range(len(PAIRS)):
        places = laid_out.index_BT[row, batch["attention_mask"][row].bool()]
        width = seen.shape[1]
        for query, key in itertools.product(range(len(places)), repeat=2):
            expected = key <= query
            if window:
                expected = expected and query - key < window
            if chunk:
                expected = expected and query // chunk == key // chunk
            assert seen[places[query] // width, places[query] % width, places[key] % width] == expected


@pytest.mark.parametrize("query_key", ["answer to prompt", "answer to answer", "prompt to answer"])
def test_one_wrong_bit_of_the_mask_shows(query_key, monkeypatch):
    """The comparison with padded rows notices a single pair of tokens."""
    model, (batch, groups) = make_model("llama"), make_batch([(0, 4, 3, ""), (0, 4, 3, "")], trained_from=0)
    query, key = {"answer to prompt": (5, 2), "answer to answer": (8, 5), "prompt to answer": (2, 5)}[query_key]

    def flipped(sight, dtype, window=None, chunk=None):
        mask = dense_mask(sight, dtype, window, chunk)
        mask[0, 0, query, key] = 0 if mask[0, 0, query, key] else -torch.inf
        return mask

    monkeypatch.setattr(layouts, "dense_mask", flipped)
    with pytest.raises(AssertionError):
        assert_agrees(model, batch, groups)


class TestFlexAttention:
    @pytest.mark.parametrize(("window", "chunk"), [(None, None), (4, None), (None, 4)])
    def test_block_mask_is_the_dense_mask(self, window, chunk):
        batch, groups = make_batch(PAIRS)
        shared = find_shared(batch, groups)
        sight = lay_out(batch, shared, arrange(shared, 1000, dense=False)).sight
        assert sight.parts_RW.shape == (1, 128)
        blocks = block_mask(sight, window, chunk)
        index = torch.arange(128)
        seen = blocks.mask_mod(torch.tensor(0), torch.tensor(0), index[:, None], index[None, :])
        assert torch.equal(seen, dense_mask(sight, torch.float32, window, chunk)[0, 0] == 0)

    @pytest.mark.filterwarnings("ignore:.*without torch.compile:UserWarning")
    @pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3:sliding"])
    def test_models_agree(self, name, monkeypatch):
        """Everything in one row. Flex attention as PyTorch defines it: compiling it takes half a minute."""
        from torch.nn.attention.flex_attention import flex_attention
        from transformers.integrations import flex_attention as integration

        def plain(*args, training, **kwargs):
            return flex_attention(*args, **kwargs)

        monkeypatch.setattr(integration, "compile_friendly_flex_attention", plain)
        model, (batch, groups) = make_model(name), make_batch(PAIRS)
        with torch.no_grad():
            expected = score_tokens(model, batch, layout="padded").logps
            model.set_attn_implementation("flex_attention")
            got = score_tokens(model, batch, layout="shared_prefix", groups=groups).logps
        assert layouts_choice(model).sharing[1].shape == (1, 128)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


class TestArrange:
    @staticmethod
    def rows(*groups):
        """Each group as (shared, [own, own, …])."""
        table = [(0, shared + own, shared, n) for n, (shared, owns) in enumerate(groups) for own in owns]
        return shared_prefix.SharedRows(*np.array(table).T)

    def test_small_groups_stand_together(self):
        """Rows are as wide as the longest group, and no more of them than needed."""
        arrangement = arrange(self.rows((30, [2, 2]), (10, [3, 3]), (8, [4, 4])), 1000, dense=True)
        assert arrangement.shape == (2, 40)
        assert arrangement.tokens == 34 + 16 + 16

    def test_large_groups_are_cut_where_the_mask_costs_most(self):
        """The number of rows in a part is that of least cost, by trying all."""
        shared, own, cost, n = 300, 500, 6 * 2048, 64

        def work(cuts):
            sizes = np.bincount(np.arange(n) * cuts // n)
            lengths = shared + own * sizes
            return (lengths * cost + lengths**2).sum()

        arrangement = arrange(self.rows((shared, [own] * n)), cost, dense=True)
        cuts = len(set(arrangement.parts_B))
        assert work(cuts) <= 1.02 * min(work(cuts) for cuts in range(1, n + 1))
        assert arrange(self.rows((shared, [own] * n)), cost, dense=False).tokens == shared + n * own

    def test_counts_the_pairs_that_attention_computes(self):
        rows = self.rows((30, [2, 4]))
        assert arrange(rows, 1000, dense=True).pairs == 40**2
        assert arrange(rows, 1000, dense=False).pairs == 30**2 + (32**2 - 30**2) + (34**2 - 30**2)


class TestChooseLayout:
    LONG = [(0, 200, 20, ""), (1, 180, 30, ""), (0, 200, 30, ""), (1, 180, 20, "")]

    def test_shares_where_it_pays(self):
        model, (batch, groups) = make_model("llama"), make_batch(self.LONG)
        choice = choose_layout(model, batch, "auto", groups)
        assert choice.name == "shared_prefix"
        # two rows of 250 and 230 tokens, rounded up to 256
        assert choice.reason.startswith(
            "What rows have in common is computed once: 512 tokens instead of 920, about 41% less work"
        )
        assert choose_layout(model, batch, "auto").name == "padded"
        short = [(0, 3, 200, ""), (0, 3, 200, "")]
        assert choose_layout(model, *make_batch(short)[:1], "auto", make_batch(short)[1]).name == "padded"

    def test_says_what_was_chosen(self):
        model, (batch, groups) = make_model("llama"), make_batch(self.LONG)
        for layout in ("auto", "shared_prefix", "packed", "padded"):
            score_tokens(model, batch, layout=layout, groups=groups)
            assert layouts_choice(model).name == ("shared_prefix" if layout == "auto" else layout)

    def test_nothing_shared_is_auto(self):
        model, batch = make_model("llama"), make_batch(self.LONG)[0]
        for nothing in (None, torch.arange(4), torch.tensor([0, 0, 1, 1])):
            choice = choose_layout(model, batch, "shared_prefix", nothing)
            assert choice.name == "padded"
            assert choice.reason.startswith("No two rows of a group begin alike")
        ragged, _ = make_batch([(0, 100, 3, ""), (1, 4, 2, ""), (2, 5, 2, ""), (3, 4, 4, "")])
        assert choose_layout(model, ragged, "shared_prefix", torch.arange(4)).name == "packed"

    def test_groups_have_a_number_for_each_row(self):
        model, (batch, groups) = make_model("llama"), make_batch(self.LONG)
        with pytest.raises(ValueError, match="one number for each of the 4 rows"):
            score_tokens(model, batch, groups=groups[:2])

    def test_other_inputs_stay_as_they_are(self):
        model, (batch, groups) = make_model("llama"), make_batch(self.LONG)
        batch["pixel_values"] = torch.zeros(1)
        assert choose_layout(model, batch, "auto", groups).name == "padded"
        with pytest.raises(PackingNotSupportedError, match="pixel_values"):
            choose_layout(model, batch, "shared_prefix", groups)

    @pytest.mark.parametrize("name", REFUSED)
    def test_models_that_cannot_are_refused_with_the_reason(self, name):
        kwargs, reason = REFUSED[name]
        model, (batch, groups) = make_model(name, attention="eager", **kwargs), make_batch(self.LONG)
        with pytest.raises(PackingNotSupportedError, match=reason):
            score_tokens(model, batch, layout="shared_prefix", groups=groups)
        assert choose_layout(model, batch, "auto", groups).name == "padded"

    def test_flash_attention_is_refused(self):
        model, (batch, groups) = make_model("llama"), make_batch(self.LONG)
        model.config._attn_implementation = "flash_attention_2"
        with pytest.raises(PackingNotSupportedError, match="two answers see one prompt but not each other"):
            choose_layout(model, batch, "shared_prefix", groups)
        choice = choose_layout(model, batch, "auto", groups)
        assert choice.name == "padded"
        assert choice.reason.endswith("see one prompt but not each other")

    def test_models_out_of_reach_are_refused(self, monkeypatch):
        model, (batch, groups) = make_model("gemma2"), make_batch(self.LONG)
        monkeypatch.setattr(layouts, "_takes_mask_mapping", functools.cache(lambda backbone: False))
        with pytest.raises(PackingNotSupportedError, match="makes its attention masks by itself"):
            choose_layout(model, batch, "shared_prefix", groups)

    def test_learned_tokens_are_refused(self):
        from peft import PromptTuningConfig, get_peft_model

        model = get_peft_model(make_model("llama"), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
        batch, groups = make_batch(self.LONG)
        with pytest.raises(PackingNotSupportedError, match="learned tokens"):
            score_tokens(model, batch, layout="shared_prefix", groups=groups)
        score_tokens(model, batch, groups=groups)
        assert layouts_choice(model).name == "padded"
