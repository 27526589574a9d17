"""Byte-level BPE as Trinity cuts text: training, ids, text again.

`tokenizer.json` is in Hugging Face's form, so any runtime reads it. Encoding runs through tiktoken, which gives
the same ids several times faster (tested on every script and on random text).
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tiktoken
import tokenizers
from tokenizers import models, trainers

from freehold.core.artifact import write_atomic, write_json
from freehold.core.errors import ArtifactError, DataError
from freehold.core.log import Log
from freehold.tokenizer.template import JINJA

if TYPE_CHECKING:
    import numpy as np

BOS, END_OF_TEXT, IM_START, IM_END, PAD = 0, 1, 2, 3, 12
# The first 32 ids, as in Trinity's Base models: the tags at 13..20 took the place of TrueBase's reserved tokens.
_TAGS = ("think", "tools", "tool_call", "tool_response")
SPECIALS: tuple[str, ...] = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"),
    *("<|start|>", "<|channel|>", "<|message|>", "<|end|>"),
    *("<|fitm_start|>", "<|fitm_end|>", "<|fitm_hole|>", "<|pad|>"),
    *(f"<{slash}{tag}>" for tag in _TAGS for slash in ("", "/")),
    *(f"<|reserved_special_{n}|>" for n in range(8, 19)),
)
# Tags are single tokens but text to a reader: decoding shows them, or no reader could find a tool call.
_VISIBLE = range(13, 21)

# How text is cut before merging: exactly what llama.cpp does for `tokenizer.ggml.pre = afmoe`, which is Trinity's
# chain with three turns of its own. A GGUF file names its pre-tokenizer and cannot carry one, so we follow it:
#  1. Digits in groups of three from the right. llama.cpp does not end a piece before a run of digits, so the text
#     before it stays with the first group until step 3 (seen in "  7" -> " ", " ", "7"): merged with previous.
#     Trinity also cuts runs at 510 digits, llama.cpp does not: no cut.
#  2. Runs of scripts without spaces. In llama.cpp's literal U+F900 became its NFC form U+8C48, so that range starts
#     there and takes in Yi, private use and more; and Thai starts at U+0E40.
#  3. The main split of DeepSeek-V3.
# What is left: characters that Unicode 16 added; the tables of llama.cpp are those of Unicode 15.
_UNSPACED = (
    r"\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f"
    r"\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff"
)
_UNSPACED_CHARACTERS = codecs.decode(_UNSPACED, "unicode_escape")
_DIGITS = r"(?<!\p{N})\p{N}{1,2}(?=(?:\p{N}{3})+(?!\p{N}))|\p{N}{1,3}"
_ASCII_WORD = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
_MAIN = _ASCII_WORD + r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(pattern: str, behavior: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}


def _byte_level(**more: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False, **more}


CHAIN: dict[str, Any] = {
    "type": "Sequence",
    "pretokenizers": [
        _split(_DIGITS, "MergedWithPrevious"),
        _split(f"[{_UNSPACED_CHARACTERS}]+", "Isolated"),
        _split(_MAIN, "Isolated"),
        _byte_level(),
    ],
}


def _one_pattern() -> str:
    """Return the chain as one expression that leaves no character out, for tiktoken.

    Each class of the main split appears twice, inside and outside the unspaced scripts, because step 2 puts a
    boundary where one changes into the other. The last alternatives take what the main split skips (control and
    unassigned characters), with the digits that step 1 leaves attached to them.
    """
    digits = r"(?:\p{N}{1,2}(?=(?:\p{N}{3})+(?!\p{N}))|\p{N}{1,3})"
    words, marks, rest = [], [], []
    for side in (f"[^{_UNSPACED}]", f"[{_UNSPACED}]"):
        word = rf"[[\p{{L}}\p{{M}}]&&{side}]"
        other = rf"[[^\s\p{{L}}\p{{M}}\p{{N}}\p{{P}}\p{{S}}]&&{side}]"
        words.append(rf"[[^\r\n\p{{L}}\p{{N}}\p{{P}}\p{{S}}]&&{side}]?{word}+")
        marks.append(rf" ?[[\p{{P}}\p{{S}}]&&{side}]+[\r\n]*")
        rest += [rf"{other}+(?={other}{word})", rf"{other}+{digits}?"]
    marks[1] = rf"[[\p{{P}}\p{{S}}]&&[{_UNSPACED}]]+"  # a space or a line break is never inside
    rest[3] = rest[3].removesuffix(digits + "?")  # digits of an unspaced script never come here, see _OWN_DIGITS
    spaces = [r"\s*[\r\n]+", rf"\s+(?![^\s{_UNSPACED}])", r"\s+"]
    return "|".join([_ASCII_WORD, *words, *marks, *spaces, _DIGITS, *rest])


# Digits inside the unspaced scripts can stand in one run with others, where the chain cuts in ways one expression
# does not express; text with them goes through the chain itself.
_OWN_DIGITS = re.compile(
    "[\u0e50-\u0e59\u0ed0-\u0ed9\u1040-\u1049\u1090-\u1099\u17e0-\u17e9\u17f0-\u17f9\ua620-\ua629\ua6e6-\ua6ef"
    "\ua830-\ua835\ua8d0-\ua8d9\ua900-\ua909\ua9d0-\ua9d9\ua9f0-\ua9f9\uaa50-\uaa59\uabf0-\uabf9]"
)
# tiktoken's expression engine gives up on runs of about a million characters of one class; longer texts go through
# the chain, which does not.
_LONGEST_FAST_CHARS = 500_000


def _byte_characters() -> list[str]:
    """Return the character that stands for each byte in `tokenizer.json` (GPT-2's table)."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(0x100, 0x200))
    return [chr(byte) if byte in shown else chr(next(hidden)) for byte in range(256)]


_CHARACTERS = _byte_characters()
_BYTES = {character: byte for byte, character in enumerate(_CHARACTERS)}


def train(texts: Iterable[str], vocab_size: int, log: Log, *, digit_groups: bool = False) -> Tokenizer:
    """Train a tokenizer of exactly `vocab_size` tokens: 32 specials, 256 bytes, the rest merges.

    With `digit_groups` every string of one to three ASCII digits is a token (1,100 merges before the others), as in
    Trinity. The same texts in any order give the same tokenizer. Raises DataError when the texts do not hold
    enough repeated pairs.
    """
    base = len(SPECIALS) + 256
    merges = _digit_merges() if digit_groups else []
    least = base + len(merges)
    if vocab_size < least:
        raise DataError("the vocabulary is too small", found=vocab_size, expected=f"at least {least:,}")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIALS) - len(merges),
        initial_alphabet=sorted(_CHARACTERS),
        min_frequency=2,
        show_progress=False,
    )
    steps = json.loads(json.dumps(CHAIN))
    if digit_groups:  # they have all their merges already
        steps["pretokenizers"].insert(3, _split("[0-9]+", "Removed"))
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = _pre_tokenizer(steps)
    learner.train_from_iterator(texts, trainer)
    merges += [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    if base + len(merges) != vocab_size:
        raise DataError(
            "too little text for this vocabulary",
            found=f"{base + len(merges):,} tokens, then no pair occurs twice",
            expected=f"vocab_size {vocab_size:,}",
            todo="lower `vocab_size` or give more text",
        )
    log.say(f"tokenizer: {vocab_size:,} tokens, {len(merges):,} merges")
    return Tokenizer(json.dumps(tokenizer_file(merges), ensure_ascii=False, indent=1) + "\n")


def _pre_tokenizer(steps: dict[str, Any]) -> Any:
    """Build a pre-tokenizer from its JSON form (the library reads that only as part of a whole tokenizer)."""
    empty = json.loads(tokenizers.Tokenizer(models.BPE()).to_str())
    return tokenizers.Tokenizer.from_str(json.dumps({**empty, "pre_tokenizer": steps})).pre_tokenizer


def _digit_merges() -> list[tuple[str, str]]:
    """Return merges that make every string of two or three digits one token.

    Of `abc` the pair with the lower rank, `ab` or `bc`, merges first (the left one when equal), so exactly one
    merge leads to each triple.
    """
    pairs = [(str(n // 10), str(n % 10)) for n in range(100)]
    triples = [f"{n:03}" for n in range(1000)]
    return pairs + [(t[:2], t[2]) if t[:2] <= t[1:] else (t[0], t[1:]) for t in triples]


def tokenizer_file(merges: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return the whole `tokenizer.json` that follows from a list of merges."""
    names = [*SPECIALS, *sorted(_CHARACTERS), *(left + right for left, right in merges)]
    vocabulary = {name: number for number, name in enumerate(names)}
    assert len(vocabulary) == len(names), "two merges give one token: ranks would not be merge order"
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    bos = SPECIALS[BOS]

    def template(*sequences: str) -> list[dict[str, Any]]:
        start = {"SpecialToken": {"id": bos, "type_id": 0}}
        return [start, *({"Sequence": {"id": s, "type_id": n}} for n, s in enumerate(sequences))]

    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": name, **flags, "special": number not in _VISIBLE}
            for number, name in enumerate(SPECIALS)
        ],
        "normalizer": None,
        "pre_tokenizer": CHAIN,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": template("A"),
            "pair": template("A", "B"),
            "special_tokens": {bos: {"id": bos, "ids": [BOS], "tokens": [bos]}},
        },
        "decoder": _byte_level(add_prefix_space=True, use_regex=True),
        "model": {
            **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
            "type": "BPE",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [list(pair) for pair in merges],
        },
    }


class Tokenizer:
    """Text to ids and back; immutable, safe to share between threads.

    Made by `train` or `load`. Trinity's own files load too (through the slower path, their chain differs in the
    points named above).
    """

    bos, end_of_text, im_start, im_end, pad = BOS, END_OF_TEXT, IM_START, IM_END, PAD
    eos = IM_END

    def __init__(self, text: str) -> None:
        """Read the text of a `tokenizer.json`; DataError when it is not byte-level BPE with our special ids."""
        self.text = text
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        try:
            self.data: dict[str, Any] = json.loads(text)
            self._chain = tokenizers.Tokenizer.from_str(text)
            self._plain = tokenizers.Tokenizer.from_str(
                json.dumps({**self.data, "added_tokens": [], "post_processor": None})
            )
        except Exception as error:  # the library raises bare Exception for whatever it cannot read
            raise DataError("not a tokenizer.json", found=str(error)[:200]) from error
        self.specials: dict[str, int] = {t["content"]: t["id"] for t in self.data["added_tokens"]}
        self._hidden = frozenset(t["id"] for t in self.data["added_tokens"] if t["special"])
        for number in (BOS, END_OF_TEXT, IM_START, IM_END, PAD):
            if self.specials.get(SPECIALS[number]) != number:
                found = self.specials.get(SPECIALS[number], "absent")
                raise DataError(f"{SPECIALS[number]} is not the token it must be", found=found, expected=number)
        self.vocab_size = self._chain.get_vocab_size(with_added_tokens=True)
        self.prefix: tuple[int, ...] = tuple(self._chain.encode("", add_special_tokens=True).ids)
        """What this file puts before a text, in any runtime that reads it: BOS, or nothing."""
        special_ids = set(self.specials.values())
        try:
            ranks = {
                bytes(_BYTES[character] for character in name): number
                for name, number in self.data["model"]["vocab"].items()
                if number not in special_ids
            }
        except KeyError as error:
            raise DataError("not a byte-level tokenizer", found=f"a token with {error}") from error
        self._bytes = {number: token for token, number in ranks.items()}
        self._bytes.update({number: name.encode() for name, number in self.specials.items()})
        self.longest_token_bytes = max(map(len, self._bytes.values()))
        self._fast = None
        if self.data["pre_tokenizer"] == CHAIN:
            self._fast = tiktoken.Encoding(
                "freehold", pat_str=_one_pattern(), mergeable_ranks=ranks, special_tokens=self.specials
            )

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read `tokenizer.json` from a folder; ArtifactError when it is not there."""
        path = folder / "tokenizer.json"
        if not path.exists():
            raise ArtifactError("no tokenizer here", where=folder, expected="tokenizer.json")
        try:
            return cls(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise DataError("not a tokenizer.json", where=path, found=error) from error
        except DataError as error:
            raise DataError(error.what, where=path, found=error.found, expected=error.expected) from error

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` (with the chat template)."""
        write_atomic(folder / "tokenizer.json", self.text)
        write_json(
            folder / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": SPECIALS[BOS],
                "eos_token": SPECIALS[IM_END],
                "pad_token": SPECIALS[PAD],
                "clean_up_tokenization_spaces": False,
                "chat_template": JINJA,
                "answer_format": {"dialect": "hermes", "thinking": False, "calls_in_reasoning": True},
            },
        )

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        """Return the ids of a text, without BOS.

        Strings that look like special tokens are ordinary text unless `specials`. Lone surrogates, which no UTF-8
        text can hold, become U+FFFD.
        """
        text = _clean(text)
        if not self._is_fast(text):
            return (self._chain if specials else self._plain).encode(text, add_special_tokens=False).ids
        assert self._fast is not None
        return self._fast.encode(text, allowed_special="all") if specials else self._fast.encode_ordinary(text)

    def encode_array(self, text: str) -> np.ndarray:
        """Return the ids of a text as uint32, as `encode` without a Python list in between."""
        import numpy as np

        text = _clean(text)
        if not self._is_fast(text):
            return np.array(self.encode(text), np.uint32)
        assert self._fast is not None
        return self._fast.encode_to_numpy(text, disallowed_special=())

    def encode_batch(self, texts: Sequence[str], *, threads: int = 2) -> list[list[int]]:
        """Return the ids of many texts, in `threads` threads (the library lets go of Python's lock)."""
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self.encode, texts))

    def decode(self, ids: Iterable[int], *, skip_specials: bool = True) -> str:
        """Return the text of ids; broken UTF-8 becomes U+FFFD.

        `skip_specials` skips the control tokens, not the tags (`<think>`, `<tool_call>`): a reader needs them.
        """
        return self.decode_bytes(ids, skip_specials=skip_specials).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int], *, skip_specials: bool = True) -> bytes:
        """Return the bytes of ids; DataError for an id outside the vocabulary."""
        hidden = self._hidden if skip_specials else frozenset()
        return b"".join(self.token_bytes(number) for number in ids if number not in hidden)

    def token_bytes(self, number: int) -> bytes:
        """Return the bytes of one token, specials included; DataError for an id outside the vocabulary."""
        try:
            return self._bytes[number]
        except KeyError:
            raise DataError("no such token", found=number, expected=f"0 to {self.vocab_size - 1}") from None

    def _is_fast(self, text: str) -> bool:
        return (
            self._fast is not None
            and len(text) <= _LONGEST_FAST_CHARS
            and (text.isascii() or _OWN_DIGITS.search(text) is None)
        )


def _clean(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
