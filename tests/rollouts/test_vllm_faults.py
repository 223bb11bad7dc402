"""What goes wrong with a vLLM server in the middle of a run: each ends in recovery, or in an error that names the fix."""

import contextlib
import logging
import os
import re
import signal
import socket
import threading
import time

import pytest
import torch

from tests.conftest import build_model
from tests.rollouts.fake_vllm import EOS, FakeVLLM, completion_of
from tests.rollouts.test_vllm_server_engine import PAD, SHAPE, completions, largest_difference, make_engine, shift
from tests.rollouts.vllm_server_process import KEY, ServerProcess
from trl.rollouts import vllm_server_engine
from trl.rollouts.types import SamplingParams
from trl.rollouts.vllm_http import ServerError, ServerTimeout
from trl.rollouts.vllm_sampling import request_seeds

PROMPTS = [[4, index] for index in range(6)]
SAMPLING = SamplingParams(max_completion_length=8, seed=3)


def expected():
    return [completion_of(prompt, seed, 0, 8) for prompt, seed in zip(PROMPTS, request_seeds(3, 6), strict=True)]


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with FakeVLLM() as server:
        yield server


@pytest.fixture
def engine(fake):
    engine = make_engine(fake.url, timeout=5.0, request_timeout=5.0)
    yield engine
    engine.close()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    sleep = time.sleep
    monkeypatch.setattr(vllm_server_engine.time, "sleep", lambda seconds: sleep(min(seconds, 0.05)))


@pytest.fixture
def warned(monkeypatch):
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    for name in ("vllm_http", "vllm_server_engine"):
        monkeypatch.setattr(logging.getLogger(f"trl.rollouts.{name}"), "handlers", [handler])
    return messages


def one_choice_missing(fake):
    complete, done = fake._complete, []

    def lose(body, headers):
        status, said, headers = complete(body, headers)
        if not done:
            done.append(said["choices"].pop())
        return status, said, headers

    fake._complete = lose


# ---------------------------------------------------------------------------------------------------------------------
# In the middle of a generation
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", ["cut", "reset", "garbage", 500])
def test_only_what_is_missing_is_asked_for_again(fake, engine, failure):
    fake.fail("/v1/completions", failure, failure)
    rollouts = engine.generate(PROMPTS, SAMPLING)
    assert [rollout.completion_ids for rollout in rollouts] == expected()
    assert len(completions(fake)) == 8
    assert fake.version == "first:0", "the server is the same: no weights are pushed"


def test_a_completion_too_few_is_asked_for_again(fake, engine):
    one_choice_missing(fake)
    assert [rollout.completion_ids for rollout in engine.generate(PROMPTS, SAMPLING)] == expected()


def test_a_restarted_server_gets_its_weights_again(fake, engine, warned):
    model = build_model()
    engine.update_weights(model)
    shift(model)
    engine.update_weights(model)
    fake.fail("/v1/completions", 503, lambda: fake.restart_after(0.3) or "reset")
    rollouts = engine.generate(PROMPTS, SAMPLING)
    assert [rollout.completion_ids for rollout in rollouts] == expected()
    assert fake.version == "second:1"
    assert torch.equal(fake.weights["lm_head.weight"], model.state_dict()["lm_head.weight"])
    first_try = [body["seed"] for body in completions(fake)]
    assert all(first_try.count(seed) <= 4 for seed in first_try)
    assert any("without this run's weights" in text for text in warned)
    assert engine.generate(PROMPTS, SAMPLING)[0].completion_ids == expected()[0], "and goes on"


def test_a_server_that_was_restarted_between_two_generations(fake, engine):
    engine.update_weights(build_model())
    engine.generate(PROMPTS, SAMPLING)
    fake.instance, fake.updates, fake.owner = "second", 0, None
    assert [rollout.completion_ids for rollout in engine.generate(PROMPTS, SAMPLING)] == expected()
    assert fake.version == "second:1"


def test_a_server_whose_last_update_failed_gets_its_weights_again(fake, engine, monkeypatch):
    engine.update_weights(build_model())
    complete = fake._complete

    def refuse(body, headers):
        if fake.updates == 1:
            fake.info["healthy_weights"] = False
            return 503, {"error": {"message": "half an update", "type": "broken_weights"}}, {}
        fake.info["healthy_weights"] = True
        return complete(body, headers)

    monkeypatch.setattr(fake, "_complete", refuse)
    assert [rollout.completion_ids for rollout in engine.generate(PROMPTS, SAMPLING)] == expected()
    assert fake.version == "first:2"


def test_another_trainers_weights_are_no_policy_of_ours(fake, engine):
    engine.update_weights(build_model())
    fake.updates, fake.owner = 2, "elsewhere:17:abc"
    message = (
        rf"another trainer uses the server {fake.url}: weights were pushed by elsewhere:17:abc.*a server of its own"
    )
    with pytest.raises(RuntimeError, match=message):
        engine.generate(PROMPTS, SAMPLING)
    with pytest.raises(RuntimeError, match=message):
        engine.update_weights(build_model())


def test_another_trainer_takes_a_server_that_got_nothing_from_here(fake, engine):
    engine.generate(PROMPTS, SAMPLING)
    fake.updates, fake.owner = 1, "elsewhere:17:abc"
    with pytest.raises(RuntimeError, match="another trainer"):
        engine.generate(PROMPTS, SAMPLING)


def test_an_own_update_that_came_late_is_made_anew(fake, engine):
    engine.update_weights(build_model())
    fake.updates = 2
    assert [rollout.completion_ids for rollout in engine.generate(PROMPTS, SAMPLING)] == expected()
    assert fake.version == "first:3"


def test_answers_of_other_weights_are_not_taken(fake, engine, monkeypatch):
    """Where a server says 200 all the same."""
    engine.update_weights(build_model())
    complete, seen = fake._complete, set()

    def other(body, headers):
        status, said, headers = complete(body, headers)
        is_first = body["seed"] not in seen
        seen.add(body["seed"])
        return status, said, {"trl-weights": "first:0"} if is_first else headers

    monkeypatch.setattr(fake, "_complete", other)
    assert [rollout.completion_ids for rollout in engine.generate(PROMPTS, SAMPLING)] == expected()
    assert len(completions(fake)) == 12


def test_a_server_that_does_not_come_back_is_named(fake):
    engine = make_engine(fake.url, timeout=1.0)
    fake.fail("/v1/completions", lambda: fake.go_away() or "reset")
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=rf"{fake.url} within 1 s .*vllm_server_timeout"):
        engine.generate(PROMPTS, SAMPLING)
    assert time.monotonic() - start < 20


def test_a_request_that_breaks_the_server_each_time_is_named(fake, engine):
    fake.fail("/v1/completions", *["reset"] * 99)
    with pytest.raises(RuntimeError, match=rf"{fake.url} broke off the same request 4 times \(a prompt of 2 tokens"):
        engine.generate([[4, 4]], SAMPLING)
    assert len(completions(fake)) == 4


def test_a_server_that_restarts_again_and_again_is_named(fake, engine):
    engine.update_weights(build_model())

    def restart():
        fake.instance, fake.updates, fake.owner = f"{fake.instance}x", 0, None
        return "reset"

    fake.fail("/v1/completions", *[restart] * 99)
    with pytest.raises(RuntimeError, match="restarted 3 times during one generation"):
        engine.generate([[4, 4]], SAMPLING)


# ---------------------------------------------------------------------------------------------------------------------
# Busy, hanging, refusing
# ---------------------------------------------------------------------------------------------------------------------


def test_a_busy_server_is_asked_again_and_said_so_once(fake, engine, warned):
    fake.fail("/v1/completions", 429, 503, 503, 429)
    assert [rollout.completion_ids for rollout in engine.generate(PROMPTS, SAMPLING)] == expected()
    assert len([text for text in warned if "answered 503" in text]) == 1
    assert len([text for text in warned if "answered 429" in text]) == 1
    fake.fail("/v1/completions", 503)
    engine.generate(PROMPTS, SAMPLING)
    assert len([text for text in warned if "answered 503" in text]) == 2, "a new generation, a new line"


def test_a_server_that_stays_busy_is_an_error_within_the_limit(fake):
    engine = make_engine(fake.url, request_timeout=1.0)
    fake.fail("/v1/completions", *[503] * 999)
    with pytest.raises(ServerError, match=rf"{fake.url} answered 503.*asked again for 1 s. Give it more time"):
        engine.generate(PROMPTS, SAMPLING)


def test_a_server_that_hangs_is_an_error_within_the_limit(fake):
    engine = make_engine(fake.url, request_timeout=1.0)
    fake.fail("/v1/completions", *["hang"] * 6)
    start = time.monotonic()
    with pytest.raises(ServerTimeout, match=rf"{fake.url}/v1/completions gave no whole answer within 1 s"):
        engine.generate(PROMPTS, SAMPLING)
    assert time.monotonic() - start < 15


@pytest.mark.parametrize(
    ("status", "said"), [(400, r"prompt has 2 tokens.*may have 8.*takes 64"), (401, "VLLM_API_KEY")]
)
def test_a_refusal_is_raised_at_once(fake, engine, status, said):
    fake.fail("/v1/completions", *[status] * 6)
    with pytest.raises(RuntimeError, match=rf"(?s){fake.url}.*{status}.*{said}"):
        engine.generate(PROMPTS, SAMPLING)


def test_a_server_that_starts_slowly_is_waited_for(fake, warned):
    fake.stop()
    threading.Timer(0.5, fake.start).start()
    assert make_engine(fake.url, timeout=20.0).max_model_length == 64
    assert len([text for text in warned if "Waiting for" in text]) == 1


def test_a_server_that_is_not_there_is_named(fake):
    fake.stop()
    with pytest.raises(ConnectionError, match=rf"{fake.url} within 0 s \(.*refused.*\). Start one"):
        make_engine(fake.url, timeout=0.0)


# ---------------------------------------------------------------------------------------------------------------------
# In the middle of an update
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/trl/weights", "/trl/weights/token", "/trl/weights/token/commit"])
@pytest.mark.parametrize("failure", ["reset", "cut", 500])
def test_an_update_that_breaks_off_is_made_again(fake, engine, path, failure):
    model = build_model()
    # The path's own request, and not those below it: counted from the update's beginning.
    fake.failures[path].append(failure)
    engine.update_weights(model)
    assert torch.equal(fake.weights["lm_head.weight"], model.state_dict()["lm_head.weight"])
    assert [rollout.completion_ids for rollout in engine.generate(PROMPTS, SAMPLING)] == expected()


def test_a_server_that_is_restarted_during_an_update(fake, engine):
    fake.fail("/trl/weights/token", lambda: fake.restart_after(0.3) or "reset")
    engine.update_weights(build_model())
    assert fake.version == "second:1"
    assert [rollout.completion_ids for rollout in engine.generate(PROMPTS, SAMPLING)] == expected()


def test_an_update_that_never_gets_through_is_named(fake, engine):
    fake.fail("/trl/weights/token", *["reset"] * 99)
    message = rf"weights did not get to the vLLM server {fake.url} in 3 attempts.*up to 5 s"
    with pytest.raises(RuntimeError, match=message):
        engine.update_weights(build_model())


def test_weights_of_another_model_are_named(fake, engine):
    fake.fail("/trl/weights", 422)
    with pytest.raises(RuntimeError, match="not the one that is trained"):
        engine.update_weights(build_model())


def test_a_stock_server_on_a_cpu_is_no_engine(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with FakeVLLM(stock=True) as fake:
        engine = make_engine(fake.url)
        assert [rollout.completion_ids for rollout in engine.generate(PROMPTS, SAMPLING)] == expected()
        with pytest.raises(RuntimeError, match="takes no weights.*trl vllm-serve"):
            engine.update_weights(build_model())


# ---------------------------------------------------------------------------------------------------------------------
# The real server
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory, _tokenizer):
    """A real server with an untied head, that runs few completions at a time."""
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("vllm-server")
    build_model(**SHAPE, eos_token_id=EOS, pad_token_id=PAD).save_pretrained(folder / "model")
    _tokenizer.save_pretrained(folder / "model")
    with ServerProcess(str(folder / "model"), folder, "--max-num-seqs", "8") as process:
        yield process


@pytest.fixture
def model(server):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(server.model)


@pytest.fixture
def real_engine(server, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    engine = make_engine(server.url, verify="probe", timeout=240.0, request_timeout=120.0)
    yield engine
    engine.close()


REAL_PROMPTS = [[5 + index, 6, 7] for index in range(24)]
REAL_SAMPLING = SamplingParams(max_completion_length=64, n=2, seed=3, with_logps=True,
                               generation_kwargs={"ignore_eos": True, "stop_token_ids": []})  # fmt: skip


class CuttingProxy:
    """Between client and server; as many answers as `cuts` says end after some bytes."""

    def __init__(self, port: int, after: int = 400):
        self.port_behind, self.cuts, self.after = port, 0, after
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client):
        behind = socket.create_connection(("127.0.0.1", self.port_behind))
        asked = bytearray()

        def forward():
            with contextlib.suppress(OSError):
                while data := client.recv(65536):
                    asked.extend(data)
                    behind.sendall(data)

        threading.Thread(target=forward, daemon=True).start()
        while data := behind.recv(65536):
            is_generation = b"POST /v1/completions" in asked
            if is_generation and self.cuts > 0:
                self.cuts -= 1
                client.sendall(data[: self.after])
                break
            client.sendall(data)
        for side in (client, behind):  # `close` alone waits for the thread that still reads
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)
            side.close()


def test_an_untied_head_gets_there(real_engine, model):
    for _ in range(10):
        shift(model, 0.01)
        real_engine.update_weights(model)
        assert largest_difference(model, real_engine.generate(REAL_PROMPTS[:4], REAL_SAMPLING)) < 1e-4


def test_more_requests_than_the_server_runs_at_a_time(real_engine, model):
    real_engine.update_weights(model)
    rollouts = real_engine.generate(
        [[5 + index % 90, 6] for index in range(100)], SamplingParams(max_completion_length=4)
    )
    assert len(rollouts) == 100 and all(1 <= len(rollout.completion_ids) <= 4 for rollout in rollouts)


def test_real_replies_that_are_cut_short(server, real_engine, model):
    proxy = CuttingProxy(server.port)
    engine = make_engine(proxy.url, verify="probe", timeout=60.0, request_timeout=60.0)
    engine.update_weights(model)
    whole = engine.generate(REAL_PROMPTS[:6], REAL_SAMPLING)
    engine._servers[0].connection.close()  # further requests come over new connections
    proxy.cuts = 3
    again = engine.generate(REAL_PROMPTS[:6], REAL_SAMPLING)
    assert proxy.cuts == 0
    assert [rollout.completion_ids for rollout in again] == [rollout.completion_ids for rollout in whole]
    proxy.listener.close()
    engine.close()


def test_a_real_server_that_stands_still(server, real_engine, model):
    real_engine.update_weights(model)
    os.killpg(server.process.pid, signal.SIGSTOP)
    try:
        real_engine._servers[0].request_timeout = 2.0
        start = time.monotonic()
        with pytest.raises(ServerTimeout, match=re.escape(server.url)):
            real_engine.generate(REAL_PROMPTS[:2], REAL_SAMPLING)
        assert time.monotonic() - start < 20
        threading.Timer(1.5, os.killpg, (server.process.pid, signal.SIGCONT)).start()
        real_engine._servers[0].request_timeout = 60.0
        assert largest_difference(model, real_engine.generate(REAL_PROMPTS[:2], REAL_SAMPLING)) < 1e-4
    finally:
        os.killpg(server.process.pid, signal.SIGCONT)


def test_kill_9_in_the_middle_of_a_generation(server, real_engine, model, monkeypatch):
    """After the restart the server has the weights from disk; what comes back was sampled with the trainer's all the same."""
    shift(model, 0.1)
    real_engine.update_weights(model)
    before = real_engine.generate(REAL_PROMPTS, REAL_SAMPLING)
    answered, complete = [], vllm_server_engine.Server.complete

    def watch(self, request):
        found = complete(self, request)
        answered.append(request)
        if len(answered) == 4:
            server.kill()
            threading.Timer(1.0, server.start).start()
        return found

    monkeypatch.setattr(vllm_server_engine.Server, "complete", watch)
    instance = real_engine._servers[0].info.instance
    after = real_engine.generate(REAL_PROMPTS, REAL_SAMPLING)
    assert real_engine._servers[0].info.instance != instance
    assert len({id(request) for request in answered}) == len(answered) == 24, "each was answered once"
    assert [rollout.completion_ids for rollout in after] == [rollout.completion_ids for rollout in before]
    assert largest_difference(model, after) < 1e-4
