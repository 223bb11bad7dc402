"""
GRPO and RLOO: the same completions, rewards and model give the same training, however a step is cut and laid out.

Every case is held against a plain loop in float64 that sees one completion at a time.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from .online_helpers import (
    GROUP,
    QUIET,
    SETTINGS,
    TOLERANCE,
    Generation,
    Plain,
    Step,
    compare,
    dataset,
    low_ids,
    make_fixed_trainer,
    make_online_trainer,
    nothing,
    quick_garbage_collection,
    record,
    short,
    step_losses,
    trained_weights,
)
from .test_invariants import set_chunk_size

ROOT = Path(__file__).parents[2]
METHODS = ["grpo", "rloo"]
LAYOUTS = ["padded", "packed", "shared_prefix", "auto"]
# (completions per micro-batch, micro-batches per step), of the 12 completions of a generation: all, groups, parts of
# groups, and one at a time.
CUTS = [(12, 1), (4, 3), (3, 4), (1, 12)]
REWARDS = {function.__name__: function for function in (low_ids, short, nothing)}
# Two steps on each generation, the second one off policy, some tokens clipped.
OPTIONS = {
    "grpo": {"beta": 0.1, "num_iterations": 2},
    "rloo": {"beta": 0.1, "num_iterations": 2, "epsilon": 0.9, "epsilon_high": 5.0},
}


def cut_settings(cut: tuple[int, int]) -> dict[str, int]:
    return {"per_device_train_batch_size": cut[0], "gradient_accumulation_steps": cut[1]}


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick_garbage_collection():
        yield


# ---- Against the plain loop ----


def plain_run(method: str, rewards: tuple[str, ...], options: dict, events: list[Generation | Step]) -> Plain:
    """What the plain loop makes of it; computed once for all cuts of a step."""
    if options.get("loss_type") != "bnpo":
        events = [
            Generation(tuple(sorted(event.keys))) if isinstance(event, Generation) else Step((event.keys,))
            for event in events
        ]
    return _plain_run(method, rewards, json.dumps(options), tuple(events))


@functools.lru_cache
def _plain_run(method: str, rewards: tuple[str, ...], options: str, events: tuple[Generation | Step, ...]) -> Plain:
    return Plain(method, [REWARDS[name] for name in rewards], json.loads(options)).run(events)


def check(output_dir, method: str, options: dict, rewards: tuple[str, ...] = ("low_ids",), **settings):
    """Train with `options`, which change the training, and `settings`, which must not; returns trainer and events."""
    functions = [REWARDS[name] for name in rewards]
    trainer = make_fixed_trainer(method, output_dir, functions, **options, **settings)
    events = record(trainer)
    trainer.train()
    compare(step_losses(trainer), trained_weights(trainer.model), plain_run(method, rewards, options, events))
    return trainer, events


CHECKPOINTED = [(cut, False) for cut in CUTS] + [(cut, True) for cut in CUTS[1:3]]


@pytest.mark.parametrize(
    ("cut", "checkpointing"),
    CHECKPOINTED,
    ids=[f"{cut[0]}x{cut[1]}-{'recomputed' if again else 'kept'}" for cut, again in CHECKPOINTED],
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_cuts_and_layouts_agree(tmp_path, method, layout, cut, checkpointing):
    trainer, events = check(
        tmp_path, method, OPTIONS[method], layout=layout, gradient_checkpointing=checkpointing, **cut_settings(cut)
    )
    assert [type(event) for event in events] == [Generation, Step, Step] * 2
    assert trainer.model.is_gradient_checkpointing == checkpointing
    clipped = [entry["clip_ratio/region_mean"] for entry in trainer.state.log_history if "loss" in entry]
    assert clipped[0] == clipped[2] == 0, "the first step on a generation is on policy"
    assert 0 < clipped[1] < 1, "the second one is to clip some tokens"


@pytest.mark.parametrize("cut", [(4, 3), (1, 12)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_balanced_micro_batches_agree(tmp_path, method, layout, cut):
    _, events = check(
        tmp_path, method, OPTIONS[method], layout=layout, balance_micro_batches=True, **cut_settings(cut)
    )
    steps = [event for event in events if isinstance(event, Step)]
    assert all(len(step.micro_batches) == cut[1] for step in steps)


@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_chunk_sizes_agree(tmp_path, monkeypatch, method, layout, size):
    set_chunk_size(monkeypatch, size)
    check(tmp_path, method, OPTIONS[method], layout=layout, pad_to_multiple_of=8, **cut_settings((4, 3)))


# ---- Generations that are not steps ----

SPREAD = {  # completions of a generation, of a micro-batch, micro-batches of a step
    "three steps a generation": (24, 4, 2),
    "parts of groups": (24, 2, 4),
    "two generations a step": (12, 4, 6),
    "steps across generations": (12, 4, 2),
}


@pytest.mark.parametrize(("layout", "iterations"), [("padded", 2), ("shared_prefix", 1)])
@pytest.mark.parametrize("case", SPREAD)
@pytest.mark.parametrize("method", METHODS)
def test_generations_and_steps_of_different_size(tmp_path, method, case, layout, iterations):
    size, rows, accumulation = SPREAD[case]
    _, events = check(
        tmp_path, method, {**OPTIONS[method], "num_iterations": iterations}, layout=layout,
        generation_batch_size=size, num_train_epochs=2, **cut_settings((rows, accumulation)),
    )  # fmt: skip
    sampled = Counter(key for event in events if isinstance(event, Generation) for key in event.keys)
    trained = Counter(key for event in events if isinstance(event, Step) for key in event.keys)
    assert sampled == dict.fromkeys([(p, g) for p in range(6) for g in range(GROUP)], 2), "one of each in an epoch"
    assert trained == {key: count * iterations for key, count in sampled.items()}


@pytest.mark.parametrize("method", METHODS)
def test_old_logps_are_asked_for_only_when_the_policy_has_moved(tmp_path, method):
    """Where a step is a generation, the log-probs of the loss's own forward are those of sampling."""
    for iterations, expected in ((1, False), (2, True)):
        trainer = make_fixed_trainer(
            method, tmp_path, beta=0.0, num_iterations=iterations, max_steps=1, **cut_settings((4, 3))
        )
        trainer.train()
        assert all(("old_logps" in batch) == expected for batch in trainer.buffer.micro_batches)


# ---- Each option once ----

GRPO_CASES = {
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.2},
    "vespo": {"loss_type": "vespo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "no_kl": {"beta": 0.0},
    "biased_kl": {"use_bias_correction_kl": False},
    "batch_scaled": {"scale_rewards": "batch"},
    "not_scaled": {"scale_rewards": "none", "loss_type": "grpo"},
    "high_entropy": {"top_entropy_quantile": 0.5},
    "entropy_bonus": {"entropy_coef": 0.3},
    "bonus_on_high_entropy": {"entropy_coef": 0.3, "top_entropy_quantile": 0.5, "loss_type": "grpo"},
    "adaptive_entropy": {
        "entropy_coef": 0.3, "use_adaptive_entropy": True, "entropy_target": 6.0, "entropy_coef_delta": 0.1,
    },
    "masked_truncated": {"mask_truncated_completions": True},
    "masked_truncated_rows": {"mask_truncated_completions": True, "loss_type": "grpo"},
    "another_temperature": {"temperature": 1.3},
}  # fmt: skip


@pytest.mark.parametrize("cut", [(4, 3), (3, 4)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("case", GRPO_CASES)
def test_options_of_grpo_agree(tmp_path, case, cut):
    layout = {4: "shared_prefix", 3: "packed"}[cut[0]]
    options = {**OPTIONS["grpo"], **GRPO_CASES[case]}
    check(tmp_path, "grpo", options, layout=layout, **cut_settings(cut))


RLOO_CASES = {
    "no_kl": {"beta": 0.0},
    "strong_kl": {"beta": 1.0},
    "normalized": {"normalize_advantages": True},
    "clipped_narrowly": {"epsilon": 0.2, "epsilon_high": None},
    "masked_truncated": {"mask_truncated_completions": True},
    "another_temperature": {"temperature": 1.3},
}


@pytest.mark.parametrize("cut", [(4, 3), (3, 4)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("case", RLOO_CASES)
def test_options_of_rloo_agree(tmp_path, case, cut):
    layout = {4: "shared_prefix", 3: "packed"}[cut[0]]
    check(tmp_path, "rloo", {**OPTIONS["rloo"], **RLOO_CASES[case]}, layout=layout, **cut_settings(cut))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("cut", [(12, 1), (4, 3)], ids="{0[0]}x{0[1]}".format)
def test_several_rewards_some_of_which_do_not_apply(tmp_path, cut, scale):
    """`short` is None for half of the completions; a completion without any reward has no advantage."""
    options = {**OPTIONS["grpo"], "scale_rewards": scale}
    weighted = {**options, "reward_weights": [1.0, 0.5, 2.0]}
    check(tmp_path / "grpo", "grpo", weighted, ("low_ids", "short", "nothing"), **cut_settings(cut))
    check(tmp_path / "alone", "grpo", options, ("short",), **cut_settings(cut))
    if scale == "group":
        weighted = {**OPTIONS["rloo"], "reward_weights": [1.0, 0.5, 2.0]}
        check(tmp_path / "rloo", "rloo", weighted, ("low_ids", "short", "nothing"), **cut_settings(cut))
        check(tmp_path / "rloo_alone", "rloo", OPTIONS["rloo"], ("short",), **cut_settings(cut))


def test_bnpo_is_the_mean_of_micro_batch_means(tmp_path):
    """The one loss that depends on the cut, by its definition."""
    losses = {}
    for cut in CUTS[:3]:
        options = {**OPTIONS["grpo"], "loss_type": "bnpo"}
        trainer, _ = check(tmp_path / str(cut[0]), "grpo", options, **cut_settings(cut))
        losses[cut] = step_losses(trainer)
    assert abs(losses[12, 1][1] - losses[3, 4][1]) > 100 * TOLERANCE


def test_entropies_steer_the_bonus(tmp_path):
    """The case above reaches both sides of the target: the coefficient goes up, and is not in force at first."""
    options = {**OPTIONS["grpo"], **GRPO_CASES["adaptive_entropy"]}
    trainer, _ = check(tmp_path, "grpo", options, **cut_settings((4, 3)))
    coefs = [entry["entropy_coef"] for entry in trainer.state.log_history if "loss" in entry]
    assert coefs == pytest.approx([0.4, 0.5, 0.6, 0.7])


# ---- RLOO's advantages ----


def test_rloo_advantages_of_a_group_sum_to_zero(tmp_path):
    """With the divergence from the reference in the reward, which is not the same for all of a group."""
    trainer = make_fixed_trainer("rloo", tmp_path, **OPTIONS["rloo"], **cut_settings((4, 3)))
    seen = []
    compute = trainer.compute_advantages

    def recorded(figures):
        seen.append((figures, compute(figures)))
        return seen[-1][1]

    trainer.compute_advantages = recorded
    trainer.train()
    assert len(seen) == 2
    for figures, result in seen:
        assert result.advantages_N.view(-1, GROUP).sum(1).abs().max() < 1e-6
        returns = (figures.rewards_FM[0] - 0.1 * figures.penalties_M).view(-1, GROUP)
        others = (returns.sum(1, keepdim=True) - returns) / (GROUP - 1)
        torch.testing.assert_close(result.advantages_N.view(-1, GROUP), (returns - others).to(result.advantages_N))
    first, second = (figures.penalties_M for figures, _ in seen)
    assert first.abs().max() < 1e-5, "at first the policy is the reference"
    assert second.view(-1, GROUP).std(1).min() > 1e-3


# ---- Adapters ----


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_adapters_agree(tmp_path, method, layout):
    """The reference is the base under a disabled adapter."""

    def run(layout: str, cut: tuple[int, int], **settings):
        lora = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj", "down_proj"])
        torch.manual_seed(0)  # of the adapter's first weights
        options = {**OPTIONS[method], "learning_rate": 5e-3}
        trainer = make_fixed_trainer(
            method, tmp_path / f"{layout}{cut}", layout=layout, peft_config=lora, **options, **cut_settings(cut),
            **settings,
        )  # fmt: skip
        before = trained_weights(trainer.model)
        trainer.train()
        after = trained_weights(trainer.model)
        assert max((after[name] - before[name]).abs().max() for name in after) > 1e-3
        return step_losses(trainer), after

    losses, weights = run(layout, (3, 4), gradient_checkpointing=True)
    expected_losses, expected = run("padded", (12, 1))
    assert losses == pytest.approx(expected_losses, abs=TOLERANCE)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], atol=TOLERANCE, rtol=0, msg=name)


# ---- Memory ----


@dataclass
class MemoryWatch(TrainerCallback):
    """At every 50th step: live tensors and their bytes, the bytes of Python's objects, and the process's MiB."""

    tensors: list[tuple[int, int]] = field(default_factory=list)
    python_bytes: list[int] = field(default_factory=list)
    resident_mib: list[float] = field(default_factory=list)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % 50:
            return
        gc.collect()
        tensors = [found for found in gc.get_objects() if isinstance(found, torch.Tensor)]
        self.tensors.append((len(tensors), sum(tensor.numel() * tensor.element_size() for tensor in tensors)))
        self.python_bytes.append(tracemalloc.get_traced_memory()[0])
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.resident_mib.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads Linux's own figures of a process")
@pytest.mark.parametrize("method", METHODS)
def test_memory_does_not_grow(tmp_path, method):
    """200 steps on 50 generations that are really sampled, with evaluations and logged completions."""
    watch = MemoryWatch()
    settings = {
        **QUIET, "max_steps": 200, "logging_steps": 10, "learning_rate": 1e-4, "beta": 0.1, "num_iterations": 2,
        "per_device_train_batch_size": GROUP, "steps_per_generation": 2, "gradient_accumulation_steps": 1,
        "num_generations": GROUP, "max_completion_length": 6, "log_completions": True, "num_completions_to_print": 0,
        "eval_strategy": "steps", "eval_steps": 20, "per_device_eval_batch_size": 8,
    }  # fmt: skip
    trainer = make_online_trainer(
        method, tmp_path, [low_ids, short], callbacks=[watch], eval_dataset=dataset(["the sky is", "user"]), **settings
    )
    tracemalloc.start()
    try:
        trainer.train()
    finally:
        tracemalloc.stop()
    counts, sizes = zip(*watch.tensors, strict=True)
    assert max(counts) - min(counts) < 8, counts  # a tensor that stays with each generation makes 37
    assert max(sizes) - min(sizes) < 20_000, sizes  # generations differ in length
    assert watch.python_bytes[-1] - watch.python_bytes[0] < 300_000, watch.python_bytes  # the log grows
    assert watch.resident_mib[-1] - watch.resident_mib[0] < 10, watch.resident_mib
    print("Memory:", method, watch.tensors, watch.python_bytes, watch.resident_mib)


# ---- Two processes ----

WORKER = """
import json, sys
from pathlib import Path
import torch

method, cut, case, output_dir, sharded = sys.argv[1:]
settings = {}
if sharded == "fsdp2":
    # Accelerate leaves CPU processes out of FSDP, so they go by another name.
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    plain_init = PartialState.__init__

    def init(self, *args, **kwargs):
        plain_init(self, *args, **kwargs)
        if self._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init
    settings = {"fsdp": "full_shard auto_wrap", "fsdp_config": {
        "version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "reshard_after_forward": True,
        "cpu_ram_efficient_loading": False, "state_dict_type": "FULL_STATE_DICT",
    }}
from tests.trainer.online_helpers import Generation, record, step_losses, trained_weights
from tests.trainer.test_online_invariants import distributed_trainer

trainer = distributed_trainer(method, output_dir, json.loads(cut), json.loads(case), **settings)
events = record(trainer)
trainer.train()
process = trainer.accelerator.process_index
weights = trained_weights(trainer.accelerator.unwrap_model(trainer.model))
assert all(hasattr(value, "full_tensor") == (sharded == "fsdp2") for value in weights.values())
weights = {name: value.full_tensor() if sharded == "fsdp2" else value for name, value in weights.items()}
torch.save(weights, f"{output_dir}/weights_{process}.pt")
metrics = trainer.evaluate()
if process == 0:
    Path(output_dir, "result.json").write_text(json.dumps({
        "processes": trainer.accelerator.num_processes, "losses": step_losses(trainer), "eval": metrics,
        "log": trainer.state.log_history,
        "events": [[isinstance(event, Generation), event.keys if isinstance(event, Generation) else event.micro_batches]
                   for event in events],
    }))
"""


def distributed_trainer(method: str, output_dir, cut: tuple[int, int], options: dict, **settings):
    """With an evaluation of three prompts, which two processes do not share evenly."""
    return make_fixed_trainer(
        method, output_dir, [low_ids, short], eval_dataset=dataset(["the sky is", "user", "hello world,"]),
        per_device_eval_batch_size=GROUP, **options, **cut_settings(cut), **settings,
    )  # fmt: skip


def as_tuples(value):
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "cut", "case", "sharded"),
    [
        ("grpo", (3, 2), {"layout": "padded"}, "no"),
        ("grpo", (2, 3), {"layout": "shared_prefix", "top_entropy_quantile": 0.5, "entropy_coef": 0.3}, "no"),
        ("grpo", (6, 1), {"loss_type": "grpo", "balance_micro_batches": True, "scale_rewards": "batch"}, "no"),
        ("grpo", (2, 1), {"num_generations": GROUP}, "no"),  # three steps a generation
        ("grpo", (6, 1), {}, "fsdp2"),
        ("rloo", (3, 2), {"layout": "packed"}, "no"),
        ("rloo", (6, 1), {"balance_micro_batches": True}, "fsdp2"),
    ],
)
def test_two_processes_agree(tmp_path, method, cut, case, sharded):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    options = {**OPTIONS[method], **case}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    finished = subprocess.run(
        [*command, method, json.dumps(cut), json.dumps({**options, "ddp_backend": "gloo"}), str(tmp_path), sharded],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["processes"] == 2
    events = [
        Generation(as_tuples(keys)) if generated else Step(as_tuples(keys)) for generated, keys in result["events"]
    ]
    assert all(len(event.keys) == SETTINGS["generation_batch_size"] for event in events if type(event) is Generation)
    plain = plain_run(method, ("low_ids", "short"), options, events)
    for process in range(2):
        weights = torch.load(tmp_path / f"weights_{process}.pt", weights_only=True)
        compare(result["losses"], weights, plain)

    trainer = distributed_trainer(method, tmp_path / "one", (12, 1), options)
    trainer.model.load_state_dict(weights, strict=False)
    one = trainer.evaluate()
    keys = ["reward", "rewards/short/mean", "completions/mean_length", "completions/clipped_ratio", "kl"]
    if "top_entropy_quantile" not in case:  # an evaluation takes that of each batch
        keys.append("loss")
    for key in keys:
        assert result["eval"][f"eval_{key}"] == pytest.approx(one[f"eval_{key}"], abs=1e-5), key
