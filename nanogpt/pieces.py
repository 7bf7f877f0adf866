r"""Byte-pair encoding of many texts, faster: each piece of text is encoded once and remembered.

GPT-2 cuts a text into pieces before it merges bytes, and no merge crosses a cut:

    '(?:[sdmt]|ll|ve|re) | ?\p{L}+ | ?\p{N}+ | ?[^\s\p{L}\p{N}]+ | \s+(?!\S) | \s+

In words: a blank belongs to what follows it; letters, digits and signs stay among themselves; of several blanks the
last one goes its own way; English contractions are pieces. The same few pieces come again and again, so that it
pays to find the cuts with array operations and to look the ids up. A word that is not all ASCII stays whole (around
words there are cuts in any case) and is left to the encoder that this one stands in front of.
"""

import re
import string
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.unsignedinteger[Any]]

_REMEMBERED = 1 << 18  # pieces, until all are forgotten: bounds the memory
_MOST_IDS = 1 << 23  # of all pieces together, likewise
_SLOTS = 18  # bits of a slot's number in the table of short pieces
_WIDE_BLANKS = re.compile("[\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")
_END = b"\0"  # stands behind each text
_BLANK, _LETTER, _DIGIT, _SIGN, _OTHER, _GAP = range(6)
_LETTERS, _DIGITS, _BLANKS = string.ascii_letters.encode(), string.digits.encode(), b"\t\n\v\f\r "
_KIND = bytes(
    _GAP if byte == 0 else _BLANK if byte in _BLANKS else _LETTER if byte in _LETTERS else _DIGIT if byte in _DIGITS
    else _SIGN if byte < 128 else _OTHER for byte in range(256)
)  # fmt: skip
_CONTRACTIONS = {b"s": 2, b"d": 2, b"m": 2, b"t": 2, b"ll": 3, b"ve": 3, b"re": 3}  # behind ', with the length of all
_FIRST_BYTES = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)  # masks
_ODD_1, _ODD_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x9E3779B97F4A7C15)  # multipliers that mix bits


def piece_starts(data: bytes) -> npt.NDArray[np.int64]:
    """Where the pieces of UTF-8 texts begin, each text followed by a zero byte, which is a piece, too."""
    b = np.frombuffer(data, np.uint8)
    kind = np.frombuffer(data.translate(_KIND), np.uint8)
    blank, gap = kind == _BLANK, kind == _GAP
    start = np.ones(len(b), bool)
    start[1:] = (kind[1:] != kind[:-1]) | gap[1:]
    before_word = blank[:-1] & ~(blank | gap)[1:]  # the last blank of several
    start[:-1] |= before_word
    start[1:] &= ~(before_word & (b[:-1] == ord(" ")))
    for at in np.flatnonzero((b == ord("'")) & start).tolist():
        if length := _CONTRACTIONS.get(data[at + 1 : at + 2]) or _CONTRACTIONS.get(data[at + 1 : at + 3]):
            start[at + 1 : at + length] = False
            start[at + length] = True
    if not data.isascii():
        between = np.flatnonzero(blank | gap)  # words
        after = np.unique(np.searchsorted(between, np.flatnonzero(kind == _OTHER)))
        begin = np.where(after > 0, between[after - 1] + 1, 0)
        for first, end in zip(begin.tolist(), between[after].tolist(), strict=True):
            start[first + 1 : end] = False
    return np.flatnonzero(start)


def _simple(text: str) -> bytes | None:
    """The UTF-8 of a text; None if `piece_starts` can't cut it, or it isn't worth it."""
    if "\0" in text or (not text.isascii() and _WIDE_BLANKS.search(text)):
        return None
    try:
        content = text.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return None
    return content if len(content) < 2.2 * len(text) else None  # Chinese, say: hardly a word comes twice


class PieceEncoder:
    """Encodes as `encode` does, whose pretokenizer must be GPT-2's, but asks it for each piece only once."""

    def __init__(self, encode: Callable[[str], Ids | list[int]]) -> None:
        self._encode = encode
        self._forget(_REMEMBERED)

    def _forget(self, room: int) -> None:
        self._number = {_END: 0}  # of a piece
        self._ids = np.zeros(1 << 20, np.uint32)  # of all pieces, one after the other
        self._used = 0
        self._begin, self._count = np.zeros((2, room), np.int64)  # there, by number
        self._slot_key = np.zeros(1 << _SLOTS, np.uint64)  # pieces of up to 16 bytes: their bytes,
        self._slot_more = np.zeros(1 << _SLOTS, np.uint64)  # the second eight of them,
        self._slot_number = np.zeros(1 << _SLOTS, np.int64)  # and their number

    def __call__(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text, shape (tokens,) each."""
        contents = [_simple(text) for text in texts]
        joined = b"".join(content + _END for content in contents if content is not None)
        ids = iter(self._encode_joined(joined) if joined else [])
        return [
            np.asarray(self._encode(text), np.uint32) if content is None else next(ids)
            for text, content in zip(texts, contents, strict=True)
        ]

    def _encode_joined(self, data: bytes) -> list[Ids]:
        starts = piece_starts(data)
        lengths = np.diff(starts, append=len(data))
        if len(self._number) + len(starts) > len(self._begin) or self._used > _MOST_IDS:
            self._forget(max(_REMEMBERED, len(starts) + 1))
        eight_bytes = np.ndarray(len(data) + 8, "<u8", data + bytes(16), strides=(1,))
        key = eight_bytes[starts] & _FIRST_BYTES[np.minimum(lengths, 8)]
        more = eight_bytes[starts + 8] & _FIRST_BYTES[np.clip(lengths - 8, 0, 8)]
        slot = (((key ^ more * _ODD_1) * _ODD_2) >> np.uint64(64 - _SLOTS)).astype(np.int64)
        number = self._slot_number[slot]
        known = (self._slot_key[slot] == key) & (self._slot_more[slot] == more) & (lengths <= 16)
        unknown = np.flatnonzero(~known)
        bounds = zip(starts[unknown].tolist(), (starts + lengths)[unknown].tolist(), strict=True)
        number[unknown] = [self._number_of(data[start:end]) for start, end in bounds]
        short = unknown[lengths[unknown] <= 16]
        at = slot[short]
        self._slot_key[at], self._slot_more[at], self._slot_number[at] = key[short], more[short], number[short]
        count = self._count[number]
        end = count.cumsum()
        ids = self._ids[np.repeat(self._begin[number] - end + count, count) + np.arange(end[-1])]
        return np.split(ids, end[number == 0][:-1])

    def _number_of(self, piece: bytes) -> int:
        number = self._number.get(piece)
        if number is None:
            ids = self._encode(piece.decode())
            number = self._number[piece] = len(self._number)
            if self._used + len(ids) > len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros(len(self._ids) + len(ids), np.uint32)])
            self._ids[self._used : self._used + len(ids)] = ids
            self._begin[number], self._count[number] = self._used, len(ids)
            self._used += len(ids)
        return number
