"""How near an answer is to the right one, in any script: exact match, ANLS, chrF, and the letter of a choice."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

METRICS: dict[str, Callable[[str, Sequence[str]], float]]  # name -> (answer, right answers) -> 0 ... 1

ANLS_THRESHOLD = 0.5
CHRF_ORDER = 6  # characters of the longest n-grams
CHRF_BETA = 2  # how many times as much recall counts as precision

# Invisible marks that break lines or join letters. Scripts without spaces are full of them, each text with others.
_INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200b\u200c\u200d\u2060\ufeff"))


def normalised(text: str) -> str:
    """The text without what does not tell answers apart: NFKC, case folded, no punctuation, single spaces.

    Punctuation and symbols become spaces, invisible characters nothing. Vowel signs, tone marks and viramas (Unicode
    categories Mn and Mc) are letters of Thai, Lao, Khmer, Burmese and Indic scripts: they stay.
    """
    text = unicodedata.normalize("NFKC", text).translate(_INVISIBLE).casefold()
    text = unicodedata.normalize("NFKC", text)  # folding can take compositions apart
    return " ".join("".join(" " if unicodedata.category(c)[0] in "PSZC" else c for c in text).split())


def exact_match(answer: str, right: Sequence[str]) -> float:
    """1 if the normalised answer is one of the right ones, else 0.

    Where normalising leaves nothing ("+", "?"), the texts themselves are compared.
    """
    return float(any(_comparable(answer) == _comparable(one) for one in right))


def _comparable(text: str) -> str:
    return normalised(text) or unicodedata.normalize("NFKC", text).strip()


def anls(answer: str, right: Sequence[str]) -> float:
    """max over right of s = 1 - edits / max(length), or 0 where s < 0.5. Case and runs of white space are ignored.

    Edits are counted in Unicode code points after NFC (Levenshtein); NFKC would take Thai and Lao am apart. Source:
    Biten et al., "Scene Text Visual Question Answering", ICCV 2019, equation 1; of what is exactly half right, which
    that equation drops, 0.5 is kept, as the programs in use do.
    """
    folded = [" ".join(unicodedata.normalize("NFC", text).casefold().split()) for text in (answer, *right)]
    return max(_similarity(folded[0], one) for one in folded[1:])


def _similarity(left: str, right: str) -> float:
    longest = max(len(left), len(right))
    similarity = 1 - edit_distance(left, right) / longest if longest else 1.0
    return similarity if similarity >= ANLS_THRESHOLD else 0.0


def edit_distance(left: str, right: str) -> int:
    """The least number of insertions, deletions and substitutions of characters (Levenshtein)."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(right, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def chrf(answer: str, right: Sequence[str]) -> float:
    """max over right of the F score (beta 2) of character n-grams, n = 1 ... 6, white space left out.

    Precision and recall are averaged over the orders that both texts have. Source: Popović, "chrF: character n-gram
    F-score for automatic MT evaluation", WMT 2015; the same number as sacrebleu's `sentence_chrf`, over 100. Needs no
    words, so it suits scripts without spaces.
    """
    own = _n_grams(answer)
    return max(_f_score(own, _n_grams(one)) for one in right)


def _n_grams(text: str) -> list[Counter[str]]:
    text = "".join(text.split())
    orders = range(1, CHRF_ORDER + 1)
    return [Counter(text[i : i + n] for i in range(len(text) - n + 1)) for n in orders]


def _f_score(answer: Sequence[Counter[str]], right: Sequence[Counter[str]]) -> float:
    pairs = [(own, other) for own, other in zip(answer, right, strict=True) if own and other]
    if not pairs:
        return 0.0
    common = [(own & other).total() for own, other in pairs]
    precision = sum(n / own.total() for n, (own, _) in zip(common, pairs, strict=True)) / len(pairs)
    recall = sum(n / other.total() for n, (_, other) in zip(common, pairs, strict=True)) / len(pairs)
    if precision + recall == 0:
        return 0.0
    weight = CHRF_BETA**2
    return (1 + weight) * precision * recall / (weight * precision + recall)


METRICS = {"exact_match": exact_match, "anls": anls, "chrf": chrf}

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def parse_choice(answer: str, choices: Sequence[str]) -> int | None:
    """Which of the choices a generated answer means; None if that cannot be told.

    In this order: the answer is a letter, perhaps in brackets or with a mark ("B", "(b)", "B. Manila"); it is the text
    of one choice; it names a letter ("the answer is B", "answer: (B)"), the last of them; it holds one single capital
    letter of a choice; it holds the text of one choice only. A lower-case "a" in a sentence is never a letter.
    """
    text = unicodedata.normalize("NFKC", answer).strip()
    last = LETTERS[len(choices) - 1]
    letter = rf"[A-{last}]"
    alone = re.match(rf"[\[(<*\s]*({letter})(?:[\])>.:,*。：]|\s*$)", text, re.IGNORECASE)
    if alone:
        return LETTERS.index(alone[1].upper())
    folded = [_comparable(choice) for choice in choices]
    whole = [i for i, choice in enumerate(folded) if choice == _comparable(text)]
    if len(whole) == 1:
        return whole[0]
    named = re.findall(rf"\b(?:answer|choice|option)\b\W*(?:is\b\W*)?({letter})\b", text, re.IGNORECASE)
    if named:
        return LETTERS.index(named[-1].upper())
    # ASCII word limits: a capital that touches Thai or Khmer letters stands alone all the same.
    single = set(re.findall(rf"(?<![0-9A-Za-z'’])({letter})(?![0-9A-Za-z'’])", text))
    if len(single) == 1 and not (single == {"A"} and re.search(r"\bA\s+[a-z]", text)):
        return LETTERS.index(single.pop())
    held = [i for i, choice in enumerate(folded) if choice and choice in normalised(text)]
    return held[0] if len(held) == 1 else None
