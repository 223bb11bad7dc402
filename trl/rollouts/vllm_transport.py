"""
How weights get from the trainer to a vLLM server, chosen by what both sides have.

[`NcclTransport`] broadcasts from GPU to GPUs and is driven by vLLM's own trainer side. [`HttpTransport`] needs nothing but
the connection: safetensors in bodies of bounded size, which the server checks against its model before it reads them.
A stock `vllm serve` knows only the first. Of NCCL the order of its calls is tested; it has not run on GPUs yet.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from ..models.weight_export import WeightInfo
from .vllm_adapter import make_nccl_sender, nccl_metadata
from .vllm_http import BUSY, ServerConnection, ServerError, ServerLost, is_loopback

PROTOCOL = 1
BODY_BYTES = 256 << 20
BODY_SECONDS = 600.0
COMMIT_SECONDS = 900.0
NCCL_SECONDS = 1800.0
# An update that its trainer left behind blocks others for 60 s.
OTHERS_UPDATE_SECONDS = 90.0

Weights = Iterable[tuple[str, Tensor]]


def new_owner() -> str:
    """A name for who pushes weights from here, which tells a person where that is."""
    return f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:12]}"


# ---------------------------------------------------------------------------------------------------------------------
# What is at the other end
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ServerInfo:
    """
    What a server says of itself; `None` where a stock server does not say.

    Args:
        model: name that requests give.
        max_model_len: most tokens of prompt and completion together.
        weights: version of its weights, `INSTANCE:N`.
        instance: of this start of the server.
        owner: who pushed weights last.
        healthy: whether the last update went through.
        vllm_version: its vLLM.
        dtype: it computes in.
        logprobs_mode: which log-probabilities it returns.
        world_size: number of its workers.
        transports: ways to push weights that it offers.
        is_stock: a plain `vllm serve`, without `trl vllm-serve`'s routes.
    """

    model: str
    max_model_len: int | None = None
    weights: str | None = None
    instance: str | None = None
    owner: str | None = None
    healthy: bool = True
    vllm_version: str | None = None
    dtype: str | None = None
    logprobs_mode: str | None = None
    world_size: int = 1
    transports: tuple[str, ...] = ()
    is_stock: bool = False


def read_info(connection: ServerConnection) -> ServerInfo:
    """
    Ask a server what it is.

    Raises:
        RuntimeError: it speaks another protocol than this client, or wants a key.
        ServerLost: it cannot be reached.
    """
    try:
        said = connection.get("/trl/info")
    except ServerError as error:
        if error.status != 404:
            raise
        return _read_stock_info(connection)
    if said.get("protocol") != PROTOCOL:
        raise RuntimeError(
            f"{connection.url} speaks version {said.get('protocol')} of the weight protocol, this client version "
            f"{PROTOCOL}. Use the same version of trl on both sides (the server has {said.get('trl_version')})."
        )
    return ServerInfo(
        model=said["model"],
        max_model_len=said["max_model_len"],
        weights=said["weights"],
        instance=said["instance"],
        owner=said["owner"],
        healthy=said["healthy_weights"],
        vllm_version=said["vllm_version"],
        dtype=str(said["dtype"]).removeprefix("torch."),
        logprobs_mode=said["logprobs_mode"],
        world_size=said["world_size"],
        transports=tuple(said["transports"]),
    )


def _read_stock_info(connection: ServerConnection) -> ServerInfo:
    models = connection.get("/v1/models")["data"]
    if not models:
        raise RuntimeError(f"{connection.url} serves no model.")
    config = _optional(connection, "/server_info?config_format=json").get("vllm_config") or {}
    settings = config.get("model_config") or {}
    return ServerInfo(
        model=models[0]["id"],
        max_model_len=models[0].get("max_model_len"),
        vllm_version=_optional(connection, "/version").get("version"),
        dtype=str(settings["dtype"]).removeprefix("torch.") if "dtype" in settings else None,
        logprobs_mode=settings.get("logprobs_mode"),
        world_size=_optional(connection, "/get_world_size").get("world_size", 1),
        transports=("nccl",) if config.get("weight_transfer_config") else (),
        is_stock=True,
    )


def _optional(connection: ServerConnection, path: str) -> dict:
    """An answer that a stock server gives in its development mode only."""
    try:
        return connection.get(path)
    except ServerError as error:
        if error.status not in (403, 404, 405):
            raise
        return {}


# ---------------------------------------------------------------------------------------------------------------------
# Ways
# ---------------------------------------------------------------------------------------------------------------------


class Transport(Protocol):
    """A way to push weights to one server."""

    def push(self, manifest: list[WeightInfo], weights: Weights) -> str | None:
        """Replace the server's weights by these; the version it then has. `weights` may be left unread on an error."""

    def close(self) -> None:
        """Give back connections and ports."""


def choose_transport(connection: ServerConnection, info: ServerInfo, owner: str, group_port: int) -> Transport:
    """
    The fastest way that both sides have.

    Args:
        connection: to the server.
        info: what the server says of itself.
        owner: who pushes.
        group_port: free port of this machine, where an NCCL group meets.

    Raises:
        NotImplementedError: only NCCL would do, and there is no CUDA device here.
        RuntimeError: the server takes no weights.
    """
    if "nccl" in info.transports and torch.cuda.is_available():
        return NcclTransport(connection, info, owner, group_port)
    if "http" in info.transports:
        return HttpTransport(connection, owner)
    start = "Start it by `trl vllm-serve --model ...`, which takes weights over HTTP too."
    if "nccl" in info.transports:
        raise NotImplementedError(
            f"{connection.url} takes weights over NCCL only, which needs a CUDA device on this side; there is none. {start}"
        )
    raise RuntimeError(
        f"{connection.url} (vLLM {info.vllm_version or 'of unknown version'}) takes no weights: it is a stock `vllm serve` "
        f"without --weight-transfer-config, or without VLLM_SERVER_DEV_MODE=1. {start}"
    )


class HttpTransport:
    """
    Safetensors over the connection that requests take, too.

    Args:
        connection: to the server.
        owner: who pushes.
        body_bytes: tensors are put together into bodies of about this size; a larger one goes alone.
    """

    def __init__(self, connection: ServerConnection, owner: str, body_bytes: int = BODY_BYTES):
        self.connection = connection
        self.owner = owner
        self.body_bytes = body_bytes

    def push(self, manifest: list[WeightInfo], weights: Weights) -> str:
        """
        Replace the server's weights.

        Args:
            manifest: every weight, in the order of `weights`.
            weights: names and tensors, whole.

        Returns:
            The version that the server now has.

        Raises:
            ServerLost: the connection broke, or the server was restarted on the way. Nothing was changed, or all was.
            ServerError: the server refused, such as for weights that its model does not have.
            RuntimeError: another trainer is pushing to it.
        """
        begun = self._begin(manifest)
        path = f"/trl/weights/{begun['update']}"
        try:
            for tensors in _batches(weights, self.body_bytes):
                self.connection.request(
                    "PUT",
                    path,
                    seconds=BODY_SECONDS,
                    data=safetensors.torch.save(tensors),
                    headers={"Content-Type": "application/octet-stream"},
                )
            return self._commit(path, begun["weights"])
        except BaseException as error:
            with contextlib.suppress(ServerError, OSError):
                self.connection.request("DELETE", path, seconds=10, busy=())
            # 404: it was restarted, and knows of no update; 5xx: loading failed, which the next attempt may mend.
            if isinstance(error, ServerError) and (error.status == 404 or error.status >= 500):
                raise ServerLost(f"The update of the weights did not get through: {error}") from error
            raise

    def close(self) -> None:
        """Nothing is held."""

    def _begin(self, manifest: list[WeightInfo]) -> dict:
        parameters = [[weight.name, weight.dtype, list(weight.shape)] for weight in manifest]
        body = {"owner": self.owner, "parameters": parameters}
        try:
            return self.connection.post("/trl/weights", body, seconds=OTHERS_UPDATE_SECONDS, busy=(409, *BUSY))
        except ServerError as error:
            if error.status == 409:
                raise another_trainer(self.connection.url, error.details.get("owner"), error.text) from error
            if error.status >= 500:
                raise ServerLost(f"The update of the weights could not begin: {error}") from error
            if error.status != 422:
                raise
            raise ServerError(
                error.url,
                error.status,
                f"{error.text} The server's model is not the one that is trained: start it with the same model. With "
                "adapters on the embeddings or the head, that is one saved with `tie_word_embeddings=False`.",
                error.kind,
                error.details,
            ) from error

    def _commit(self, path: str, before: str) -> str:
        try:
            return self.connection.post(f"{path}/commit", seconds=COMMIT_SECONDS)["weights"]
        except ServerLost:
            # Was it the update that did not get through, or only the answer?
            time.sleep(0.5)
            info = read_info(self.connection)
            instance, _, count = before.rpartition(":")
            if info.owner == self.owner and info.weights == f"{instance}:{int(count) + 1}" and info.healthy:
                return info.weights
            raise


class NcclTransport:
    """
    A broadcast from this process's GPU to those of the server, by vLLM's own engine for the trainer's side.

    Args:
        connection: to the server.
        info: what the server says of itself.
        owner: who pushes.
        group_port: free port of this machine; the server's workers must be able to connect to it.
        device: sends from this one. Default: the current one.
    """

    def __init__(
        self,
        connection: ServerConnection,
        info: ServerInfo,
        owner: str,
        group_port: int,
        device: torch.device | str | int | None = None,
    ):
        self.connection = connection
        self.info = info
        self.owner = owner
        self.group_port = group_port
        self.device = torch.device("cuda", torch.cuda.current_device()) if device is None else cuda_device(device)
        self._source = _Source(self.device)
        self._engine: Any = None

    def connect(self) -> None:
        """
        Form the group of this process (rank 0) and the server's workers.

        Raises:
            ImportError: vLLM is not installed here, or has no such engine.
        """
        with torch.cuda.device(self.device):
            self._engine = make_nccl_sender(
                _own_address(self.connection.url),
                self.group_port,
                self.info.world_size + 1,
                _WeightRoutes(self.connection),
                self._source,
            )

    def push(self, manifest: list[WeightInfo], weights: Weights) -> str | None:
        """As [`HttpTransport.push`]. An error leaves no usable group, so the next push forms a new one."""
        self._source.manifest, self._source.weights = manifest, weights
        try:
            if self._engine is None:
                self.connect()
            with torch.cuda.device(self.device):
                self._engine.send_weights()
        except BaseException as error:
            self.close()
            if isinstance(error, ServerError) and error.status >= 500:
                raise ServerLost(f"The update of the weights did not get through: {error}") from error
            raise
        finally:
            self._source.weights = ()
        if self.info.is_stock:
            self.connection.request("POST", "/reset_prefix_cache", seconds=60)
            return None
        return self.connection.post("/trl/weights/version", {"owner": self.owner}, seconds=COMMIT_SECONDS)["weights"]

    def close(self) -> None:
        """Leave the group, on both sides."""
        engine, self._engine = self._engine, None
        if engine is None:
            return
        with contextlib.suppress(ServerError, OSError):
            self.connection.request("POST", "/shutdown_weight_transfer_engine", seconds=10, busy=())
        engine.shutdown()


def another_trainer(url: str, owner: str | None, said: str = "") -> RuntimeError:
    """The error that two trainers on one server end with."""
    return RuntimeError(
        f"another trainer uses the server {url}: weights were pushed by {owner or 'someone else'} "
        f"(host:process:id), not by this run.{' ' + said if said else ''} Give every training run a server of its own."
    )


def cuda_device(device: torch.device | str | int) -> torch.device:
    """A device by object, name or number."""
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


# ---------------------------------------------------------------------------------------------------------------------
# Pieces
# ---------------------------------------------------------------------------------------------------------------------


def _batches(weights: Weights, limit: int) -> Iterator[dict[str, Tensor]]:
    """Tensors on the CPU, as many together as stay below a number of bytes, and at least one."""
    batch: dict[str, Tensor] = {}
    size = 0
    for name, tensor in weights:
        count = tensor.numel() * tensor.element_size()
        if batch and size + count > limit:
            yield batch
            batch, size = {}, 0
        # A copy: what is passed on may be a view of the model, and safetensors takes no two tensors of one memory.
        batch[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        size += count
    if batch:
        yield batch


class _Source:
    """What vLLM's engine asks for names and tensors; the same object for all updates."""

    def __init__(self, device: torch.device):
        self.device = device
        self.manifest: list[WeightInfo] = []
        self.weights: Weights = ()

    def metadata(self) -> list[Any]:
        return nccl_metadata(self.manifest)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.weights:
            yield name, tensor.detach().to(self.device)


class _WeightRoutes:
    """The four calls that vLLM's engine makes, over the connection that has the key and the limits."""

    def __init__(self, connection: ServerConnection):
        self.connection = connection

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._post("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self._post("/start_weight_update", {})

    def update_weights(self, update_info: Any) -> None:
        self._post("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._post("/finish_weight_update", {} if weight_version is None else {"weight_version": weight_version})

    def _post(self, path: str, body: dict) -> None:
        self.connection.request("POST", path, seconds=NCCL_SECONDS, body=body, busy=())


def _own_address(url: str) -> str:
    """This machine's address as a server at `url` sees it."""
    if is_loopback(url):
        return "127.0.0.1"
    parts = urlsplit(url)
    family, kind, _, _, address = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # nothing is sent
        return probe.getsockname()[0]


class WeightSpool:
    """Weights that come one by one, kept in files until all are there."""

    def __init__(self, body_bytes: int = BODY_BYTES):
        self.manifest: list[WeightInfo] = []
        self.body_bytes = body_bytes
        self._folder = tempfile.TemporaryDirectory(prefix="trl-weights-")
        self._files: list[Path] = []

    def add(self, weights: Weights) -> None:
        """Keep copies of these."""
        for batch in _batches(weights, self.body_bytes):
            file = Path(self._folder.name) / f"{len(self._files)}.safetensors"
            safetensors.torch.save_file(batch, file)
            self._files.append(file)
            self.manifest += [weight_info(name, tensor) for name, tensor in batch.items()]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """All that was added."""
        names = iter(self.manifest)
        for file in self._files:
            with safe_open(file, framework="pt") as tensors:
                for _ in range(len(tensors.keys())):
                    name = next(names).name
                    yield name, tensors.get_tensor(name)

    def close(self) -> None:
        """Remove the files."""
        self._folder.cleanup()


def weight_info(name: str, tensor: Tensor) -> WeightInfo:
    """What is said of a weight before it is sent."""
    return WeightInfo(name, str(tensor.dtype).split(".")[-1], tuple(tensor.shape))
