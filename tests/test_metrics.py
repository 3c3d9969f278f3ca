"""Metrics against their definitions and sacrebleu, in scripts without spaces or with marks that are letters."""

from __future__ import annotations

import functools
import unicodedata

import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

from ggez_merge.evaluate.metrics import anls, chrf, edit_distance, exact_match, normalised, parse_choice

WORDS = {
    "thai": "ต้มยำกุ้ง",
    "lao": "ຕຳໝາກຫຸ່ງ",
    "khmer": "អង្គរវត្ត",
    "burmese": "မုန့်ဟင်းခါး",
    "vietnamese": "Phở bò Hà Nội",
    "tamil": "நாசி லெமாக்",
    "indonesian": "Rendang Padang",
}
SENTENCES = {
    "thai": ("แมวนอนอยู่บนเสื่อ", "แมวนั่งอยู่บนเสื่อสีแดง"),
    "khmer": ("ឆ្មាដេកលើកន្ទេល", "ឆ្មាអង្គុយលើកន្ទេលក្រហម"),
    "lao": ("ແມວນອນຢູ່ເທິງສາດ", "ແມວນັ່ງຢູ່ເທິງສາດສີແດງ"),
    "burmese": ("ကြောင်သည် ဖျာပေါ်တွင် အိပ်နေသည်", "ကြောင်က ဖျာနီပေါ်မှာ ထိုင်နေတယ်"),
    "vietnamese": ("Con mèo nằm trên chiếu", "Con mèo ngồi trên chiếc chiếu đỏ"),
    "tamil": ("பூனை பாயில் படுத்திருக்கிறது", "பூனை சிவப்பு பாயில் அமர்ந்திருக்கிறது"),
    "english": ("the cat lies on the mat", "a cat sat on the red mat"),
    "short": ("ab", "abc"),
    "nothing": ("", "abc"),
    "apart": ("xyz", "abc"),
}
TEXT = st.text(st.sampled_from("ab กิ់၏ộ.,A"), max_size=12)


@pytest.mark.parametrize("word", WORDS.values(), ids=WORDS)
def test_exact_match_knows_a_word_however_it_is_written(word: str) -> None:
    for written in (
        word.upper(),
        f"  {word}.",
        f"“{word}”",
        f"{word}។",
        word.replace(" ", "   "),
        unicodedata.normalize("NFD", word),
        unicodedata.normalize("NFKD", word),
        "\u200b".join(word),
        f"\ufeff{word}\n",
    ):
        assert exact_match(written, ["something", word]) == 1, written


@pytest.mark.parametrize("word", WORDS.values(), ids=WORDS)
def test_exact_match_tells_words_apart_by_every_letter_and_mark(word: str) -> None:
    for i in range(len(word)):
        if not word[i].isspace():
            assert exact_match(word[:i] + word[i + 1 :], [word]) == 0, (word, i)


def test_marks_are_letters_but_punctuation_is_not() -> None:
    assert normalised("ป่า") != normalised("ปา")  # a tone mark makes another word
    assert normalised("မြန်မာ၊") == normalised("မြန်မာ")
    assert normalised("ＡＢＣ－１２") == "abc 12"
    assert exact_match("+", ["-"]) == 0
    assert exact_match(" + ", ["+"]) == 1


@given(TEXT)
def test_normalising_twice_is_normalising_once(text: str) -> None:
    assert normalised(normalised(text)) == normalised(text)


@given(TEXT, TEXT)
def test_the_edit_distance_is_the_recursive_definition(left: str, right: str) -> None:
    @functools.cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        swap = distance(i - 1, j - 1) + (left[i - 1] != right[j - 1])
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, swap)

    assert edit_distance(left, right) == distance(len(left), len(right))


@pytest.mark.parametrize(
    ("answer", "right", "score"),
    [
        ("Manila", ["manila"], 1.0),
        ("manil", ["manila"], 5 / 6),
        ("abcd", ["abxy"], 0.5),  # exactly half counts
        ("abcd", ["axyz"], 0.0),
        ("ต้มยำ", ["ต้มยำกุ้ง"], 1 - 4 / 9),
        ("x", ["abc", " X "], 1.0),
        ("a \n b", ["A B"], 1.0),
        ("", ["abc"], 0.0),
    ],
)
def test_anls(answer: str, right: list[str], score: float) -> None:
    assert anls(answer, right) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize("pair", SENTENCES.values(), ids=SENTENCES)
def test_chrf_is_that_of_sacrebleu(pair: tuple[str, str]) -> None:
    answer, right = pair
    for references in ([right], [right, answer[::-1]], [answer]):
        theirs = sacrebleu.sentence_chrf(answer, references).score / 100
        assert chrf(answer, references) == pytest.approx(theirs, abs=1e-12)


@given(TEXT, st.lists(TEXT, min_size=1, max_size=3))
def test_chrf_is_that_of_sacrebleu_for_any_text(answer: str, right: list[str]) -> None:
    theirs = max(sacrebleu.sentence_chrf(answer, [one]).score for one in right) / 100
    assert chrf(answer, right) == pytest.approx(theirs, abs=1e-12)


CHOICES = ["Manila", "Hà Nội", "กรุงเทพฯ", "ភ្នំពេញ"]


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        ("B", 1),
        ("(b)", 1),
        ("B. Hà Nội", 1),
        ("**C**", 2),
        ("D:", 3),
        ("The answer is C.", 2),
        ("Answer: (D)", 3),
        ("A is tempting, but the answer is B", 1),
        ("คำตอบคือC", 2),
        ("ចម្លើយគឺ D។", 3),
        ("hà nội!", 1),
        ("กรุงเทพ", None),
        ("It is ភ្នំពេញ, of course", 3),
        ("Manila or ភ្នំពេញ", None),
        ("E", None),
        ("a city by the sea", None),
        ("A city by the sea", None),
        ("B or C", None),
        ("", None),
        ("I don't know", None),
    ],
)
def test_the_letter_of_a_choice(answer: str, choice: int | None) -> None:
    assert parse_choice(answer, CHOICES) == choice


def test_choices_that_are_letters_mean_their_place() -> None:
    assert parse_choice("B", ["2", "3"]) == 1
    assert parse_choice("3", ["2", "3"]) == 1
    assert parse_choice("C", ["2", "3"]) is None
