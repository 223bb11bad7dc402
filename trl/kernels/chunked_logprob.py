"""Log-probabilities from hidden states in chunks: see `trl.ops.head`."""

from ..ops.head import OPTIONAL_OUTPUTS, TOKEN_CHUNK_SIZE, ChunkedLogProbFunction

__all__ = ["OPTIONAL_OUTPUTS", "TOKEN_CHUNK_SIZE", "ChunkedLogProbFunction"]
