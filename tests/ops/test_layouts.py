"""Padded and packed batches are the same computation, and packed documents never see each other."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import build_model
from trl.losses.language_modeling import nll
from trl.ops.layouts import PackingNotSupportedError, choose_layout, is_packed, pack_padded, prepare_packed
from trl.ops.scoring import install_scoring, score_tokens

LENGTHS = (12, 7, 1, 9)

# Windows and chunks are shorter than the documents, so that they matter within one.
MODELS = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "qwen3:sliding": {"head_dim": 8, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "gemma2": {"head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {"sliding_window": 4},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "num_key_value_heads": None},
    "falcon": {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
    "phi": {},
    "gpt_neox": {"num_key_value_heads": None},
    "llama4_text": {
        "head_dim": 8, "attention_chunk_size": 4, "num_local_experts": 2, "intermediate_size_mlp": 32,
        "layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0],
    },
}  # fmt: skip


def make_model(name, attention="sdpa", **kwargs):
    settings = {**MODELS.get(name, {}), **kwargs}
    settings.setdefault("pad_token_id", 0)
    model = build_model(architecture=name.split(":")[0], attn_implementation=attention, **settings)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def documents(vocab_size=512, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, vocab_size, (length,), generator=generator) for length in LENGTHS]


def padded(rows):
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    attention_mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def packed(rows, pad_to=0):
    batch = {
        "input_ids": torch.cat(rows).unsqueeze(0),
        "labels": torch.cat(rows).unsqueeze(0),
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows]).unsqueeze(0),
    }
    if pad_to:
        missing = pad_to - batch["input_ids"].shape[1]
        for name, value in (("input_ids", 0), ("labels", -100), ("position_ids", 0)):
            batch[name] = torch.nn.functional.pad(batch[name], (0, missing), value=value)
    return batch


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_layouts_agree(name, attention):
    """Padded and packed batches are the same computation: log-probs and gradients agree."""
    model, results = make_model(name, attention).train(), {}
    for layout in ("padded", "packed"):
        model.zero_grad()
        scores = score_tokens(model, padded(documents()), outputs=("entropy",), layout=layout)
        (scores.logps - 0.1 * scores.entropies).sum().backward()
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        results[layout] = (scores.logps, scores.entropies, scores.mask, *grads)
    for got, want in zip(results["packed"], results["padded"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_documents_never_see_each_other(name, attention, training):
    """Another first document leaves the scores of the others bit for bit as they were, in training and evaluation."""
    model, rows = make_model(name, attention).train(training), documents()
    with torch.no_grad():
        scores = score_tokens(model, packed(rows)).logps
        changed = [rows[0].clone(), *rows[1:]]
        changed[0][[2, 11]] = (changed[0][[2, 11]] + 7) % 500 + 4
        other = score_tokens(model, packed(changed)).logps
    assert not torch.equal(scores[0, :11], other[0, :11])
    if "local_experts" in str(MODELS[name]):  # tokens of an expert are multiplied together: their number rounds
        torch.testing.assert_close(scores[0, 12:], other[0, 12:], rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(scores[0, 12:], other[0, 12:])


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_isolation_does_not_depend_on_the_cache(name):
    """`prepare_packed` alone, called with a cache as evaluation loops do, keeps documents apart."""
    model, rows = make_model(name).eval(), documents()
    inputs, _ = prepare_packed(model, packed(rows))
    inputs.pop("labels")
    with torch.no_grad():
        logits = model(**inputs, use_cache=True).logits
        alone = model(input_ids=rows[1].unsqueeze(0)).logits
    torch.testing.assert_close(logits[0, 12:19], alone[0], rtol=1e-4, atol=1e-5)


def test_flex_attention_agrees():
    model = make_model("llama")
    expected = score_tokens(model, packed(documents())).logps
    try:
        model.set_attn_implementation("flex_attention")
        with torch.no_grad():
            scores = score_tokens(model.eval(), packed(documents())).logps
    except Exception as error:
        pytest.skip(f"flex attention does not run here: {type(error).__name__}")
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)


class TestPreparePacked:
    def test_padding_at_the_end_is_one_document(self):
        model = make_model("llama")
        inputs, token_mask = prepare_packed(model, packed(documents(), pad_to=40))
        assert inputs["position_ids"][0, 29:].tolist() == list(range(11))
        assert token_mask[0].tolist() == [1] * 29 + [0] * 11
        # one block of the mask
        assert inputs["attention_mask"][0, 0, 29:, 29:].tril().sum() == 11 * 12 / 2
        assert not inputs["attention_mask"][0, 0, 29:, :29].any()

    def test_padding_at_the_end_changes_no_score(self):
        model, rows = make_model("llama"), documents()
        expected = score_tokens(model, packed(rows)).logps
        actual = score_tokens(model, packed(rows, pad_to=40)).logps
        torch.testing.assert_close(actual[:, :28], expected, rtol=1e-5, atol=1e-6)
        assert not actual[:, 28:].any()

    def test_first_tokens_are_not_scored(self):
        """The first token of a document would be predicted by the last of another."""
        scores = score_tokens(make_model("llama"), packed(documents()))
        starts = [12, 19, 20]
        assert not scores.mask[0, [start - 1 for start in starts]].any()
        assert scores.mask.sum() == sum(LENGTHS) - len(LENGTHS)

    def test_shifted_labels_end_with_their_document(self):
        batch = packed(documents())
        batch["shift_labels"] = batch.pop("labels").roll(-1, dims=1)
        model = make_model("llama")
        scores = score_tokens(model, batch)
        expected = score_tokens(model, packed(documents()))
        torch.testing.assert_close(scores.logps[:, :-1], expected.logps)
        assert not scores.mask[0, [11, 18, 19, 28]].any()

    def test_flash_attention_gets_lengths(self):
        model = make_model("llama")
        model.config._attn_implementation = "flash_attention_2"
        inputs, _ = prepare_packed(model, {**packed(documents(), pad_to=40), "seq_idx": torch.zeros(1, 40)})
        assert inputs["cu_seq_lens_q"].tolist() == [0, 12, 19, 20, 29, 40]
        assert inputs["cu_seq_lens_q"].dtype == torch.int32
        assert inputs["max_length_k"] == 12
        assert "attention_mask" not in inputs
        assert "seq_idx" not in inputs

    def test_a_single_document_needs_no_mask(self):
        inputs, _ = prepare_packed(make_model("llama"), packed(documents()[:1]))
        assert "attention_mask" not in inputs


REFUSED = {
    "mamba": ({"state_size": 4, "expand": 1, "time_step_rank": 4}, "carries a state along the row"),
    "bloom": ({"n_layer": 2, "n_head": 4}, "takes no position_ids"),
    "roberta": ({"is_decoder": True, "num_key_value_heads": None}, "counts its positions from the padding token"),
    "openai-gpt": ({"n_embd": 32, "n_head": 4, "n_layer": 2, "num_key_value_heads": None}, "in a way of its own"),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "layers of type conv"),
    "falcon": ({"alibi": True, "new_decoder_architecture": False}, "ALiBi"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_are_refused_with_the_reason(name):
    kwargs, reason = REFUSED[name]
    model = make_model(name, attention="eager", **kwargs)
    with pytest.raises(PackingNotSupportedError, match=reason):
        score_tokens(model, packed(documents()))
    with pytest.raises(PackingNotSupportedError, match=reason):
        score_tokens(model, padded(documents()), layout="packed")
    assert choose_layout(model, padded(documents()), "auto").name == "padded"


class TestChooseLayout:
    @staticmethod
    def batch(lengths):
        return padded([torch.full((length,), 5) for length in lengths])

    def test_packs_where_it_pays(self):
        model = make_model("llama")
        assert choose_layout(model, self.batch([64, 4, 4, 4]), "auto").name == "packed"
        assert choose_layout(model, self.batch([64, 64, 64, 60]), "auto").name == "padded"

    def test_counts_the_dense_mask(self):
        """A little padding in long rows: the tokens saved cost less than the pairs that the mask throws away."""
        model, batch = make_model("llama"), self.batch([256] * 8 + [100] * 8)
        assert choose_layout(model, batch, "auto").name == "padded"
        model.config._attn_implementation = "flex_attention"
        assert choose_layout(model, batch, "auto").name == "packed"

    def test_leaves_what_it_does_not_know(self):
        model, batch = make_model("llama"), self.batch([64, 4, 4, 4])
        assert choose_layout(model, {**batch, "pixel_values": torch.zeros(1)}, "auto").name == "padded"
        assert (
            choose_layout(model, {**batch, "attention_mask": batch["attention_mask"].flip(1)}, "auto").name == "padded"
        )
        labels = batch["labels"].clone()
        labels[1, 30] = 7
        assert choose_layout(model, {**batch, "labels": labels}, "auto").name == "padded"
        with pytest.raises(PackingNotSupportedError, match="A padding token has a label"):
            choose_layout(model, {**batch, "labels": labels}, "packed")

    def test_unknown_layout(self):
        with pytest.raises(ValueError, match='must be "auto", "padded", "packed" or "shared_prefix"'):
            choose_layout(make_model("llama"), self.batch([4]), "dense")


def test_left_padded_rows_pack_on_request():
    model, batch = install_scoring(make_model("llama")), padded(documents())
    for name in batch:
        batch[name] = torch.stack([row.roll(12 - length) for row, length in zip(batch[name], LENGTHS, strict=True)])
    expected = score_tokens(model, batch, layout="padded").logps
    torch.testing.assert_close(score_tokens(model, batch, layout="packed").logps, expected, rtol=1e-4, atol=1e-5)


def test_pack_padded_keeps_every_token():
    batch = padded(documents())
    row, positions = pack_padded(batch)
    assert is_packed(row)
    assert not is_packed(batch)
    assert row["input_ids"].tolist() == [torch.cat(documents()).tolist()]
    assert row["position_ids"].tolist() == [[position for length in LENGTHS for position in range(length)]]
    assert torch.equal(row["input_ids"][0][positions.index_N + 1], positions.targets_N)
    assert torch.equal(batch["input_ids"][:, 1:][positions.mask], positions.targets_N)


@pytest.mark.parametrize("pad_to", [0, 40])
def test_router_loss_of_a_packed_row_leaves_padding_out(pad_to):
    model = make_model("mixtral", output_router_logits=True)
    expected = score_tokens(model, padded(documents()), layout="padded").aux_loss
    actual = score_tokens(model, packed(documents(), pad_to=pad_to), objective=nll).aux_loss
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
