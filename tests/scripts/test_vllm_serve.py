"""`trl vllm-serve`: its flags, the command it becomes, and what it refuses before a model is loaded."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import warnings

import pytest

from trl.scripts import vllm_serve
from trl.scripts.vllm_serve import (
    ScriptArguments,
    build_command,
    build_environment,
    chunk_list,
    main,
    make_parser,
    read_arguments,
)

DEFAULTS = {
    "revision": None,
    "tensor_parallel_size": 1,
    "data_parallel_size": 1,
    "host": "127.0.0.1",
    "port": 8000,
    "gpu_memory_utilization": 0.9,
    "dtype": "auto",
    "max_model_len": None,
    "enable_prefix_caching": None,
    "enforce_eager": False,
    "kv_cache_dtype": "auto",
    "trust_remote_code": False,
    "log_level": "info",
    "vllm_model_impl": "vllm",
    "distributed_executor_backend": None,
    "speculative_config": None,
}


@pytest.fixture
def machine(monkeypatch):
    """`machine(cuda, version)` says what there is: whether a GPU, and which vLLM or None."""

    def be(cuda: bool = False, version: str | None = "0.32.0"):
        monkeypatch.setattr(vllm_serve, "_has_cuda", lambda: cuda)

        def is_available(min_version=None):
            found = version is not None and tuple(map(int, version.split(".")))
            return bool(found) and (min_version is None or found >= tuple(map(int, min_version.split("."))))

        monkeypatch.setattr(vllm_serve, "is_vllm_available", is_available)

    for name in ("VLLM_API_KEY", "VLLM_SERVER_DEV_MODE", "VLLM_USE_RUST_FRONTEND", "VLLM_NO_USAGE_STATS"):
        monkeypatch.delenv(name, raising=False)
    be()
    return be


@pytest.fixture
def executed(monkeypatch):
    """What the process would have become: a list of (program, arguments, environment)."""
    calls = []
    monkeypatch.setattr(vllm_serve.os, "execve", lambda *call: calls.append(call))
    return calls


@pytest.fixture
def taken_port():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def value_of(command: list[str], flag: str) -> str:
    assert command.count(flag) == 1, command
    return command[command.index(flag) + 1]


# ---- Flags ----


def test_defaults():
    arguments = dataclasses.asdict(ScriptArguments(model="m"))
    assert arguments.pop("model") == "m"
    assert arguments == DEFAULTS


def test_flags_have_both_spellings_and_a_help_text():
    help_text = make_parser(prog="trl vllm-serve").format_help()
    for name in DEFAULTS:
        assert f"--{name}" in help_text
        if "_" in name:
            assert f"--{name.replace('_', '-')}" in help_text
    for word in ("VLLM_API_KEY", "--host 0.0.0.0", "TRL_SERVER_STAGING_DIR", "TRL_SERVER_WAIT_SECONDS", "float32"):
        assert word in help_text
    assert all(field.metadata["help"] for field in dataclasses.fields(ScriptArguments))


def test_the_model_has_to_be_named(capsys):
    with pytest.raises(SystemExit):
        read_arguments([])
    assert "--model" in capsys.readouterr().err


def test_what_is_not_known_is_kept_as_it_is(tmp_path):
    config = tmp_path / "serve.yaml"
    config.write_text("model: m\nport: 9\nquantization: fp8\ndisable_log_stats: true\nenable_chunked_prefill: false\n")
    script_args, extra = read_arguments(
        ["--config", str(config), "--port", "10", "--hf-overrides", '{"a": 1}', "--swap=4", "--enforce-eager"]
    )
    assert (script_args.model, script_args.port, script_args.enforce_eager) == ("m", 10, True)
    assert extra == [
        *["--quantization", "fp8", "--disable_log_stats", "--no-enable_chunked_prefill"],
        *["--hf-overrides", '{"a": 1}', "--swap=4"],
    ]


def test_parser_as_a_subcommand():
    from trl import TrlParser

    parser = TrlParser(prog="x")
    make_parser(parser.add_subparsers(dest="command"))
    assert parser.parse_args(["vllm-serve", "--model", "m"]).port == 8000


# ---- The command ----


def test_command_of_the_defaults(machine):
    command = build_command(ScriptArguments(model="org/model"))
    assert command[:5] == [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", "org/model"]
    expected = {
        "--host": "127.0.0.1",
        "--port": "8000",
        "--tensor-parallel-size": "1",
        "--data-parallel-size": "1",
        "--gpu-memory-utilization": "0.9",
        "--dtype": "auto",
        "--kv-cache-dtype": "auto",
        "--model-impl": "vllm",
        "--uvicorn-log-level": "info",
        "--logprobs-mode": "processed_logprobs",
        "--max-logprobs": "-1",
        "--api-server-count": "1",
        "--middleware": "trl.rollouts.vllm_server.WeightRoutes",
        "--worker-extension-cls": "trl.rollouts.vllm_worker.WeightWorker",
    }
    assert {flag: value_of(command, flag) for flag in expected} == expected
    assert command[-1] == "--enable-scale-out"
    assert len(command) == 5 + 2 * len(expected) + 1


def test_the_named_classes_exist():
    import importlib

    for name in (vllm_serve.MIDDLEWARE, vllm_serve.WORKER_EXTENSION):
        module, _, attribute = name.rpartition(".")
        assert isinstance(getattr(importlib.import_module(module), attribute), type)


def test_command_of_everything(machine):
    script_args = ScriptArguments(
        model="m",
        revision="main",
        tensor_parallel_size=2,
        data_parallel_size=4,
        max_model_len=100,
        enable_prefix_caching=False,
        enforce_eager=True,
        trust_remote_code=True,
        distributed_executor_backend="ray",
        speculative_config='{"method": "ngram"}',
    )
    command = build_command(script_args, ["--quantization", "fp8"])
    assert command[-2:] == ["--quantization", "fp8"]
    for flag, value in {
        "--revision": "main",
        "--tensor-parallel-size": "2",
        "--data-parallel-size": "4",
        "--max-model-len": "100",
        "--distributed-executor-backend": "ray",
        "--speculative-config": '{"method": "ngram"}',
        "--api-server-count": "1",
    }.items():
        assert value_of(command, flag) == value
    assert {"--no-enable-prefix-caching", "--enforce-eager", "--trust-remote-code"} <= set(command)
    assert "--enable-prefix-caching" in build_command(ScriptArguments(model="m", enable_prefix_caching=True))


def test_nccl_only_where_there_is_cuda(machine):
    assert "--weight-transfer-config" not in build_command(ScriptArguments(model="m"))
    assert "VLLM_SERVER_DEV_MODE" not in build_environment()
    machine(cuda=True)
    command = build_command(ScriptArguments(model="m"))
    assert json.loads(value_of(command, "--weight-transfer-config")) == {"backend": "nccl"}
    assert build_environment()["VLLM_SERVER_DEV_MODE"] == "1"


def test_flags_that_older_versions_do_not_have(machine):
    machine(version="0.29.1")
    assert "--enable-scale-out" not in build_command(ScriptArguments(model="m"))


def test_vllm_knows_every_option_of_the_command(machine):
    """Held against the installed vLLM's own parser, all in one."""
    pytest.importorskip("vllm")
    script_args = ScriptArguments("m", "main", 2, 2, max_model_len=100, enable_prefix_caching=True, enforce_eager=True)
    script_args.distributed_executor_backend, script_args.trust_remote_code = "mp", True
    options = build_command(script_args)[4:]
    code = (
        "import sys\nfrom vllm.entrypoints.cli.serve import cmd_init\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "subparsers = FlexibleArgumentParser().add_subparsers()\n"
        "args = cmd_init()[0].subparser_init(subparsers).parse_args(sys.argv[1:])\n"
        "print(args.api_server_count, args.middleware, args.worker_extension_cls, args.max_logprobs, args.port)"
    )
    result = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    expected = f"1 ['{vllm_serve.MIDDLEWARE}'] {vllm_serve.WORKER_EXTENSION} -1 8000"
    assert result.stdout.splitlines()[-1] == expected


def test_environment(machine, monkeypatch):
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    monkeypatch.setenv("SOMETHING", "else")
    environment = build_environment()
    assert environment["VLLM_USE_RUST_FRONTEND"] == "0"  # it would leave the middleware out
    assert environment["VLLM_NO_USAGE_STATS"] == "1"
    assert environment["SOMETHING"] == "else"


@pytest.mark.parametrize(
    "extra",
    [
        ["--api-server-count", "2"],
        ["--api_server_count=2"],
        ["--api-server", "2"],
        ["--headless"],
        ["--grpc"],
        ["--worker-extension-cls", "mine.Worker"],
        ["--data-parallel-hybrid-lb"],
    ],
)
def test_options_that_would_undo_the_command(machine, extra):
    with pytest.raises(ValueError, match=f"`{extra[0]}` cannot be used"):
        build_command(ScriptArguments(model="m"), extra)


def test_options_that_only_look_alike(machine):
    extra = ["--api-key", "k", "--grpc-like", "--data-parallel-backend", "ray", "--served-model-name", "headless"]
    assert build_command(ScriptArguments(model="m"), extra)[-len(extra) :] == extra


# ---- What is refused ----


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "machine", ""])
def test_other_machines_need_a_key(machine, executed, monkeypatch, host):
    with pytest.raises(ValueError, match="VLLM_API_KEY=") as caught:
        main(ScriptArguments(model="m", host=host))
    assert "secrets.token_urlsafe" in str(caught.value)
    assert executed == []


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.0.0.2"])
def test_this_machine_needs_none(machine, executed, host):
    main(ScriptArguments(model="m", host=host, port=free_port()))
    assert len(executed) == 1


def test_a_key_opens_the_server(machine, executed, monkeypatch):
    main(ScriptArguments(model="m", host="0.0.0.0", port=free_port()), ["--api-key", "k"])
    monkeypatch.setenv("VLLM_API_KEY", "k")
    main(ScriptArguments(model="m", host="0.0.0.0", port=free_port()))
    program, command, environment = executed[-1]
    assert program == command[0] == sys.executable
    assert value_of(command, "--host") == "0.0.0.0"
    assert environment["VLLM_API_KEY"] == "k"
    assert "k" not in command  # others on this machine can see it there


def test_a_port_in_use(machine, executed, taken_port):
    with pytest.raises(ValueError, match=rf"Port {taken_port} on 127.0.0.1 is in use.*--port {taken_port + 1}"):
        main(ScriptArguments(model="m", port=taken_port))
    assert executed == []
    main(ScriptArguments(model="m", port=taken_port), ["--uds", "/tmp/socket"])  # no port is taken


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70000), ("127.0.0.1", -1), ("203.0.113.7", 8000)])
def test_addresses_that_cannot_be_listened_on(machine, executed, monkeypatch, host, port):
    monkeypatch.setenv("VLLM_API_KEY", "k")
    with pytest.raises(ValueError, match=str(port)):
        main(ScriptArguments(model="m", host=host, port=port))
    assert executed == []


def test_vllm_is_not_installed(machine, executed):
    machine(version=None)
    with pytest.raises(ImportError, match=r"trl\[vllm\]"):
        main(ScriptArguments(model="m"))


def test_no_warning_that_it_will_go_away(machine, executed):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        main(ScriptArguments(model="m", port=free_port()))


def test_a_float32_model_is_not_taken_down_unnoticed(machine, executed, capsys, tmp_path):
    for config, dtype, warned in (
        ({"dtype": "float32"}, "auto", True),
        ({"torch_dtype": "float32"}, "auto", True),
        ({"text_config": {"dtype": "float32"}}, "auto", True),
        ({"dtype": "float32"}, "float32", False),
        ({"dtype": "bfloat16"}, "auto", False),
        ({}, "auto", False),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        main(ScriptArguments(model=str(tmp_path), dtype=dtype, port=free_port()))
        assert ("--dtype float32" in capsys.readouterr().err) is warned


# ---- Of an earlier version ----


@pytest.mark.parametrize(
    ("items", "n", "expected"),
    [
        ([1, 2, 3, 4, 5], 2, [[1, 2, 3], [4, 5]]),
        ([1, 2, 3, 4], 4, [[1], [2], [3], [4]]),
        ([1, 2], 3, [[1], [2], []]),
        ([], 2, [[], []]),
        (list(range(7)), 3, [[0, 1, 2], [3, 4], [5, 6]]),
    ],
)
def test_chunk_list(items, n, expected):
    assert chunk_list(items, n) == expected


def test_the_script_runs_by_itself():
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_API_KEY"}
    command = [sys.executable, "-m", "trl.scripts.vllm_serve", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0
    assert "--tensor_parallel_size" in result.stdout
