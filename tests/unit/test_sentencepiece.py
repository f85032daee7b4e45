"""Tokenizers inside weight files, against what SentencePiece itself makes of the same model.

`gemma_like.model` was trained by SentencePiece 0.2.3 on the corpus of `tiny_pipelines.py` with Gemma's settings: BPE
of 420 pieces with bytes to fall back on, digits apart, no normalizing, words of its own for blanks and line ends.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from burnish.errors import ModelError
from burnish.families.gemma import tokenizer_of
from burnish.families.sentencepiece import Kind, merges_of, pieces_of

MODEL = (Path(__file__).parent / "gemma_like.model").read_bytes()
BEGIN = 2
ENCODED = {  # by SentencePieceProcessor.encode
    "a photo of a sks dog": [394, 283, 334, 346, 294, 269, 310, 399, 317],
    "two  people   walking": [391, 347, 8, 409, 359, 288, 8, 268, 272, 314],
    "line\n\nand line": [398, 266, 392, 7, 319, 406, 304, 266, 392],
    "\u00fcn\u00efcode \u732b \U0001f642": [
        *(204, 197, 400, 204, 184, 411, 395, 406, 392, 390),
        *(240, 149, 180, 390, 249, 168, 162, 139),
    ],
    "<start_of_turn>1girl 42": [5, 417, 401, 306, 390, 61, 59],
    "": [],
    " blue sky ": [316, 392, 310, 404, 390],
}


@pytest.mark.parametrize("text", ENCODED)
def test_a_text_is_cut_as_sentencepiece_cuts_it(text: str) -> None:
    assert tokenizer_of(MODEL)(text)["input_ids"] == [BEGIN, *ENCODED[text]]


def test_pieces_come_in_the_order_of_their_numbers() -> None:
    pieces = pieces_of(MODEL)
    assert len(pieces) == 420
    assert [piece.text for piece in pieces[:5]] == ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    assert [piece.kind for piece in pieces[2:5]] == [Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED]
    assert sum(piece.kind == Kind.BYTE for piece in pieces) == 256
    assert pieces[394].text == "a"
    merges = merges_of(pieces)
    assert ("\u2581", "s") in merges
    assert not any("<" in left + right for left, right in merges)  # no marks, no bytes


@pytest.mark.parametrize(
    "broken", [MODEL[:-1], MODEL[:3000], b"\xff" * 40, b"not a model at all", b""], ids=range(5)
)
def test_a_damaged_tokenizer_is_said_to_be_one(broken: bytes) -> None:
    with pytest.raises(ModelError, match="tokenizer inside the weight file"):
        pieces_of(broken)
