"""Every step that counts words, in scripts with and without spaces between them, with and without marks."""

from __future__ import annotations

import random

import numpy as np
import pytest

from freehold.stages.curate.config import NearDuplicates, Overlap
from freehold.stages.curate.dedup import cut_words, find_overlaps, near_duplicates, sketches, winnow
from freehold.stages.curate.filters import check_prose
from freehold.stages.curate.rules import PROSE
from freehold.stages.rephrase.checks import measure
from freehold.stages.rephrase.run import cut
from freehold.text.held_out import Questions
from freehold.text.words import read_batch, read_words, split_words, word_spans

# Some clauses of each; texts are made of them in random order, so that no two are the same.
CLAUSES = {
    "English": "the old man walked to the river|a small boat lay on the sand|nobody in the village knew his name|"
    "rain fell on the roofs all night|children sang in the school|the market was full of people|"
    "her letter came on Monday|they drank tea under the trees|the train left at noon|we found a key in the garden",
    "Chinese": "老人每天早上走到河边|一只小船停在沙滩上|村里没有人知道他的名字|雨整夜落在屋顶上|孩子们在学校里唱歌|"
    "市场上到处都是人|她的信在星期一到了|他们在树下喝茶|火车中午离开车站|我们在花园里找到一把钥匙",
    "Japanese": "老人は毎朝川まで歩いて行った|小さな船が砂の上に止まっていた|村の人は誰も彼の名前を知らなかった|"
    "雨が一晩中屋根に降っていた|子供たちは学校で歌を歌った|市場は人でいっぱいだった|彼女の手紙は月曜日に届いた|"
    "木の下でお茶を飲んでいた|汽車は正午に駅を出た|庭で一つの鍵を見つけた",
    "Thai": "ชายชราเดินไปที่แม่น้ำทุกเช้า|เรือลำเล็กจอดอยู่บนหาดทราย|ไม่มีใครในหมู่บ้านรู้ชื่อของเขา|ฝนตกบนหลังคาตลอดทั้งคืน|"
    "เด็กๆร้องเพลงที่โรงเรียน|ตลาดเต็มไปด้วยผู้คน|จดหมายของเธอมาถึงวันจันทร์|พวกเขาดื่มชาใต้ต้นไม้|รถไฟออกตอนเที่ยง|"
    "เราพบกุญแจในสวน",
    "Khmer": "បុរសចាស់ដើរទៅទន្លេរាល់ព្រឹក|ទូកតូចមួយចតនៅលើខ្សាច់|គ្មាននរណាក្នុងភូមិស្គាល់ឈ្មោះគាត់|ភ្លៀងធ្លាក់លើដំបូលពេញមួយយប់|"
    "ក្មេងៗច្រៀងនៅសាលារៀន|ផ្សារពោរពេញដោយមនុស្ស|សំបុត្ររបស់នាងមកដល់ថ្ងៃចន្ទ|ពួកគេផឹកតែក្រោមដើមឈើ|រថភ្លើងចេញនៅថ្ងៃត្រង់|"
    "យើងរកឃើញកូនសោក្នុងសួន",
    "Hindi": "बूढ़ा आदमी हर सुबह नदी तक चलता था|एक छोटी नाव रेत पर खड़ी थी|गाँव में कोई उसका नाम नहीं जानता था|"
    "रात भर छतों पर बारिश होती रही|बच्चे स्कूल में गीत गाते थे|बाज़ार लोगों से भरा हुआ था|उसकी चिट्ठी सोमवार को आई|"
    "वे पेड़ों के नीचे चाय पीते थे|रेलगाड़ी दोपहर को निकली|हमें बगीचे में एक चाबी मिली",
    "Arabic": "مَشَى الرَّجُلُ العَجُوزُ إلى النَّهْرِ|وَقَفَ قَارِبٌ صَغِيرٌ على الرَّمْلِ|لم يَعرِفْ أحدٌ في القريةِ اسمَهُ|"
    "سَقَطَ المطرُ على السُّطُوحِ طُولَ الليلِ|غَنَّى الأطفالُ في المدرسةِ|كانَ السُّوقُ مليئًا بالنَّاسِ|"
    "وَصَلَتْ رسالتُها يومَ الاثنين|شَرِبُوا الشَّايَ تحتَ الأشجارِ|غادَرَ القطارُ عندَ الظُّهرِ|وجدنا مِفتاحًا في الحديقةِ",
}
SPACES = {"English": " ", "Hindi": " ", "Arabic": " "}
STOPS = {"Chinese": "。", "Japanese": "。", "Thai": " ", "Khmer": "។ ", "Hindi": "। "}


def text(script: str, seed: int, clauses: int = 60) -> str:
    """Return sentences of two clauses whose own words are in random order too, so that few runs repeat."""
    dice = random.Random(f"{script}{seed}")
    made = []
    for _ in range(clauses):
        parts = CLAUSES[script].split("|")
        one, two = dice.sample(parts, 2)
        joint = SPACES.get(script, "")
        words = [split_words(one), split_words(two)]
        mixed = words[0][: dice.randint(2, len(words[0]))] + words[1][dice.randint(0, len(words[1]) - 2) :]
        made.append(joint.join(mixed))
    stop = STOPS.get(script, ". ")
    return "".join(sentence + stop for sentence in made)


SCRIPTS = pytest.mark.parametrize("script", CLAUSES)


def changed(script: str, whole: str, every: int) -> str:
    """Return a text with one word in `every` changed for another of the text."""
    starts, ends = word_spans(whole)
    words = [whole[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
    pieces, done = [], 0
    for number in range(every // 2, len(words), every):
        pieces += [whole[done : starts[number]], words[(number * 7 + 3) % len(words)]]
        done = int(ends[number])
    return "".join(pieces) + whole[done:]


@SCRIPTS
def test_near_duplicates_are_found_and_others_are_not(script: str) -> None:
    whole = text(script, 1)
    read = read_batch([whole, changed(script, whole, 120), text(script, 2), text(script, 3)])
    config = NearDuplicates()
    found = near_duplicates(np.arange(4), [sketches(read, config)], lambda i: read[i].hashes, config)
    assert found.keys() == {1}


def overlaps(texts: list[str]) -> tuple[dict[int, tuple[int, float]], dict[int, list[tuple[int, int]]]]:
    words = read_batch(texts)
    hashes, places, counts = winnow(words)
    documents = np.repeat(np.arange(len(texts)), counts)
    rules = Overlap(contained="drop", passages="drop")
    found = find_overlaps(
        np.arange(len(texts)), counts, lambda: [(hashes, documents, places)], lambda i: words[i].hashes, rules
    )
    return found.contained, found.passages


@SCRIPTS
def test_contained_documents_and_passages_are_found(script: str) -> None:
    book, chapter, other = text(script, 4, 200), text(script, 5, 40), text(script, 6, 80)
    contained, _ = overlaps([book + chapter, chapter, other])
    assert contained.keys() == {1}
    starts, ends = word_spans(book)
    passage = book[starts[100] : ends[219]]
    _, passages = overlaps([book, other + passage])
    ((start, end),) = passages[1]
    assert 120 <= end - start <= 130  # a word or so before it may be the same by chance
    assert cut_words(other + passage, passages[1]).strip() in other


@SCRIPTS
def test_held_out_questions_are_found(script: str) -> None:
    asked = CLAUSES[script].replace("|", SPACES.get(script, ""))
    starts, ends = word_spans(asked)
    short, long = asked[: ends[11]], asked[: ends[29]]
    part = asked[starts[8] : ends[24]]
    around = text(script, 7, 8)
    held = Questions([("short", short), ("long", long)])
    joint = SPACES.get(script, "")
    texts = [around + short + joint + around, around + part + joint + around, around, asked[starts[8] : ends[14]]]
    assert [bool(why) for why in held.in_documents(texts, read_batch(texts))] == [True, True, False, False]


@SCRIPTS
def test_lengths_and_shares_count_words(script: str) -> None:
    whole = text(script, 8, 12)
    words = read_words(whole)
    assert 60 < len(words.hashes) < 300
    assert check_prose(whole, words, PROSE) is None or script == "English"  # our English is of few stop words
    few = CLAUSES[script].split("|")[5]
    assert check_prose(few, read_words(few), PROSE)[0] == "few_words"  # type: ignore[index]
    again = (few + SPACES.get(script, "")) * 40
    assert check_prose(again, read_words(again), PROSE)[0] in {"repeated_ngrams", "stop_words"}  # type: ignore[index]


@SCRIPTS
def test_rewrites_are_measured_and_cut_by_words(script: str) -> None:
    whole = text(script, 9, 12)
    same, other = measure(whole, whole), measure(whole, text(script, 10, 6))
    assert (same["length"], same["copied"]) == (1.0, 1.0)
    assert 0.3 < other["length"] < 0.8
    assert other["copied"] < 0.7
    passages = list(cut(text(script, 11, 200), 200, 800))
    assert len(passages) > 2
    assert all(200 <= len(passage) <= 800 for passage in passages)
