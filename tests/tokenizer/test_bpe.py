import json
import random
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from freehold.core.errors import ArtifactError, DataError
from freehold.core.log import Log
from freehold.stages.export.llama import ExactLlama
from freehold.stages.export.samples import KINDS, SCRIPTS
from freehold.tokenizer import bpe
from freehold.tokenizer.bpe import SPECIALS, Tokenizer, tokenizer_file, train

ODD = [
    "",
    " ",
    "1234567 12 007 1,234.5 1e10 12345678901234567890",
    "a1b22c333d4444  5\t6\n7\r\n8\x009\x01\x0210",
    "١٢٣٤٥٦٧ ४५६ ½¼² Ⅷ ⑳ 1²3 x٣4",
    "แม่๑๒๓๔ ເ໑໒ ក១២៣៤5 က၁၂2 ๑1๒2 \ue000๑ ꘠꘡a",
    "def f(x):\n\treturn x  # \t trailing  \n\n\n    y = 'it''s'\r\n\r\n",
    "line\u2028separator\u2029 nbsp\u00a0\u00a0x ideographic\u3000\u3000的 \x85 \x1c\x1d",
    "a\u0301\u0300 \u0301b \ufeffbom zero\u200bwidth\u200djoin\u00adhy",
    "\x00\x00 \x00a\x7f\x7f1 \x01!\x02\n\x03",
    "~~~ $$$ ^^^ `code` <tag attr='v'> {}[]()|\\ //comment !abc!é ?ñ",
    "豈\uf900 ꀀ\ua4d0 \ue000\uf8ff ゠・ｱ･ 。、「」 เ฿ก ᄀ\u1160힣\ud7b0",
    "👍🏽👩‍👩‍👧🇫🇷 𠀀𝔘𝟘 \U000e0001 \U0010ffff \u0378",
    "trailing spaces   ",
    "\n\n\n \n  \n\t\n x",
    "<|im_end|> <|begin_of_text|><think></think><|im_start|>system\n<|reserved_special_8|>",
]
TEXTS = [*ODD, *KINDS.values(), *SCRIPTS.values()]
LETTERS = st.sampled_from(sorted(set("".join(ODD)))) | st.characters(exclude_categories=["Cs"])
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(TEXTS * 2, 1500, Log(quiet=True))


@pytest.fixture(scope="module")
def probe() -> Tokenizer:
    """Merges only the last byte of any character with the first of any other: ids show every cut between two."""
    names = bpe._CHARACTERS
    ends, starts = [*range(0x80, 0xC0), *range(0x80)], [*range(0xC2, 0xF5), *range(0x80)]
    return Tokenizer(json.dumps(tokenizer_file([(names[end], names[start]) for end in ends for start in starts])))


@lru_cache(maxsize=4)
def hf(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(tokenizer.text)


@lru_cache(maxsize=4)
def plain_hf(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps({**tokenizer.data, "added_tokens": [], "post_processor": None}))


def test_ids_are_in_trinitys_order(tokenizer: Tokenizer) -> None:
    vocabulary = tokenizer.data["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(1500))
    assert tokenizer.vocab_size == 1500 == 32 + 256 + len(tokenizer.data["model"]["merges"])
    assert len(SPECIALS) == len(set(SPECIALS)) == 32
    assert [SPECIALS[i] for i in (0, 1, 2, 3, 4, 12)] == [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|eot_id|>",
        "<|pad|>",
    ]
    assert SPECIALS[13:21] == (
        *("<think>", "</think>", "<tools>", "</tools>"),
        *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    )
    shown = [t["id"] for t in tokenizer.data["added_tokens"] if not t["special"]]
    assert shown == list(range(13, 21))
    assert {len(tokenizer.token_bytes(i)) for i in range(32, 288)} == {1}


def test_training_is_deterministic_and_blind_to_order(tokenizer: Tokenizer) -> None:
    shuffled = TEXTS * 2
    random.Random(3).shuffle(shuffled)
    assert train(iter(shuffled), 1500, Log(quiet=True)).text == tokenizer.text


def test_too_small_and_too_large_vocabularies_are_refused() -> None:
    with pytest.raises(DataError, match=r"found:\s+291 tokens"):  # "the" is th + e, " the" is one more
        train(["the the the"], 2000, Log(quiet=True))
    with pytest.raises(DataError, match="at least 288"):
        train(["the"], 287, Log(quiet=True))
    with pytest.raises(DataError, match="at least 1,388"):
        train(["the"], 1000, Log(quiet=True), digit_groups=True)


def test_digit_groups_are_tokens_and_change_nothing_else() -> None:
    tokenizer = train([*TEXTS, "2024 was 365 days"] * 2, 2100, Log(quiet=True), digit_groups=True)
    reference = plain_hf(tokenizer)
    for digits in (f"{n:0{width}}" for width in (1, 2, 3) for n in range(10**width)):
        assert tokenizer.encode(digits) == reference.encode(digits).ids == [reference.token_to_id(digits)]
    assert [tokenizer.decode([i]) for i in tokenizer.encode("1234567")] == ["1", "234", "567"]
    assert all(tokenizer.encode(text) == reference.encode(text).ids for text in TEXTS)
    assert not any(set(t) & set("0123456789") for t, i in tokenizer.data["model"]["vocab"].items() if i >= 288 + 1100)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_hugging_face(tokenizer: Tokenizer, probe: Tokenizer, text: str) -> None:
    for one in (tokenizer, probe):
        assert one.encode(text) == plain_hf(one).encode(text).ids == one.encode_array(text).tolist()
        assert one.encode(text, specials=True) == hf(one).encode(text, add_special_tokens=False).ids
        assert one.decode(one.encode(text)) == text


def test_random_text_equals_hugging_face(tokenizer: Tokenizer, probe: Tokenizer) -> None:
    pairs = [(one, plain_hf(one)) for one in (tokenizer, probe)]

    @QUICK
    @given(st.text(LETTERS, max_size=80))
    def check(text: str) -> None:
        for one, reference in pairs:
            assert one.encode(text) == reference.encode(text).ids
            assert one.decode(one.encode(text), skip_specials=False) == text

    check()


def every_character(assigned: bool) -> str:
    """Return each character between letters, spaces and marks; `assigned`: only those old enough for every table."""
    old = unicodedata.ucd_3_2_0
    characters = (chr(c) for c in range(0x20000) if not 0xD800 <= c <= 0xDFFF)
    return "".join(f"x{c} !{c}" for c in characters if not assigned or old.category(c) != "Cn")


def test_every_character_is_cut_as_hugging_face_does(probe: Tokenizer) -> None:
    text = every_character(assigned=False)
    parts = [text[i : i + 100_000] for i in range(0, len(text), 100_000)]
    assert sum(probe._is_fast(part) for part in parts) > len(parts) / 2
    reference = plain_hf(probe)
    assert all(probe.encode(part) == reference.encode(part).ids for part in parts)


def test_digits_of_unspaced_scripts_are_all_known() -> None:
    def removed(pattern: str, text: str) -> str:
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "removed")
        return "".join(part for part, _ in split.pre_tokenize_str(text))

    everything = "".join(chr(c) for c in range(0x10000) if not 0xD800 <= c <= 0xDFFF)
    inside = removed(f"[^{bpe._UNSPACED_CHARACTERS}]+", everything)
    assert "".join(bpe._OWN_DIGITS.findall(inside)) == removed(r"\P{N}+", inside)


@pytest.fixture(scope="module")
def llama(probe: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ExactLlama]:
    """llama.cpp with the probe's vocabulary and `pre: afmoe`, in a tiny model of another kind."""
    folder = tmp_path_factory.mktemp("llama")
    vocabulary = sorted(probe.data["model"]["vocab"].items(), key=lambda item: item[1])
    kinds = {t["id"]: 3 if t["special"] else 4 for t in probe.data["added_tokens"]}
    d = 32
    writer = gguf.GGUFWriter(folder / "probe.gguf", "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(d)
    writer.add_block_count(1)
    writer.add_feed_forward_length(d)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("afmoe")
    writer.add_token_list([name for name, _ in vocabulary])
    writer.add_token_types([kinds.get(number, 1) for _, number in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in probe.data["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(3)
    for name in ("token_embd", "output"):
        writer.add_tensor(f"{name}.weight", np.zeros((len(vocabulary), d), np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(d, np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((d, d), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with ExactLlama(folder / "probe.gguf", 64, folder / "log.txt") as process:
        yield process


def test_text_is_cut_as_llama_cpp_does(probe: Tokenizer, llama: ExactLlama) -> None:
    for text in [*KINDS.values(), *SCRIPTS.values(), *ODD[:-1], every_character(assigned=True)]:
        assert probe.encode(text) == llama.tokenize(text), text[:200]


def test_random_text_is_cut_as_llama_cpp_does(probe: Tokenizer, llama: ExactLlama) -> None:
    letters = sorted(set("".join(ODD)) - {"\U000e0001"})

    @QUICK
    @given(st.lists(st.text(st.sampled_from(letters), max_size=60), max_size=5))
    def check(texts: list[str]) -> None:
        text = "".join(texts)
        # llama.cpp reads tags (not control tokens) in any text; ours reads neither.
        assume(not any(tag in text for tag in SPECIALS[13:21]))
        assert probe.encode(text) == llama.tokenize(text)

    check()


@pytest.mark.parametrize("character", [*"a !5\n的\x00", "ab ", "\x005", "é~"])
def test_long_runs_do_not_break_the_fast_path(tokenizer: Tokenizer, character: str) -> None:
    text = character * (bpe._LONGEST_FAST_CHARS // len(character))
    assert tokenizer._is_fast(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("character", [" ", "\x00"])
def test_longer_runs_take_the_chain(tokenizer: Tokenizer, character: str) -> None:
    text = character * 1_100_000
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_strings_in_text_are_ordinary(tokenizer: Tokenizer) -> None:
    text = "".join(SPECIALS)
    assert min(tokenizer.encode(text)) >= 32
    assert min(tokenizer.encode_array(text)) >= 32
    assert tokenizer.encode(text, specials=True) == list(range(32))
    own_digits = text + "๑"  # the slower path keeps the promise too
    assert min(tokenizer.encode(own_digits)) >= 32
    assert tokenizer.encode(own_digits, specials=True)[:32] == list(range(32))


def test_decoding_hides_control_tokens_and_shows_tags(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.bos, *tokenizer.encode("<think>hm</think>yes", specials=True), tokenizer.eos, tokenizer.pad]
    assert tokenizer.decode(ids) == "<think>hm</think>yes" == hf(tokenizer).decode(ids)
    assert tokenizer.decode(ids, skip_specials=False).endswith("yes<|im_end|><|pad|>")
    assert tokenizer.decode(tokenizer.encode("é")[:1] if len(tokenizer.encode("é")) > 1 else [32 + 0xC3 - 1])
    with pytest.raises(DataError, match="no such token"):
        tokenizer.decode([1500])


def test_lone_surrogates_become_replacement_characters(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode_array("\udc00๑").tolist()) == "\ufffd๑"


def test_batches_are_the_same_as_one_by_one(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_batch(TEXTS, threads=3) == [tokenizer.encode(text) for text in TEXTS]


def test_files_load_in_hugging_face_with_its_begin_token(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    ours = Tokenizer.load(tmp_path)
    assert (ours.sha256, ours.text) == (tokenizer.sha256, tokenizer.text)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 3, 12)
    for text in TEXTS:
        assert theirs(text).input_ids == [0, *tokenizer.encode(text, specials=True)]
    assert len(theirs) == tokenizer.vocab_size


def test_another_chain_takes_the_slower_path(probe: Tokenizer) -> None:
    data = json.loads(probe.text)
    data["pre_tokenizer"] = {**bpe.CHAIN["pretokenizers"][-1], "use_regex": True}
    other = Tokenizer(json.dumps(data))
    assert other.encode("!a") == plain_hf(other).encode("!a").ids != probe.encode("!a")
    assert other.encode("a<|im_end|>", specials=True)[-1] == 3 not in other.encode("a<|im_end|>")


def test_files_that_are_no_tokenizer_of_ours_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ArtifactError, match="no tokenizer here"):
        Tokenizer.load(tmp_path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"(?s)not a tokenizer.*tokenizer\.json"):
        Tokenizer.load(tmp_path)
    path.write_text("{}")
    with pytest.raises(DataError, match=r"(?s)not a tokenizer.*tokenizer\.json"):
        Tokenizer.load(tmp_path)
    data = json.loads(tokenizer.text)
    del data["added_tokens"][3]
    with pytest.raises(DataError, match=r"(?s)im_end.*found:    absent.*expected: 3"):
        Tokenizer(json.dumps(data))
    data = json.loads(tokenizer.text)
    data["model"]["vocab"]["\u4e00"] = 1500
    with pytest.raises(DataError, match="not a byte-level tokenizer"):
        Tokenizer(json.dumps(data))
