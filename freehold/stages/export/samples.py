"""The texts and conversations an export is proven on: every kind of text the walk reads, and every script.

Written for this purpose; a failing sample is a failing tokenizer, template or weight, never a matter of taste.
"""

from __future__ import annotations

from typing import Any

KINDS = {
    "prose": "The harbour was still that morning. Two boats had gone out before dawn, and no one on the quay could say "
    "when they would be back; the old pilot, who had seen worse, lit his pipe and waited for the wind to turn.",
    "speech": "Fellow citizens, the year that has passed asked much of us. We met it with patience and with work, and "
    "what we built together will outlast the quarrels of this season.",
    "drama": "FIRST WATCHMAN. Who goes there?\nSECOND WATCHMAN. A friend, and cold.\n    [He lifts the lantern.]\n"
    "FIRST WATCHMAN. Then stand by the fire, friend, and give me the hour.",
    "code": "def moving_average(values: list[float], window: int) -> list[float]:\n    total, result = 0.0, []\n"
    "    for i, value in enumerate(values):\n        total += value\n        if i >= window:\n"
    "            total -= values[i - window]\n        result.append(total / min(i + 1, window))\n    return result\n",
    "reference": ".. function:: open(path, mode='r')\n\n   Open a file and return it. Raises :exc:`OSError` when the\n"
    "   file cannot be opened.\n\n   =====  ==============\n   mode   meaning\n   =====  ==============\n"
    "   'r'    read\n   'w'    write\n   =====  ==============\n",
    "data": '{"id": 1048576, "name": "Reykjavík", "population": 139875, "area_km2": 273.0, "tags": ["port"]}\n'
    "id;name;value\n1;alpha;0.125\n2;beta;-17\n",
    "numbers": "1 12 123 1234 12345 123456 1234567 3.14159265 1,000,000 0x1F 2026-11-21 10:45 -40 °C 50% (12 + 3) * 2",
    "whitespace": "one  two   three\tfour\n\n\n  indented\n\tdeeper\r\nlast line with trailing spaces   \n",
    "puzzle": "Question: A train leaves at 9:40 and arrives at 11:05. How long was it?\nAnswer: 1 hour 25 minutes.",
}

SCRIPTS = {
    "latin": "Zażółć gęślą jaźń; l'été où Noël arriva; Größe, Åse, ñandú, İstanbul, Đà Nẵng.",
    "greek": "Ο γέρος κοίταξε τη θάλασσα και δεν είπε τίποτα.",
    "cyrillic": "Широкая река течёт на север, а ветер дует ей навстречу. Ґанок, їжак.",
    "armenian": "Գարունը եկավ լեռներից։",
    "georgian": "მდინარე ზღვას ერთვის.",
    "hebrew": "הספר מונח על השולחן שליד החלון.",
    "arabic": "الكتاب على الطاولة بجانب النافذة، ١٢٣٤٥٦٧.",
    "devanagari": "नदी पहाड़ों से निकलकर समुद्र में मिलती है। १२३४",
    "bengali": "নদীটি পাহাড় থেকে নেমে সাগরে মেশে।",
    "tamil": "ஆறு மலையிலிருந்து கடலுக்குச் செல்கிறது.",
    "thai": "แม่น้ำไหลจากภูเขาลงสู่ทะเล",
    "lao": "ແມ່ນ້ຳໄຫຼລົງສູ່ທະເລ",
    "khmer": "ទន្លេហូរចុះទៅសមុទ្រ។",
    "myanmar": "မြစ်သည် ပင်လယ်သို့ စီးဆင်းသည်။",
    "han": "河流从山中流出，最后汇入大海。繁體字也要試試。",
    "kana": "川は山から流れて、やがて海にそそぐ。カタカナも試す。",
    "hangul": "강은 산에서 흘러나와 바다로 들어간다.",
    "ethiopic": "ወንዙ ወደ ባሕር ይፈስሳል።",
    "symbols": "x² + y² ≤ r², ∀ε>0 ∃δ: |x−a|<δ ⇒ |f(x)−L|<ε; ½ ① Ⅷ ← → ↔ “quotes” ‘and’ – dashes — €£¥",
    "emoji": "👋🏽 👩‍👩‍👧 🇫🇷 e\u0301 n\u0303 \u200bzero-width\u200d ok",
}

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Current weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]

# Each: the messages, and the tools they may use.
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "one turn": ([{"role": "user", "content": "What is the capital of Iceland?"}], None),
    "system": (
        [
            {"role": "system", "content": "You answer in one short sentence."},
            {"role": "user", "content": "Why is the sky blue?\nPlease be exact."},
        ],
        None,
    ),
    "several turns": (
        [
            {"role": "user", "content": "Count to three."},
            {"role": "assistant", "content": "1, 2, 3"},
            {"role": "user", "content": "  And on to five? 你好 \n"},
            {"role": "assistant", "content": "4, 5"},
            {"role": "user", "content": "Thank you."},
        ],
        None,
    ),
    "tools": (
        [
            {"role": "user", "content": "Is it raining in Oslo?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}],
            },
            {"role": "tool", "content": '{"sky": "rain"}'},
        ],
        TOOLS,
    ),
}

# Calibration sees other conversations than the proof, so that a file is not measured on what it was made with.
CALIBRATION: list[tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = [
    (
        [
            {"role": "user", "content": "Which river runs through Vienna?"},
            {"role": "assistant", "content": "The Danube."},
        ],
        None,
    ),
    (
        [
            {"role": "system", "content": "Be brief. Say so when you do not know."},
            {"role": "user", "content": "How many letters has the word garden?"},
            {"role": "assistant", "content": "Six.", "reasoning_content": "g, a, r, d, e, n: six letters."},
            {"role": "user", "content": "And the word snow? Sort its letters too."},
            {"role": "assistant", "content": "Four letters; sorted: n, o, s, w."},
        ],
        None,
    ),
    (
        [
            {"role": "user", "content": "Will I need a coat in Lima tomorrow?"},
            {
                "role": "assistant",
                "content": "I look it up.",
                "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Lima"}}}],
            },
            {"role": "tool", "content": '{"sky": "mist", "celsius": 17}'},
            {"role": "assistant", "content": "A light one: 17 degrees and mist."},
        ],
        TOOLS,
    ),
]
