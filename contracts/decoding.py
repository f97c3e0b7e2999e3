"""Decoders whose every complaint is a MsgspecError.

msgspec (0.22) raises UnicodeDecodeError, which is none, for text that is not UTF-8. A sender could choose such bytes to get
past handlers that refuse what does not decode, and have its message redelivered for ever.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Generic, TypeVar

import msgspec

T = TypeVar("T")

#: A time from outside. One without a time zone does not decode: comparing it with ours would raise TypeError.
Time = Annotated[datetime, msgspec.Meta(tz=True)]


class Decoder(Generic[T]):
    """Wraps one of msgspec's decoders."""

    def __init__(self, decoder: msgspec.json.Decoder[T] | msgspec.msgpack.Decoder[T]) -> None:
        self._decoder = decoder

    def decode(self, data: bytes) -> T:
        """Decode a message. Raises msgspec.DecodeError, or its subclass ValidationError naming the field."""
        try:
            return self._decoder.decode(data)
        except UnicodeDecodeError as error:
            raise msgspec.DecodeError(f"text that is not UTF-8: {error.reason}") from None
