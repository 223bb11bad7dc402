"""The client of a vLLM server, against one that answers and fails as told; no vLLM is needed."""

import inspect
import json
import logging
import math
import sys
import threading
import time
import types

import pytest
import torch

from tests.conftest import build_model
from tests.rollouts.fake_vllm import FakeVLLM, completion_of
from trl.generation.vllm_client import VLLMClient, parse_logprobs, pil_to_base64, to_openai_messages
from trl.rollouts import vllm_transport
from trl.rollouts.vllm_http import ServerConnection, ServerError, ServerLost, ServerTimeout, in_parallel, server_url
from trl.rollouts.vllm_transport import HttpTransport, NcclTransport, read_info
from trl.rollouts.vllm_wire import place_features, sampled_logps


@pytest.fixture
def fake():
    with FakeVLLM() as server:
        yield server


@pytest.fixture
def client(fake):
    client = VLLMClient(base_url=fake.url)
    yield client
    client.close_communicator()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """Pauses between attempts last a tenth."""
    slept = []
    sleep = time.sleep

    def shorter(seconds):
        if threading.current_thread() is threading.main_thread():
            slept.append(seconds)
            seconds /= 10
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", shorter)
    return slept


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


@pytest.fixture
def warned(monkeypatch):
    """Warnings that were logged."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    for name in ("trl.rollouts.vllm_http", "trl.rollouts.vllm_client"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [handler])
    return messages


# ---------------------------------------------------------------------------------------------------------------------
# The connection
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((None, "0.0.0.0", 8000), "http://127.0.0.1:8000"),
        ((None, "::", 8000), "http://[::1]:8000"),
        ((None, "fd00::5", 8000), "http://[fd00::5]:8000"),
        ((None, "node7", 8001), "http://node7:8001"),
        (("http://0.0.0.0:9", "x", 1), "http://127.0.0.1:9"),
        (("https://host/prefix/", "x", 1), "https://host/prefix"),
    ],
)
def test_address(given, expected):
    assert server_url(*given) == expected


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://"])
def test_an_address_that_is_none_is_named(url):
    with pytest.raises(ValueError, match="http://host:8000"):
        server_url(url, "", 0)


def test_signatures_are_those_that_scripts_know():
    """Names, order and defaults of the public methods."""
    generate = inspect.signature(VLLMClient.generate).parameters
    assert [(name, p.default) for name, p in list(generate.items())[1:]] == [
        ("prompts", inspect.Parameter.empty), ("features", None), ("n", 1), ("repetition_penalty", 1.0),
        ("temperature", 1.0), ("top_p", 1.0), ("top_k", 0), ("min_p", 0.0), ("max_tokens", 16), ("logprobs", 0),
        ("structured_outputs_regex", None), ("generation_kwargs", None),
    ]  # fmt: skip
    init = inspect.signature(VLLMClient).parameters
    assert [(name, p.default) for name, p in init.items()] == [
        ("base_url", None), ("host", "0.0.0.0"), ("server_port", 8000), ("group_port", 51216),
        ("connection_timeout", 0.0),
    ]  # fmt: skip
    assert list(inspect.signature(VLLMClient.chat).parameters)[-5:] == [
        "generation_kwargs", "chat_template_kwargs", "tools", "chat_template", "max_concurrent_requests",
    ]  # fmt: skip


def test_a_server_that_is_not_there_is_named_with_the_wait(no_pauses):
    with pytest.raises(ConnectionError, match=r"http://127.0.0.1:1 within 0 s.*refused.*trl vllm-serve"):
        VLLMClient(host="0.0.0.0", server_port=1)
    assert no_pauses == []


def test_a_server_that_starts_late_is_waited_for(fake, warned):
    fake.stop()
    started = threading.Timer(0.4, fake.start)
    started.start()
    client = VLLMClient(base_url=fake.url, connection_timeout=20)
    assert client.model == "tiny"
    assert len([text for text in warned if "Waiting for" in text]) == 1


def test_the_key_goes_with_every_request(monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("VLLM_API_KEY", "right")
    with FakeVLLM(key="right") as fake:
        client = VLLMClient(base_url=fake.url)
        client.generate([[1]])
        client.init_communicator()
        client.update_named_params([("a", "float32", [1])], iter([("a", torch.zeros(1))]))
        assert len(fake.headers) > 6
        assert {headers["Authorization"] for headers in fake.headers} == {"Bearer right"}


@pytest.mark.parametrize(("key", "said"), [(None, "it wants a key. Set VLLM_API_KEY"), ("wrong", "is not the server")])
def test_a_wrong_key_is_named(monkeypatch, key, said):
    if key:
        monkeypatch.setenv("VLLM_API_KEY", key)
    with FakeVLLM(key="right") as fake, pytest.raises(ServerError, match=said) as caught:
        VLLMClient(base_url=fake.url)
    assert caught.value.status == 401
    assert "right" not in str(caught.value)


def test_the_key_is_not_taken_elsewhere(fake):
    fake.fail("/trl/info", "redirect")
    with pytest.raises(ServerError, match="elsewhere") as caught:
        ServerConnection(fake.url, key="secret").get("/trl/info")
    assert caught.value.status == 302


@pytest.mark.parametrize("failure", ["cut", "reset", "garbage"])
def test_what_breaks_off_is_asked_for_again(fake, client, failure, warned):
    fake.fail("/v1/completions", failure, failure)
    answer = client.generate([[4, 5]], max_tokens=4)
    assert answer["completion_ids"] == [completion_of([4, 5], 0, 0, 4)]
    assert len(fake.paths("/v1/completions")) == 3
    assert len([text for text in warned if "Asking again" in text]) == 1, "once per cause"


@pytest.mark.parametrize("failure", ["cut", "reset", "garbage"])
def test_what_breaks_off_each_time_is_an_error(fake, client, failure):
    fake.fail("/v1/completions", *[failure] * 9)
    with pytest.raises(ServerLost, match=fake.url):
        client.generate([[4, 5]])
    assert len(fake.paths("/v1/completions")) == 5


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_busy_server_is_asked_again(fake, client, status, no_pauses):
    fake.fail("/v1/completions", status, status)
    assert client.generate([[4, 5]])["completion_ids"]
    assert no_pauses == [0.5, 1.0]


def test_what_stays_busy_is_an_error_with_status_and_text(fake, client):
    fake.fail("/v1/completions", *[503] * 9)
    with pytest.raises(Exception, match="answered 503: told to say 503"):
        client.generate([[4, 5]])
    assert len(fake.paths("/v1/completions")) == 4


def test_busy_for_longer_than_the_limit_says_how_long(fake):
    fake.fail("/x", *[503] * 9)
    start = time.monotonic()
    with pytest.raises(ServerError, match="asked again for 3 s"):
        ServerConnection(fake.url).request("POST", "/x", seconds=3, body={})
    assert time.monotonic() - start < 8


def test_a_refusal_is_not_repeated(fake, client):
    fake.fail("/v1/completions", 400)
    with pytest.raises(ServerError, match="answered 400: told to say 400"):
        client.generate([[4, 5]])
    assert len(fake.paths("/v1/completions")) == 1


@pytest.mark.parametrize("failure", ["hang", "trickle"])
def test_no_wait_is_without_a_limit(fake, failure):
    connection = ServerConnection(fake.url)
    if failure == "trickle":  # a byte now and then keeps every single read within its limit
        connection.session.request = lambda *_, **__: _Trickle()
    else:
        fake.fail("/v1/models", "hang")
    start = time.monotonic()
    with pytest.raises(ServerTimeout, match=r"within 1 s"):
        connection.get("/v1/models", seconds=1)
    assert time.monotonic() - start < 8


class _Trickle:
    status_code, headers = 200, {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def iter_content(self, _):
        for _ in range(100):
            threading.Event().wait(0.1)
            yield b" "


def test_requests_run_at_the_same_time_within_a_bound(fake):
    fake.seconds = 0.05
    connection = ServerConnection(fake.url)
    values = in_parallel(lambda item: (connection.get("/v1/models"), item)[1], range(20), 4)
    assert values == list(range(20))
    assert 2 <= fake.most_running <= 4


def test_the_first_error_ends_the_others():
    done = []

    def work(item):
        if item == 1:
            raise ValueError("this one")
        time.sleep(0.05)
        done.append(item)

    with pytest.raises(ValueError, match="this one"):
        in_parallel(work, range(50), 2)
    time.sleep(3)
    assert len(done) <= 2


def test_running_calls_are_waited_for_where_asked():
    done, together = [], threading.Barrier(3)

    def work(item):
        together.wait(60)
        if item == 0:
            raise ServerLost("gone")
        threading.Event().wait(0.2)
        done.append(item)

    with pytest.raises(ServerLost):
        in_parallel(work, range(50), 3, settle_on=(ServerLost,))
    assert len(done) == 2


# ---------------------------------------------------------------------------------------------------------------------
# What is sent and what comes back
# ---------------------------------------------------------------------------------------------------------------------


def test_generate(fake, client):
    answer = client.generate(
        [[4, 5], [6]], n=2, max_tokens=3, structured_outputs_regex="a+", generation_kwargs={"top_k": 7, "seed": 3}
    )
    assert answer["prompt_ids"] == [[4, 5], [6]]
    expected = [completion_of(prompt, 3, index, 3) for prompt in ([4, 5], [6]) for index in range(2)]
    assert answer["completion_ids"] == expected
    assert answer["logprobs"] == [[[-token / 100] for token in ids] for ids in expected]
    assert answer["logprob_token_ids"] == [[[token] for token in ids] for ids in expected]
    sent = fake.calls[-1][2]
    assert sent == {
        "model": "tiny", "prompt": [[4, 5], [6]], "return_token_ids": True, "return_tokens_as_token_ids": True, "n": 2,
        "repetition_penalty": 1.0, "temperature": 1.0, "top_p": 1.0, "top_k": 7, "min_p": 0.0, "max_tokens": 3,
        "logprobs": 0, "structured_outputs": {"regex": "a+"}, "seed": 3,
    }  # fmt: skip


def test_generate_without_logprobs(client):
    answer = client.generate([[4, 5]], logprobs=None)
    assert answer["logprobs"] is None
    assert answer["logprob_token_ids"] is None


def test_chat_sends_images_tools_and_templates(fake, client, monkeypatch):
    from PIL import Image

    def add(a: int, b: int) -> int:
        """
        Add numbers.

        Args:
            a: one.
            b: another.
        """

    choice = {
        "token_ids": [7],
        "logprobs": {"content": [{"token": "token_id:7", "logprob": -1.5, "top_logprobs": []}]},
    }
    answered = []

    def answer(method, path, body, headers):
        answered.append(json.loads(body))
        return 200, {"prompt_token_ids": [1, 2], "choices": [choice]}, {}

    monkeypatch.setattr(fake, "answer", answer)
    image = Image.new("RGB", (2, 2), "red")
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]}]
    answer = client.chat(
        [messages, messages], tools=[add], chat_template="T", chat_template_kwargs={"think": False}, logprobs=2
    )
    assert answer["prompt_ids"] == [[1, 2], [1, 2]]
    assert answer["completion_ids"] == [[7], [7]]
    assert answer["logprobs"] == [[[-1.5]], [[-1.5]]]
    sent = answered[0]
    part = sent["messages"][0]["content"][0]
    assert part == {"type": "image_url", "image_url": {"url": "data:image/png;base64," + pil_to_base64(image)}}
    assert sent["tools"][0]["function"]["name"] == "add"
    assert (sent["tool_choice"], sent["chat_template"], sent["chat_template_kwargs"]) == (
        "none",
        "T",
        {"think": False},
    )
    assert (sent["logprobs"], sent["top_logprobs"]) == (True, 2)


def test_openai_messages_leave_text_and_addresses_alone():
    text = {"role": "user", "content": "Hi"}
    block = {"type": "image", "url": "https://host/a.png"}
    assert to_openai_messages([text]) == [text]
    found = to_openai_messages([{"role": "user", "content": [block]}])
    assert found[0]["content"] == [{"type": "image_url", "image_url": {"url": "https://host/a.png"}}]
    with pytest.raises(ValueError, match="placeholder without an image"):
        to_openai_messages([{"role": "user", "content": [{"type": "image"}]}])


def test_scores_are_padded_and_finite_or_minus_infinity(fake, client, monkeypatch):
    places = [None, {"5": {"logprob": -2.0, "rank": 3}, "9": {"logprob": -0.5, "rank": 1}},
              {"6": {"logprob": math.nan, "rank": 1}}]  # fmt: skip
    asked = []

    def answer(method, path, body, headers):
        asked.append(json.loads(body))
        return 200, {"choices": [{"prompt_logprobs": places} for _ in asked[-1]["prompt"]]}, {}

    monkeypatch.setattr(fake, "answer", answer)
    found = client.get_sequence_logprobs([[4, 5, 6]] * 3, [1, 1, 2], top_logprobs=3, chunk_size=2)
    assert found["logprobs"][0] == [[-0.5, -2.0, -math.inf], [-math.inf] * 3]
    assert found["logprob_token_ids"][0] == [[9, 5, 0], [6, 0, 0]]
    assert found["actual_logprobs"] == [[[-2.0], [-math.inf]]] * 2 + [[[-math.inf]]]
    assert found["actual_token_ids"] == [[[5], [6]]] * 2 + [[[6]]]
    assert sorted(len(body["prompt"]) for body in asked) == [1, 2]
    assert {body["prompt_logprobs"] for body in asked} == {3}


@pytest.mark.parametrize(("temperature", "lengths"), [(0.0, [1]), (1.0, [1, 2])])
def test_scores_that_make_no_sense_are_refused(client, temperature, lengths):
    with pytest.raises(ValueError):
        client.get_sequence_logprobs([[4, 5]], lengths, temperature=temperature)


def test_logprobs_are_ranked_and_unknown_ones_told():
    completions = {
        "tokens": ["token_id:5", "token_id:6"],
        "token_logprobs": [-2.0, math.nan],
        "top_logprobs": [{"token_id:5": -2.0, "token_id:9": -0.5}, None],
    }
    chat = {"content": [{"token": "token_id:5", "logprob": -2.0, "top_logprobs": [{"token_id": 9, "logprob": -0.5}]}]}
    assert parse_logprobs([completions]) == ([[[-0.5, -2.0], [None]]], [[[9, 5], [6]]])
    assert parse_logprobs([chat]) == ([[[-0.5, -2.0]]], [[[9, 5]]])
    assert parse_logprobs([completions, None]) == (None, None)
    assert parse_logprobs([]) == ([], [])
    logps = sampled_logps({"token_logprobs": [-2.0, None]})
    assert logps[0] == -2.0 and math.isnan(logps[1])
    assert sampled_logps(chat) == [-2.0]
    assert sampled_logps(None) is None


def test_features_are_put_where_the_prompt_has_its_images():
    features = {
        "mm_hashes": {"image": ["a", "b"]},
        "mm_placeholders": {"image": [{"offset": 0, "length": 2}, {"offset": 2, "length": 3}]},
    }
    placed = place_features(features, [1, 7, 7, 2, 7, 7, 7], 7)
    assert placed["mm_placeholders"]["image"] == [{"offset": 1, "length": 2}, {"offset": 4, "length": 3}]
    assert placed["mm_hashes"] == features["mm_hashes"]
    side_by_side = place_features(features, [1, 7, 7, 7, 7, 7, 2], 7)
    assert side_by_side["mm_placeholders"]["image"] == [{"offset": 1, "length": 2}, {"offset": 3, "length": 3}]
    for ids in ([1, 7, 7], [7, 7, 1, 7, 7], [7, 7, 1, 7, 7, 7, 7], [7, 7, 7, 1, 7, 7], [7, 7, 1, 7, 7, 7, 2, 7]):
        with pytest.raises(ValueError, match="same processor"):
            place_features(features, ids, 7)


def test_a_server_that_renders_no_images_is_named(client):
    assert client.image_features([None]) == [None]
    from PIL import Image

    with pytest.raises(RuntimeError, match="--enable-scale-out"):
        client.image_features([[Image.new("RGB", (2, 2))]])


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------


def test_a_model_gets_there_whole(fake, client):
    model = build_model()
    client.init_communicator()
    client.update_model_params(model)
    expected = model.state_dict()
    assert fake.weights.keys() == expected.keys()
    assert all(torch.equal(fake.weights[name], tensor) for name, tensor in expected.items())
    assert fake.version == "first:1"
    assert fake.owner == client.owner


def test_weights_of_a_block_are_one_update(fake, client):
    client.init_communicator()
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.zeros(2).t()}
    with client.weight_update():
        client.update_named_param("a", weights["a"])
        client.update_named_params([("b", "bfloat16", [4]), ("c", "float32", [2])], iter([*weights.items()][1:]))
        assert fake.version == "first:0"
    assert fake.version == "first:1"
    assert all(torch.equal(fake.weights[name], tensor) for name, tensor in weights.items())
    assert fake.weights["b"].dtype == torch.bfloat16


def test_no_update_after_an_error_in_the_block(fake, client):
    client.init_communicator()

    def break_off():
        with client.weight_update():
            client.update_named_param("a", torch.ones(1))
            raise KeyError

    with pytest.raises(KeyError):
        break_off()
    assert fake.version == "first:0"
    with client.weight_update():
        client.update_named_param("b", torch.ones(1))
    assert fake.weights.keys() == {"b"}


def test_bodies_are_bounded_and_views_are_sent_whole(fake):
    base = torch.arange(4000.0)
    weights = [(f"w{index}", base[index * 500 : index * 500 + 500]) for index in range(8)] + [
        ("t", base.view(40, 100).T)
    ]
    manifest = [vllm_transport.weight_info(*pair) for pair in weights]
    version = HttpTransport(ServerConnection(fake.url), "me", body_bytes=4096).push(manifest, iter(weights))
    assert version == "first:1"
    assert len(fake.body_sizes) == 5 and max(fake.body_sizes[:-1]) < 4096 + 1024
    assert all(torch.equal(fake.weights[name], tensor) for name, tensor in weights)


def test_a_failed_update_is_dropped(fake):
    fake.fail("/trl/weights/token", 400)
    weights = [("a", torch.ones(2))]
    transport = HttpTransport(ServerConnection(fake.url), "me")
    with pytest.raises(ServerError, match="told to say 400"):
        transport.push([vllm_transport.weight_info(*weights[0])], weights)
    assert "DELETE /trl/weights/token" in fake.paths()
    assert fake.updating is None


def test_a_commit_whose_answer_is_lost_still_counts(fake):
    fake.fail("/trl/weights/token/commit", "cut")
    weights = [("a", torch.ones(2))]
    transport = HttpTransport(ServerConnection(fake.url), "me")
    assert transport.push([vllm_transport.weight_info(*weights[0])], weights) == "first:1"


def test_a_commit_that_did_not_get_through_does_not_count(fake):
    fake.fail("/trl/weights/token/commit", "reset")
    weights = [("a", torch.ones(2))]
    with pytest.raises(ServerLost):
        HttpTransport(ServerConnection(fake.url), "me").push([vllm_transport.weight_info(*weights[0])], weights)
    assert fake.version == "first:0"


def test_another_trainers_update_is_named(fake, monkeypatch):
    monkeypatch.setattr(vllm_transport, "OTHERS_UPDATE_SECONDS", 2.0)
    fake.fail("/trl/weights", *[409] * 9)
    with pytest.raises(RuntimeError, match="another trainer uses the server"):
        HttpTransport(ServerConnection(fake.url), "me").push([], [])


def test_weights_before_the_handshake_are_refused(client):
    with pytest.raises(RuntimeError, match="init_communicator"):
        client.update_named_param("a", torch.ones(1))


def test_another_protocol_is_refused():
    with FakeVLLM(protocol=2) as fake, pytest.raises(RuntimeError, match="version 2 of the weight protocol"):
        read_info(ServerConnection(fake.url))


# ---------------------------------------------------------------------------------------------------------------------
# A stock server, and NCCL
# ---------------------------------------------------------------------------------------------------------------------


def test_a_stock_server_generates_and_takes_no_weights():
    with FakeVLLM(stock=True) as fake:
        client = VLLMClient(base_url=fake.url)
        assert client.generate([[4, 5]], max_tokens=2)["completion_ids"] == [completion_of([4, 5], 0, 0, 2)]
        with pytest.raises(RuntimeError, match="trl vllm-serve"):
            client.init_communicator()
        with pytest.raises(RuntimeError, match="VLLM_SERVER_DEV_MODE"):
            client.get_server_info()
        assert client.get_world_size() == 1


def test_only_nccl_and_no_cuda_is_not_implemented(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with FakeVLLM(transports=["nccl"]) as fake:
        client = VLLMClient(base_url=fake.url)
        with pytest.raises(NotImplementedError, match="needs a CUDA device"):
            client.init_communicator()


class _Engine:
    """Stands in for vLLM's trainer side: makes the calls that it makes, in its order."""

    def __init__(self, info, client, source):
        self.info, self.client, self.source, self.sent = info, client, source, []
        client.init_weight_transfer_engine({"master_port": info["master_port"], "world_size": info["world_size"]})

    def send_weights(self):
        meta = self.source.metadata()
        self.client.start_weight_update()
        self.client.update_weights({"names": [one.name for one in meta]})
        self.sent.append([(name, tensor.clone()) for name, tensor in self.source])
        assert [one.shape for one in meta] == [tuple(tensor.shape) for _, tensor in self.sent[-1]]
        self.client.finish_weight_update()

    def shutdown(self):
        self.sent = None


@pytest.fixture
def fake_nccl(monkeypatch):
    """vLLM's modules for NCCL without NCCL. What happens on GPUs is not tested here."""
    engines = []

    class Trainer:
        @classmethod
        def trainer_init(cls, info, *, client, source):
            engines.append(_Engine(info, client, source))
            return engines[-1]

    class ParamMeta:
        def __init__(self, name, dtype, shape):
            self.name, self.dtype, self.shape = name, dtype, shape

    engine = types.ModuleType("nccl_engine")
    engine.NCCLTrainerWeightTransferEngine, engine.NCCLTrainerInitInfo = Trainer, lambda **info: info
    base = types.ModuleType("vllm.distributed.weight_transfer.base")
    base.ParamMeta = ParamMeta
    package = types.ModuleType("vllm.distributed.weight_transfer")
    package.nccl_engine, package.base = engine, base
    for name in ("vllm", "vllm.distributed"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.no_grad())
    return engines


def test_nccl_calls_come_in_order(fake_nccl, monkeypatch):
    with FakeVLLM(transports=["nccl", "http"], world_size=2) as fake:
        answer = fake.answer

        def open_routes(method, path, body, headers):
            if path == "/trl/weights/version":
                fake.updates += 1
                return 200, {"weights": fake.version}, {}
            return (
                (200, {}, {})
                if "weight_" in path or path == "/update_weights"
                else answer(method, path, body, headers)
            )

        monkeypatch.setattr(fake, "answer", open_routes)
        connection = ServerConnection(fake.url)
        transport = NcclTransport(connection, read_info(connection), "me", 51216, device="cpu")
        fake.calls.clear()
        weights = [("a", torch.ones(2)), ("b", torch.zeros(3, 1))]
        manifest = [vllm_transport.weight_info(*pair) for pair in weights]
        assert transport.push(manifest, iter(weights)) == "first:1"
        assert transport.push(manifest, iter(weights)) == "first:2"
        update = [f"POST /{name}" for name in ("start_weight_update", "update_weights", "finish_weight_update")]
        update.append("POST /trl/weights/version")
        assert fake.paths() == ["POST /init_weight_transfer_engine", *update, *update]
        assert fake.calls[0][2] == {"init_info": {"master_port": 51216, "world_size": 3}}
        assert [name for name, _ in fake_nccl[0].sent[1]] == ["a", "b"]
        transport.close()
        assert fake.paths()[-1] == "POST /shutdown_weight_transfer_engine"


def test_a_broken_nccl_update_leaves_its_group(fake_nccl, monkeypatch):
    with FakeVLLM(transports=["nccl"]) as fake:
        answer = fake.answer
        monkeypatch.setattr(
            fake,
            "answer",
            lambda method, path, *rest: (200, {}, {}) if "weight_transfer" in path else answer(method, path, *rest),
        )
        connection = ServerConnection(fake.url)
        transport = NcclTransport(connection, read_info(connection), "me", 51216, device="cpu")
        with pytest.raises(ServerError, match="404"):
            transport.push([], [])
        fake.fail("/start_weight_update", 503)
        with pytest.raises(ServerLost, match="did not get through"):
            transport.push([], [])
        assert fake.paths()[-1] == "POST /shutdown_weight_transfer_engine"
        assert transport._engine is None
