"""GRPO and RLOO with a vLLM server: they learn, sample what they train, and outlive the server."""

from __future__ import annotations

import statistics
import threading

import pytest
import torch

from ..conftest import build_tokenizer
from ..rollouts.vllm_server_process import KEY, ServerProcess
from .test_resume import weights_of
from .vllm_helpers import build_policy, logged, make_vllm_trainer

pytest.importorskip("vllm")
pytestmark = pytest.mark.timeout(600)
DIFFERENCE = "sampling/sampling_logp_difference/max"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    build_policy(tie_word_embeddings=True).save_pretrained(folder / "model")
    build_tokenizer().save_pretrained(folder / "model")
    with ServerProcess(str(folder / "model"), folder) as process:
        yield process


@pytest.fixture
def make(server, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    trainers = []

    def make_trainer(**settings):
        settings = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": server.url, **settings}
        trainers.append(make_vllm_trainer(settings.pop("folder", tmp_path), **settings))
        return trainers[-1]

    yield make_trainer
    for trainer in trainers:
        trainer.rollouts.close()


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_learns_with_a_server(make, method):
    trainer = make(method=method, max_steps=30, beta=0.0)
    trainer.train()
    rewards = logged(trainer, "reward")
    assert statistics.mean(rewards[-5:]) - statistics.mean(rewards[:5]) > 0.1
    assert max(logged(trainer, DIFFERENCE)) <= 1e-4


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_server_and_trainer_agree_after_every_update(make, lora):
    trainer = make(lora=lora, max_steps=51, vllm_verify="full" if lora else "probe")
    trainer.train()
    differences = logged(trainer, DIFFERENCE)
    assert len(differences) == 51
    assert max(differences) <= 1e-4


def test_a_resumed_run_samples_and_learns_the_same(make, tmp_path):
    def run(folder, checkpoint=None):
        sampled = []

        def reward(completions, completion_ids, **kwargs):
            sampled.append([list(ids) for ids in completion_ids])
            return [float(sum(ids) % 7) for ids in completion_ids]

        trainer = make(folder=folder, rewards=reward, max_steps=3, save_strategy="steps", save_steps=1)
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.rollouts.close()
        return weights_of(trainer), sampled

    whole, sampled = run(tmp_path / "whole")
    resumed, again = run(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-1"))
    assert again == sampled[1:]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_kill_9_of_the_server_in_the_middle_of_training(make, server, caplog):
    """Killed while a step is scored and restarted meanwhile: the run goes on, with the weights it had, and all steps."""
    restarts = []

    def reward(completions, **kwargs):
        if trainer.state.global_step == 2 and not restarts:
            server.kill()
            restarts.append(threading.Timer(1.0, server.start))
            restarts[0].start()
        return [float(len(completion[0]["content"])) for completion in completions]

    trainer = make(rewards=reward, max_steps=5, vllm_server_timeout=240)
    with caplog.at_level("WARNING"):
        trainer.train()
    restarts[0].join()
    assert trainer.state.global_step == 5
    assert len(logged(trainer, "reward")) == 5
    assert max(logged(trainer, DIFFERENCE)) <= 1e-4
