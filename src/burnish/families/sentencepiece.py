"""Tokenizers inside weight files: the pieces of a SentencePiece model, which ComfyUI keeps beside the weights.

The file format is the protobuf message `ModelProto` of https://github.com/google/sentencepiece
(`src/sentencepiece_model.proto`); only its pieces are read. Pieces of the kind BPE are merged by score.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

from burnish.errors import ModelError

_PIECES = 1  # field of ModelProto
_TEXT, _SCORE, _KIND = 1, 2, 3  # fields of ModelProto.SentencePiece
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5  # wire types


class Kind(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class TokenPiece(NamedTuple):
    text: str
    score: float
    kind: Kind


def pieces_of(model: bytes) -> list[TokenPiece]:
    """Every piece of a SentencePiece model in the order of its numbers.

    Raises:
        ModelError: the bytes are no such model.
    """
    try:
        found = [_piece(value) for field, value in _fields(model) if field == _PIECES]
    except (IndexError, ValueError, TypeError, struct.error) as error:
        raise ModelError(
            f"The tokenizer inside the weight file is damaged: {error}.", remedy="Fetch the file again."
        ) from error
    if not found:
        raise ModelError("The tokenizer inside the weight file is empty.", remedy="Fetch the file again.")
    return found


def merges_of(pieces: Sequence[TokenPiece]) -> list[tuple[str, str]]:
    """The pairs that BPE merges, the most wanted first: all that make up a piece, pieces by falling score."""
    known = {piece.text for piece in pieces if piece.kind == Kind.NORMAL}
    by_score = sorted((p for p in pieces if p.kind == Kind.NORMAL), key=lambda piece: -piece.score)
    return [
        (piece.text[:cut], piece.text[cut:])
        for piece in by_score
        for cut in range(1, len(piece.text))
        if piece.text[:cut] in known and piece.text[cut:] in known
    ]


def _piece(message: bytes | int) -> TokenPiece:
    if isinstance(message, int):
        raise ValueError("a piece is no message")
    text, score, kind = b"", 0.0, int(Kind.NORMAL)
    for field, value in _fields(message):
        if field == _TEXT and isinstance(value, bytes):
            text = value
        elif field == _SCORE and isinstance(value, bytes):
            (score,) = struct.unpack("<f", value)
        elif field == _KIND and isinstance(value, int):
            kind = value
    return TokenPiece(text.decode("utf-8"), score, Kind(kind))


def _fields(message: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Number and value of each field of a protobuf message: bytes, or an int where it is a varint."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        field, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, place = _varint(message, place)
            yield field, value
            continue
        if wire == _LENGTH:
            size, place = _varint(message, place)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire}")
        if place + size > len(message):
            raise ValueError("it is cut off")
        yield field, message[place : place + size]
        place += size


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """A number of seven bits a byte, lowest first, and the place behind it."""
    value = shift = 0
    while True:
        byte = message[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if not byte & 0x80:
            return value, place
