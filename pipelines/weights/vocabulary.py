"""CLIP's tokenizer out of the merges that OpenAI published, for checkpoints, which bring none.

`config/vocabulary/clip_merges.txt.xz` is those of https://github.com/openai/CLIP that CLIP uses, unchanged and
compressed; NOTICE has their licence. Everything else of a vocabulary follows from them.
"""

from __future__ import annotations

import lzma

from transformers import CLIPTokenizer

from config.catalog import ROOT

MERGES = ROOT / "config" / "vocabulary" / "clip_merges.txt.xz"
START, END = "<|startoftext|>", "<|endoftext|>"


def clip_tokenizer(pad_token: str = END, model_max_length: int = 77) -> CLIPTokenizer:
    """The tokenizer of every published CLIP text encoder; SD2 and SDXL's second encoder pad with `!`."""
    with lzma.open(MERGES, "rt", encoding="utf-8") as lines:
        merges = [(left, right) for left, right in map(str.split, lines)]
    symbols = [*_symbols(), *(f"{symbol}</w>" for symbol in _symbols()), *(f"{a}{b}" for a, b in merges), START, END]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=pad_token,
        model_max_length=model_max_length,
    )


def _symbols() -> list[str]:
    """A printable character for each of the 256 bytes, in GPT-2's order: itself where it is one, else one of 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [*map(chr, printable), *(chr(256 + index) for index in range(256 - len(printable)))]
