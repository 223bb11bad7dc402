"""Callbacks under the path users know; they live in `trl.callbacks`, one file each."""

from ..callbacks.bema import BEMACallback
from ..callbacks.log_completions import LogCompletionsCallback
from ..callbacks.reference_sync import SyncRefModelCallback
from ..callbacks.rich_progress import RichProgressCallback
from ..callbacks.weave import WeaveCallback

__all__ = [
    "BEMACallback",
    "LogCompletionsCallback",
    "RichProgressCallback",
    "SyncRefModelCallback",
    "WeaveCallback",
]
