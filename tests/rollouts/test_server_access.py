"""Who may ask a rollout server, how much a request may bring, and the gate between generation and new weights."""

import asyncio
import json

import pytest

from trl.rollouts import server_access
from trl.rollouts.server_access import (
    AccessRules,
    Disconnected,
    GateTimeout,
    GenerationGate,
    RequestBody,
    RequestError,
    ServerLimits,
    check_values,
    is_loopback,
    replay,
)


def scope(**headers: str) -> dict:
    raw = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    return {"type": "http", "method": "GET", "path": "/", "headers": raw}


def sender(*pieces: bytes | None):
    """A `receive` of pieces; None is a sender who stops, the end one who is gone."""
    waiting = list(pieces)

    async def receive() -> dict:
        if not waiting:
            return {"type": "http.disconnect"}
        piece = waiting.pop(0)
        if piece is None:
            await asyncio.sleep(3600)
        return {"type": "http.request", "body": piece, "more_body": bool(waiting)}

    return receive


# ---- Who ----


@pytest.mark.parametrize("header", ["Bearer key", "bearer key", "Bearer other"])
def test_the_key_lets_in(header):
    AccessRules(("key", "other")).check(scope(authorization=header))


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Bearer keys", "Bearer  key", "Basic key", "key", "Bearer ke"]
)
def test_anything_else_does_not(header):
    with pytest.raises(RequestError, match="VLLM_API_KEY") as caught:
        AccessRules(("key",)).check(scope(authorization=header))
    assert caught.value.status == 401


def test_two_keys_at_once_do_not():
    request = scope()
    request["headers"] = [(b"authorization", b"Bearer key"), (b"authorization", b"Bearer x")]
    with pytest.raises(RequestError):
        AccessRules(("key",)).check(request)
    with pytest.raises(RequestError):
        AccessRules(("key",)).check(scope())


def test_the_key_is_not_shown():
    assert "secret" not in repr(AccessRules(("secret",)))


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000", "0.0.0.0:8000", "10.0.0.5"]
)
def test_without_a_key_the_server_is_named_by_address(host):
    AccessRules().check(scope(host=host))
    AccessRules().check(scope(host=host, origin="http://localhost:3000"))


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example:8000"},
        {"host": "localhost.evil.example"},
        {"host": ""},
        {"host": "localhost:8000", "origin": "http://evil.example"},
        {"host": "0.0.0.0:8000", "origin": "null"},
        {"host": "127.0.0.1", "origin": "http://10.0.0.5"},
    ],
)
def test_web_pages_are_kept_out_without_a_key(headers):
    with pytest.raises(RequestError) as caught:
        AccessRules().check(scope(**headers))
    assert caught.value.status == 403
    AccessRules(("key",)).check(scope(authorization="Bearer key", **headers))


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *((name, True) for name in ("localhost", "127.0.0.1", "127.8.8.8", "::1")),
        *((name, False) for name in (None, "", "0.0.0.0", "::", "10.0.0.5", "machine", "localhost.evil.example")),
    ],
)
def test_loopback(host, expected):
    assert is_loopback(host) is expected


# ---- Bodies ----


def read(limit: int, *pieces: bytes | None, **headers: str) -> bytes:
    return asyncio.run(RequestBody(scope(**headers), sender(*pieces)).read(limit))


def test_bodies_are_put_together():
    assert read(10, b"ab", b"", b"cd", content_length="4") == b"abcd"
    assert read(10, b"ab", b"cd", transfer_encoding="chunked") == b"abcd"
    assert read(10) == b""


def test_large_bodies_are_refused_before_they_are_read():
    with pytest.raises(RequestError, match="TRL_SERVER_MAX_BODY_MIB") as caught:
        read(10, None, content_length="11")
    assert caught.value.status == 413
    with pytest.raises(RequestError):
        read(10, b"abcdef", b"ghijkl", None, transfer_encoding="chunked")


def test_a_sender_who_is_gone():
    with pytest.raises(Disconnected):
        read(10, content_length="5")


def test_a_sender_who_stops(monkeypatch):
    monkeypatch.setattr(server_access, "BODY_SECONDS", 0.05)
    with pytest.raises(RequestError) as caught:
        read(10, b"ab", None, content_length="5")
    assert caught.value.status == 408


@pytest.mark.parametrize("length", ["-1", "1, 2", "x", "+5", "", "1" * 30])
def test_lengths_that_are_none(length):
    assert RequestBody(scope(content_length=length), sender()).length is None
    assert RequestBody(scope(content_length="5", transfer_encoding="chunked"), sender()).length is None


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"1", b"\xff", b"[" * 100_000])
def test_bodies_that_are_no_json_object(text):
    with pytest.raises(RequestError) as caught:
        asyncio.run(RequestBody(scope(content_length=str(len(text))), sender(text)).read_json(10**6))
    assert caught.value.status == 400


def test_a_refused_body_is_read_within_limits():
    async def drain(*pieces, limit=10, **headers):
        body = RequestBody(scope(content_length="100", **headers), sender(*pieces))
        await asyncio.wait_for(body.drain(limit), 2)
        return body.is_read

    assert asyncio.run(drain(b"abc", b"def"))
    assert not asyncio.run(drain(b"abcdefghijkl", None))
    assert not asyncio.run(drain(b"abc", None, expect="100-continue"))  # it was not sent yet


def test_a_read_body_can_be_read_again():
    async def run():
        receive = replay(b"abc", sender())
        return [await receive(), await receive()]

    first, second = asyncio.run(run())
    assert first == {"type": "http.request", "body": b"abc", "more_body": False}
    assert second == {"type": "http.disconnect"}


@pytest.mark.parametrize(
    "body",
    [
        b'{"top_k": 9223372036854775808}',
        b'{"a": [{"b": -9223372036854775809}]}',
        b'{"stop": "\\ud800"}',
        b'{"\\udfff": 1}',
        b'{"stop": "\xed\xa0\x80"}',
        '{"top_k": 9223372036854775808}'.encode("utf-16"),
        b'{"structured_outputs": true}',
        b'{"structured_outputs": [1]}',
    ],
)
def test_values_that_vllm_chokes_on(body):
    with pytest.raises(RequestError) as caught:
        check_values(body)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "body",
    [
        b'{"seed": 9223372036854775807, "a": -9223372036854775808}',
        b'{"stop": "\\ud83d\\ude00 \xf0\x9f\x98\x80", "n": 1.0000000000000000000001}',
        b'{"structured_outputs": {"regex": "[0-9]{20}"}}',
        b'{"structured_outputs": null}',
        b"99999999999999999999 is no JSON",
        json.dumps({"image": "1234567890" * 100}).encode(),
    ],
)
def test_values_that_are_fine(body):
    check_values(body)


def test_limits_from_the_environment(monkeypatch):
    assert ServerLimits.from_environment() == ServerLimits()
    monkeypatch.setenv("TRL_SERVER_MAX_BODY_MIB", "0.5")
    monkeypatch.setenv("TRL_SERVER_WAIT_SECONDS", "7")
    monkeypatch.setenv("TRL_SERVER_STAGING_DIR", "/weights")
    assert ServerLimits.from_environment() == ServerLimits(2**19, 7.0, "/weights")
    for wrong in ("0", "-1", "x", "nan", "inf"):
        monkeypatch.setenv("TRL_SERVER_WAIT_SECONDS", wrong)
        with pytest.raises(ValueError, match="TRL_SERVER_WAIT_SECONDS"):
            ServerLimits.from_environment()


# ---- The gate ----


def test_a_change_waits_for_those_inside_and_keeps_new_ones_waiting():
    async def run() -> list[str]:
        gate, order, leave = GenerationGate(), [], asyncio.Event()

        async def generate(name: str, until: asyncio.Event | None = None):
            async with gate.generation(5):
                order.append(f"{name} in")
                if until is not None:
                    await until.wait()
                order.append(f"{name} out")

        async def change():
            async with gate.change(5):
                order.append("change in")
                await asyncio.sleep(0.02)
                order.append("change out")

        tasks = [asyncio.create_task(generate(name, leave)) for name in ("a", "b")]
        await asyncio.sleep(0.01)
        tasks.append(asyncio.create_task(change()))
        await asyncio.sleep(0.01)
        tasks.append(asyncio.create_task(generate("late")))
        await asyncio.sleep(0.02)
        order.append("leave")
        leave.set()
        await asyncio.gather(*tasks)
        return order

    order = asyncio.run(run())
    assert order[:3] == ["a in", "b in", "leave"]
    assert order[5:] == ["change in", "change out", "late in", "late out"]


def test_changes_come_one_after_the_other():
    async def run() -> list[int]:
        gate, inside, most = GenerationGate(), 0, []

        async def change():
            nonlocal inside
            async with gate.change(5):
                inside += 1
                most.append(inside)
                await asyncio.sleep(0.005)
                inside -= 1

        await asyncio.gather(*(change() for _ in range(5)))
        return most

    assert asyncio.run(run()) == [1] * 5


def test_nobody_waits_for_ever():
    async def run():
        gate = GenerationGate()
        async with gate.generation(1):
            with pytest.raises(GateTimeout):
                async with gate.change(0.05):
                    pytest.fail("a request is inside")
            async with gate.generation(0.05):  # the change that gave up keeps nobody out
                assert gate.running == 2
        async with gate.change(1):
            with pytest.raises(GateTimeout):
                async with gate.generation(0.05):
                    pytest.fail("a change is under way")
            with pytest.raises(GateTimeout):
                async with gate.change(0.05):
                    pytest.fail("a change is under way")
        async with gate.generation(0.05):
            assert gate.running == 1

    asyncio.run(run())


def test_whoever_fails_or_is_cancelled_leaves():
    async def run():
        gate = GenerationGate()

        async def stay():
            async with gate.generation(1):
                await asyncio.sleep(3600)

        task = asyncio.create_task(stay())
        await asyncio.sleep(0.01)
        waiting = asyncio.create_task(gate.close(5))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        with pytest.raises(KeyError):
            async with gate.generation(1):
                raise KeyError
        with pytest.raises(KeyError):
            async with gate.change(1):
                raise KeyError
        async with gate.change(0.05):
            assert gate.running == 0

    asyncio.run(run())
