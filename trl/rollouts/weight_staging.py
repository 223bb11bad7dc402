"""
Where a server keeps the weights of an update until they are whole: what may be sent, what came, and the files.

Everything that a sender says is checked against what the served model has, before space is taken: names, shapes and
dtypes when an update begins, and each file's header before its data. Nothing is unpickled; tensors are only ever bytes
here. This file knows neither HTTP nor vLLM.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

MAX_HEADER_BYTES = 16 * 1024**2
"""Of a safetensors file; a header takes about 100 bytes per tensor."""
IDLE_SECONDS = 60.0
"""After this long without a byte, another owner may take an unfinished update's place."""
FOLDER_PREFIX = "trl-weights-"

_SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_DTYPE_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
_FLOATING = ("float64", "float32", "float16", "bfloat16")
_NAMED = 5  # how many offenders a message names


class WeightsError(Exception):
    """Something about sent weights that cannot be used; `status` is the HTTP status that fits."""

    status = 400


class MismatchError(WeightsError):
    """Declared weights that are not those of the served model."""

    status = 422


class TooLargeError(WeightsError):
    """More than was declared, or than there is room for."""

    status = 413


class ConflictError(WeightsError):
    """Another update is in the way, or this one is not ready."""

    status = 409


class UnknownUpdateError(WeightsError):
    """No update has this token."""

    status = 404


@dataclass(frozen=True)
class SentWeight:
    """A weight that an update will bring."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * _DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class ExpectedWeight:
    """A weight of the served model. `dtype` is the served model's own; any floating dtype may be sent for another."""

    dtype: str
    shape: tuple[int, ...]


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------


def check_declaration(parameters: Any, expected: Mapping[str, ExpectedWeight]) -> dict[str, SentWeight]:
    """
    Read what an update declares, and compare it with the served model.

    Args:
        parameters: a list of `[name, dtype, shape]`, as JSON has it.
        expected: the served model's weights, by published name.

    Returns:
        The declared weights by name, in the order in which they were declared.

    Raises:
        WeightsError: it is no such list.
        MismatchError: names that are unknown, missing or twice there; shapes or dtypes that do not fit.
    """
    if not isinstance(parameters, list) or not parameters:
        raise WeightsError("`parameters` has to be a list of [name, dtype, shape] with at least one entry.")
    sent = [_read_declared(entry, position) for position, entry in enumerate(parameters)]
    by_name = {weight.name: weight for weight in sent}
    problems = []
    unknown = [name for name in by_name if name not in expected]
    if unknown:
        problems.append(f"The served model has no {_some(unknown)}.")
        if any(name.endswith("lm_head.weight") for name in unknown):
            problems.append(
                "Its head may be tied to its embeddings: serve a checkpoint with tie_word_embeddings=false."
            )
    missing = [name for name in expected if name not in by_name]
    if missing:
        problems.append(f"Of the served model's weights there is no {_some(missing)}.")
    if len(by_name) < len(sent):
        seen: set[str] = set()
        twice = [weight.name for weight in sent if weight.name in seen or seen.add(weight.name)]
        problems.append(f"Declared twice: {_some(twice)}.")
    known = [(weight, expected[weight.name]) for weight in by_name.values() if weight.name in expected]
    shapes = [f"{w.name} {list(w.shape)} (served: {list(e.shape)})" for w, e in known if w.shape != e.shape]
    if shapes:
        problems.append(f"Other shapes than the served model's: {_some(shapes)}.")
    dtypes = [f"{w.name} {w.dtype} (served: {e.dtype})" for w, e in known if not _dtype_fits(w.dtype, e.dtype)]
    if dtypes:
        problems.append(f"Dtypes that cannot be loaded: {_some(dtypes)}. Send one of {', '.join(_FLOATING)}.")
    if problems:
        raise MismatchError(" ".join(problems))
    return by_name


def _read_declared(entry: Any, position: int) -> SentWeight:
    if not (isinstance(entry, list) and len(entry) == 3):
        raise WeightsError(f"Entry {position} of `parameters` is not [name, dtype, shape].")
    name, dtype, shape = entry
    if not isinstance(name, str) or not isinstance(dtype, str):
        raise WeightsError(f"Entry {position} of `parameters`: name and dtype have to be text.")
    return SentWeight(name, dtype, _read_shape(shape, f"Entry {position} of `parameters`"))


def _read_shape(shape: Any, where: str) -> tuple[int, ...]:
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise WeightsError(f"{where}: the shape has to be a list of whole numbers.")
    return tuple(shape)


def _dtype_fits(sent: str, served: str) -> bool:
    return sent in _FLOATING if served not in _DTYPE_BYTES or served in _FLOATING else sent == served


def _some(items: Iterable[str]) -> str:
    items = list(items)
    rest = f" and {len(items) - _NAMED} more" if len(items) > _NAMED else ""
    return ", ".join(item[:200] for item in items[:_NAMED]) + rest


def check_header(header: bytes, data_bytes: int, wanted: Mapping[str, SentWeight]) -> list[str]:
    """
    Read a safetensors file's header, and compare it with what the update still wants.

    Args:
        header: the JSON, without the eight bytes of its length.
        data_bytes: how many bytes follow it.
        wanted: declared weights that have not come yet, by name.

    Returns:
        The names of the tensors in the file.

    Raises:
        WeightsError: the header is malformed, names a tensor that is not wanted or is not as declared, or its tensors
            do not lie one after the other and fill the data.
    """
    try:
        table = json.loads(header, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"The safetensors header cannot be read: {str(error)[:200]}.") from None
    if not isinstance(table, dict):
        raise WeightsError("The safetensors header is not an object.")
    table.pop("__metadata__", None)
    if not table:
        raise WeightsError("The safetensors file has no tensors.")
    spans = []
    for name, entry in table.items():
        if name not in wanted:
            raise WeightsError(f"{name[:200]!r} was not declared, or came already.")
        spans.append((*_check_entry(name, entry, wanted[name]), name))
    end = 0
    for begin, stop, name in sorted(spans):
        if begin != end:
            raise WeightsError(f"The data of {name!r} begins at byte {begin}; {end} was to be expected.")
        end = stop
    if end != data_bytes:
        raise WeightsError(f"The tensors take {end} bytes, the data has {data_bytes}.")
    return list(table)


def _check_entry(name: str, entry: Any, wanted: SentWeight) -> tuple[int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise WeightsError(f"{name!r}: the header has to say dtype, shape and data_offsets.")
    dtype = _SAFETENSORS_DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype != wanted.dtype:
        raise WeightsError(f"{name!r}: dtype {str(entry['dtype'])[:40]}, declared as {wanted.dtype}.")
    if _read_shape(entry["shape"], repr(name)) != wanted.shape:
        raise WeightsError(f"{name!r}: another shape than declared ({list(wanted.shape)}).")
    offsets = _read_shape(entry["data_offsets"], repr(name))
    if len(offsets) != 2 or offsets[1] - offsets[0] != wanted.size:
        raise WeightsError(f"{name!r}: data_offsets do not span its {wanted.size} bytes.")
    return offsets[0], offsets[1]


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key is there twice")
    return table


# ---------------------------------------------------------------------------------------------------------------------
# Updates
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class WeightUpdate:
    """
    Weights on their way: what was declared, what has come.

    Args:
        owner: who sends them.
        declared: what will be sent, by name.
        folder: where the files go; nobody else's.
    """

    owner: str
    declared: dict[str, SentWeight]
    folder: Path
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    wanted: dict[str, SentWeight] = field(init=False)
    is_loading: bool = False
    is_dropped: bool = False
    _files: int = 0
    _uploads: int = 0
    _touched: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.wanted = dict(self.declared)

    @property
    def missing_bytes(self) -> int:
        """Of declared weights that nobody is sending yet."""
        return sum(weight.size for weight in self.wanted.values())

    @property
    def is_complete(self) -> bool:
        """Whether every declared weight is there, whole."""
        return not self.wanted and not self._uploads

    @property
    def is_idle(self) -> bool:
        """Whether nothing has come for so long that its sender may be gone."""
        return not self.is_loading and time.monotonic() - self._touched > IDLE_SECONDS

    def touch(self) -> None:
        """Note that the sender is alive."""
        self._touched = time.monotonic()

    def receive(self, header: bytes, data_bytes: int) -> IncomingFile:
        """
        Make room for a file whose header has come. Its tensors are nobody else's to send until it is finished or
        aborted.

        Args:
            header: the safetensors header.
            data_bytes: how many bytes follow it.

        Raises:
            WeightsError: the header does not fit.
        """
        self.touch()
        names = check_header(header, data_bytes, self.wanted)
        incoming = IncomingFile(self, self.folder / f"{self._files:06d}", [self.wanted.pop(name) for name in names])
        self._files += 1
        self._uploads += 1
        try:
            incoming.begin(header)
        except OSError:
            incoming.abort()
            raise
        return incoming

    def remove_files(self) -> None:
        """Forget the update's data; an upload that is still under way finds that it was dropped."""
        self.is_dropped = True
        shutil.rmtree(self.folder, ignore_errors=True)


class IncomingFile:
    """A safetensors file that is being written. It counts only once it is finished."""

    def __init__(self, update: WeightUpdate, path: Path, weights: list[SentWeight]):
        self.weights = weights
        self._update = update
        self._path = path
        self._file: BinaryIO | None = None

    def begin(self, header: bytes) -> None:
        """Write what has been read already."""
        self._file = open(self._path.with_suffix(".part"), "wb", buffering=0)  # noqa: SIM115 - until `finish`
        self.write(len(header).to_bytes(8, "little") + header)

    def write(self, data: bytes | bytearray) -> None:
        """Append data."""
        view = memoryview(data)
        while view:  # an unbuffered write may write less than it was given
            view = view[self._file.write(view) :]
        self._update.touch()

    def finish(self) -> None:
        """Count the file's tensors as received."""
        self._file.close()
        if self._update.is_dropped:
            raise UnknownUpdateError("This update was dropped while its data came.")
        self._path.with_suffix(".part").rename(self._path.with_suffix(".safetensors"))
        self._update._uploads -= 1
        self._update.touch()

    def abort(self) -> None:
        """Forget the file; its tensors may be sent again."""
        if self._file is not None:
            self._file.close()
        with contextlib.suppress(OSError):
            self._path.with_suffix(".part").unlink()
        self._update._uploads -= 1
        self._update.wanted.update((weight.name, weight) for weight in self.weights)


class WeightStaging:
    """
    The one update that is under way, and the folder that it is kept in: readable by this user alone, gone with the
    server. What servers that were killed have left behind is removed.

    Args:
        parent: folder to make it in. Default: the system's for temporary files (TMPDIR).

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, parent: str | None = None):
        self.parent = Path(parent or tempfile.gettempdir())
        self.current: WeightUpdate | None = None
        self._count = 0
        self._remove_abandoned()
        while True:
            self.folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=self.parent))
            self._lock = open(self.folder / "lock", "w")  # noqa: SIM115 - held as long as the server lives
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            if self.folder.exists():  # another server, starting now, may have taken it for an abandoned one
                break

    def begin(self, owner: str, declared: dict[str, SentWeight]) -> WeightUpdate:
        """
        Start an update. An unfinished one of the same owner, or one that is idle, is dropped.

        Args:
            owner: who sends it.
            declared: what will be sent, by name.

        Returns:
            The update.

        Raises:
            ConflictError: another owner's update is under way, or one is being loaded.
            TooLargeError: there is no room for it.
        """
        current = self.current
        if current is not None and current.is_loading:
            raise ConflictError("An update is being loaded at this moment; begin when it is done.")
        if current is not None and current.owner != owner and not current.is_idle:
            raise ConflictError(
                f"{current.owner!r} is sending weights to this server. A server takes weights from one trainer at a "
                f"time; this one is free when the update is done, or after {IDLE_SECONDS:.0f} s without data."
            )
        self.drop()
        needed = sum(weight.size for weight in declared.values())
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise TooLargeError(
                f"The weights take {needed / 1e9:.2f} GB, {self.parent} on the server has {free / 1e9:.2f} GB left. "
                "Make room there, or start the server with TRL_SERVER_STAGING_DIR set to a folder with more."
            )
        folder = self.folder / f"{self._count:06d}"
        folder.mkdir(mode=0o700)
        self._count += 1
        self.current = WeightUpdate(owner, declared, folder)
        return self.current

    def find(self, token: str) -> WeightUpdate:
        """
        The update with this token.

        Raises:
            UnknownUpdateError: there is none.
        """
        current = self.current
        if current is None or not secrets.compare_digest(current.token.encode(), token.encode(errors="replace")):
            raise UnknownUpdateError(
                "No update under way has this token: it was dropped, committed, or begun on another server. Begin anew."
            )
        return current

    def drop(self) -> None:
        """Forget the update that is under way, if any, and its files."""
        if self.current is not None:
            self.current.remove_files()
            self.current = None

    def close(self) -> None:
        """Remove the folder."""
        self.drop()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def _remove_abandoned(self) -> None:
        for folder in self.parent.glob(f"{FOLDER_PREFIX}*"):
            # A living server holds the lock; it goes with its process, however that ended.
            with contextlib.suppress(OSError):
                if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                    continue
                with open(folder / "lock") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
