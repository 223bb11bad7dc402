"""
A vLLM server to sample from while training: what `trl vllm-serve` runs.

```bash
trl vllm-serve --model Qwen/Qwen3-0.6B
```

It is vLLM's own server, in place of this process, with TRL's routes for new weights in front of it (see
`trl.rollouts.vllm_server`).
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import socket
import sys
from dataclasses import dataclass, field
from itertools import pairwise

from trl.import_utils import is_vllm_available
from trl.scripts.utils import TrlParser

MIDDLEWARE = "trl.rollouts.vllm_server.WeightRoutes"
WORKER_EXTENSION = "trl.rollouts.vllm_worker.WeightWorker"

DESCRIPTION = """\
Serve a model for training with `use_vllm=True, vllm_mode="server"`: vLLM's own server, which takes new weights from the
trainer. Other options of `vllm serve` are passed on to it.
"""
EPILOG = """\
Anything after these options is passed on to `vllm serve`, such as --served-model-name or --quantization.

The server answers this machine alone. To let others in, give both sides a key:
  export VLLM_API_KEY=$(python -c 'import secrets; print(secrets.token_urlsafe(32))')
  trl vllm-serve --model MODEL --host 0.0.0.0
and start the trainer with the same VLLM_API_KEY. The key and the weights are sent as they are: over a network that is
not yours alone, add --ssl-keyfile and --ssl-certfile.

environment:
  VLLM_API_KEY              the key that every request has to carry
  VLLM_LOGGING_LEVEL        INFO shows what vLLM does as it starts
  TRL_SERVER_STAGING_DIR    folder for weights on their way (default: the system's temporary one); as large as the
                            model, and shared where the workers are on several machines
  TRL_SERVER_MAX_BODY_MIB   largest request, weights apart (default: 64)
  TRL_SERVER_WAIT_SECONDS   how long new weights wait for running requests, and these for new weights (default: 300)
"""

# What would take the server out of this command's hands, and why.
_REFUSED = {
    "--api-server-count": "one process has to see every request and every update of the weights.",
    "--data-parallel-multi-port-external-lb": "it starts several servers; start one command for each instead.",
    "--data-parallel-external-lb": "it starts several servers; start one command for each instead.",
    "--data-parallel-hybrid-lb": "it starts several servers; start one command for each instead.",
    "--headless": "a node without a server is started with `vllm serve --headless`, adding --worker-extension-cls "
    f"{WORKER_EXTENSION}.",
    "--grpc": "weights and keys are handled in the HTTP server only.",
    "--grpc-port": "weights and keys are handled in the HTTP server only.",
    "--worker-extension-cls": "the workers take new weights through TRL's.",
}


@dataclass
class ScriptArguments:
    """
    Flags of `trl vllm-serve`.

    Args:
        model: name on the Hub, or a folder.
        revision: branch, tag or commit of the model.
        tensor_parallel_size: over how many devices each layer is spread.
        data_parallel_size: how many copies of the model answer.
        host: address to listen on. Any but this machine's own needs a key.
        port: port to listen on.
        gpu_memory_utilization: share of a device's memory for weights, activations and cache.
        dtype: of the model's weights.
        max_model_len: most tokens of prompt and completion together. Default: what the model was made for.
        enable_prefix_caching: whether prompts that begin alike share their computation. Default: vLLM's choice.
        enforce_eager: do not compile or capture graphs: starts sooner, generates slower.
        kv_cache_dtype: of the cache; `"auto"` is the model's.
        trust_remote_code: whether code that comes with the model may run.
        log_level: of the HTTP server.
        vllm_model_impl: `"vllm"`, `"transformers"` or `"auto"`.
        distributed_executor_backend: `"ray"` or `"mp"`. Default: vLLM's choice.
        speculative_config: of speculative decoding, as JSON.
    """

    model: str = field(metadata={"help": "Model to serve: a name on the Hub, or a folder."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model."})
    tensor_parallel_size: int = field(
        default=1, metadata={"help": "Number of devices over which each layer is spread."}
    )
    data_parallel_size: int = field(default=1, metadata={"help": "Number of copies of the model that answer."})
    host: str = field(
        default="127.0.0.1",
        metadata={"help": "Address to listen on. Any but this machine's own needs a key (VLLM_API_KEY)."},
    )
    port: int = field(default=8000, metadata={"help": "Port to listen on."})
    gpu_memory_utilization: float = field(
        default=0.9, metadata={"help": "Share of a device's memory for weights, activations and cache."}
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Dtype of the model's weights. `auto` is that of the checkpoint, but bfloat16 where that is "
            "float32; name `float32` to train and sample with the same numbers."
        },
    )
    max_model_len: int | None = field(
        default=None,
        metadata={"help": "Most tokens of prompt and completion together. Default: what the model was made for."},
    )
    enable_prefix_caching: bool | None = field(
        default=None,
        metadata={"help": "Whether prompts that begin alike share their computation. Default: vLLM's choice."},
    )
    enforce_eager: bool = field(
        default=False, metadata={"help": "Do not compile or capture graphs: starts sooner, generates slower."}
    )
    kv_cache_dtype: str = field(default="auto", metadata={"help": "Dtype of the cache; `auto` is the model's."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Let code that comes with the model run on this machine."}
    )
    log_level: str = field(
        default="info",
        metadata={"help": "What the HTTP server logs: critical, error, warning, info, debug or trace."},
    )
    vllm_model_impl: str = field(
        default="vllm", metadata={"help": "Whose model code is used: `vllm`, `transformers` or `auto`."}
    )
    distributed_executor_backend: str | None = field(
        default=None, metadata={"help": "How workers are run: `ray` or `mp`. Default: vLLM's choice."}
    )
    speculative_config: str | None = field(default=None, metadata={"help": "Speculative decoding, as JSON."})


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None) -> TrlParser:
    """The parser of this script; with `subparsers` (of a `TrlParser`) the subcommand `vllm-serve` there."""
    settings = {
        "dataclass_types": ScriptArguments,
        "description": DESCRIPTION,
        "epilog": EPILOG,
        "formatter_class": _HelpFormatter,
    }
    if subparsers is not None:
        return subparsers.add_parser("vllm-serve", help="Serve a model to sample from while training.", **settings)
    return TrlParser(prog=prog, **settings)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None:  # the text says what happens
            return action.help
        return super()._get_help_string(action)


def chunk_list(lst: list, n: int) -> list[list]:
    """
    Cut a list into `n` lists whose lengths differ by one at most; the longer ones come first.

    Args:
        lst: the list.
        n: how many, at least 1.

    Returns:
        They, some empty where `n` is larger than the list.
    """
    length, longer = divmod(len(lst), n)
    starts = [index * length + min(index, longer) for index in range(n + 1)]
    return [lst[start:end] for start, end in pairwise(starts)]


def build_command(script_args: ScriptArguments, extra_args: list[str] | None = None) -> list[str]:
    """
    The command that serves the model.

    Args:
        script_args: the flags.
        extra_args: appended as they are, for `vllm serve`.

    Returns:
        Program and arguments.

    Raises:
        ValueError: `extra_args` has an option that this command sets itself.
    """
    extra_args = list(extra_args or [])
    _check_extra_args(extra_args)
    a = script_args
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", a.model]
    command += ["--host", a.host, "--port", str(a.port)]
    command += ["--tensor-parallel-size", str(a.tensor_parallel_size)]
    command += ["--data-parallel-size", str(a.data_parallel_size)]
    command += ["--gpu-memory-utilization", str(a.gpu_memory_utilization)]
    command += ["--dtype", a.dtype, "--kv-cache-dtype", a.kv_cache_dtype]
    command += ["--model-impl", a.vllm_model_impl, "--uvicorn-log-level", a.log_level]
    command += ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"]
    # Left to itself, vLLM starts as many API servers as copies of the model; none would know of another's updates.
    command += ["--api-server-count", "1"]
    command += ["--middleware", MIDDLEWARE, "--worker-extension-cls", WORKER_EXTENSION]
    if _has_cuda():
        command += ["--weight-transfer-config", json.dumps({"backend": "nccl"})]
    if is_vllm_available(min_version="0.30.0"):
        command += ["--enable-scale-out"]
    for flag, value in (
        ("--revision", a.revision),
        ("--max-model-len", a.max_model_len),
        ("--distributed-executor-backend", a.distributed_executor_backend),
        ("--speculative-config", a.speculative_config),
    ):
        command += [flag, str(value)] if value is not None else []
    if a.enable_prefix_caching is not None:
        command += ["--enable-prefix-caching" if a.enable_prefix_caching else "--no-enable-prefix-caching"]
    command += ["--enforce-eager"] if a.enforce_eager else []
    command += ["--trust-remote-code"] if a.trust_remote_code else []
    return command + extra_args


def build_environment() -> dict[str, str]:
    """The environment of the server: this process's, with what the server needs."""
    environment = dict(os.environ)
    environment.setdefault("VLLM_NO_USAGE_STATS", "1")
    environment["VLLM_USE_RUST_FRONTEND"] = "0"  # it would not run the middleware
    if _has_cuda():  # vLLM has its routes for NCCL there only; all others of that mode stay shut
        environment["VLLM_SERVER_DEV_MODE"] = "1"
    return environment


def main(script_args: ScriptArguments, extra_args: list[str] | None = None) -> None:
    """
    Become the server. Returns only with an error.

    Args:
        script_args: the flags.
        extra_args: further options of `vllm serve`.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: no key for an address that others reach, a port that is taken, or an option that this command sets
            itself.
    """
    if not is_vllm_available():
        raise ImportError('`trl vllm-serve` needs vLLM: pip install "trl[vllm]"')
    command = build_command(script_args, extra_args)
    if "--uds" not in {_option(argument) for argument in extra_args or []}:
        _check_key(script_args.host, extra_args or [])
        _check_port(script_args.host, script_args.port)
    _warn_of_dtype(script_args)
    print(
        f"Starting vLLM with {script_args.model} on {script_args.host}:{script_args.port}"
        f" ({'with' if _has_key(extra_args or []) else 'without'} a key). VLLM_LOGGING_LEVEL=INFO shows how it goes.",
        file=sys.stderr,
        flush=True,
    )
    os.execve(command[0], command, build_environment())


# ---- Checks ----


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _option(argument: str) -> str:
    """`--api_key=x` as vLLM's parser knows it: `--api-key`."""
    return argument.partition("=")[0].replace("_", "-") if argument.startswith("--") else ""


def _check_extra_args(extra_args: list[str]) -> None:
    for argument in extra_args:
        option = _option(argument)
        refused = next((name for name in _REFUSED if name == option), None)
        if refused is None and len(option) > 6:  # vLLM's parser takes unambiguous beginnings too
            refused = next((name for name in _REFUSED if name.startswith(option)), None)
        if refused is not None:
            raise ValueError(f"`{argument}` cannot be used with `trl vllm-serve`: {_REFUSED[refused]}")


def _has_key(extra_args: list[str]) -> bool:
    return bool(os.environ.get("VLLM_API_KEY")) or "--api-key" in {_option(argument) for argument in extra_args}


def _check_key(host: str, extra_args: list[str]) -> None:
    from trl.rollouts.server_access import is_loopback

    if is_loopback(host) or _has_key(extra_args):
        return
    raise ValueError(
        f"--host {host} lets other machines reach the server, and there is no key. Whoever reaches it could replace its "
        "weights. Make a key, and give the same to server and trainer:\n"
        "  export VLLM_API_KEY=$(python -c 'import secrets; print(secrets.token_urlsafe(32))')\n"
        "Or leave --host out to serve this machine alone."
    )


def _check_port(host: str, port: int) -> None:
    """See now, rather than after the model is loaded, whether the server can listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OverflowError:
            raise ValueError(f"--port {port}: a port is a number from 0 to 65535.") from None
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ValueError(
                    f"Port {port} on {host} is in use, perhaps by a server that was started before. Stop it, or choose "
                    f"another port for server and trainer (--port {port + 1}, and vllm_server_port there)."
                ) from None
            raise ValueError(f"The server cannot listen on {host}:{port}: {error.strerror or error}.") from None


def _warn_of_dtype(script_args: ScriptArguments) -> None:
    if script_args.dtype != "auto":
        return
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(script_args.model, revision=script_args.revision)
    except (OSError, ValueError):
        return  # vLLM says what is wrong with it
    nested = config.get("text_config") or {}
    dtype = next((d for c in (config, nested) for d in (c.get("dtype"), c.get("torch_dtype")) if d), None)
    if str(dtype).removeprefix("torch.") == "float32":
        print(
            f"Warning: {script_args.model} is float32, which --dtype auto takes down to bfloat16. Its log-probs then "
            "differ from those of a trainer in float32 by hundredths; name --dtype float32 for the same numbers.",
            file=sys.stderr,
        )


def read_arguments(arguments: list[str] | None, prog: str | None = None) -> tuple[ScriptArguments, list[str]]:
    """
    Flags and config file, and what is left for `vllm serve`.

    Args:
        arguments: the arguments. By default those of the process.
        prog: name in the help.

    Returns:
        The flags, and the rest: first the file's keys as options, then the arguments as they are.

    Raises:
        ValueError: the config file cannot be used.
    """
    script_args, from_file, rest = make_parser(prog=prog).parse_args_and_config(
        arguments, return_remaining_strings=True, separate_remaining_strings=True
    )
    options = []
    for key, value in zip(from_file[::2], from_file[1::2], strict=True):
        if value in ("True", "False"):  # vLLM's switches have no value
            options.append(key if value == "True" else f"--no-{key.removeprefix('--')}")
        else:
            options += [key, value]
    return script_args, options + rest


if __name__ == "__main__":
    main(*read_arguments(None))
