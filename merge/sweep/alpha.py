"""alpha, the weight of the global score in GRP: a number, or how globalised a region is.

    alpha = mean over the region's countries of KOFIpGIdf / 100          (GG-EZ, arXiv 2604.11490, section 6.3)

KOFIpGIdf is the component "de facto interpersonal" of the KOF Globalisation Index, 1 to 100. Written as

    0.43                   a number from 0 to 1
    SEA                    a region of the paper's Table 16, in 2023; the same as kof:SEA@2023
    kof:SEA@2021           that region in another year: Southeast Asia 2018 to 2022 are known too
    kof:SG,IDN,TL@2020     countries by ISO code, or by name; needs a file of the index

NA and SA alone are the regions North America and South Asia; the countries are NAM and SAU.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ggez_merge.check import nearest
from ggez_merge.errors import Problem, Refused
from ggez_merge.untrusted import printable

INDEX = "KOF Globalisation Index"
COMPONENT = "KOFIpGIdf"
PAPER_YEAR = 2023
DOWNLOAD = "https://www.kof.ethz.ch/globalisation"

# GG-EZ, Table 16: by region and year.
TABLE: dict[str, dict[int, float]] = {
    "EAP": {2023: 0.5574},
    "ECA": {2023: 0.7103},
    "LAC": {2023: 0.5891},
    "MENA": {2023: 0.6013},
    "NA": {2023: 0.7936},
    "SA": {2023: 0.4006},
    "SEA": {2018: 0.4621, 2019: 0.4429, 2020: 0.4133, 2021: 0.3987, 2022: 0.4211, 2023: 0.4340},
    "SSA": {2023: 0.3546},
    "World": {2023: 0.5579},
}
COUNTRIES: dict[str, tuple[str, ...]] = {
    "SEA": ("SGP", "IDN", "MYS", "BRN", "THA", "PHL", "VNM", "MMR", "KHM", "LAO", "TLS"),
}  # the only list that we have of the paper's regions
_NOTES = {("SEA", 2023): "GG-EZ's Table 16 has 0.4340; its Table 1 uses 0.43"}

_GET = f"download the index from {DOWNLOAD}, save it as CSV with columns code, year, {COMPONENT}: that is `kof_file`"
_KOF = re.compile(r"kof:(?P<who>[^@]+)@(?P<year>\d{4})", re.IGNORECASE)
_FORMS = f"a number from 0 to 1, one of {', '.join(TABLE)}, or kof:SEA@2023, kof:SGP,IDN@2023"


@dataclass(frozen=True)
class Alpha:
    """The weight, and where it is from: "number" (then nothing else is known), the paper's "table", or a "file"."""

    value: float
    source: Literal["number", "table", "file"]
    region: str | None = None
    index: str | None = None
    component: str | None = None
    year: int | None = None
    countries: tuple[str, ...] = ()  # ISO 3166 alpha-3
    file: str | None = None
    note: str | None = None


def read_alpha(value: object, kof_file: Path | None = None, place: str | None = None) -> Alpha:
    """The alpha that a recipe or an option writes; see the top of this file.

    kof_file: the index as a CSV with columns code, year, KOFIpGIdf. If given, regions whose countries are known are
    computed from it too. Raises Refused, saying `place`, for what is no alpha, and for what the file lacks.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _no_alpha(value, place)
    if isinstance(value, str):
        text = value.strip()
        region = _region(text)
        if region:
            return _of_region(region, PAPER_YEAR, kof_file, place)
        match = _KOF.fullmatch(text)
        if match:
            who, year = match["who"].strip(), int(match["year"])
            region = _region(who)
            return _of_region(region, year, kof_file, place) if region else _of_countries(who, year, kof_file, place)
        try:
            value = float(text)
        except ValueError:
            raise _no_alpha(text, place, nearest(text, TABLE)) from None
    if not 0 <= value <= 1:
        raise _no_alpha(value, place, "write a percentage as a fraction: 43 % is 0.43" if 1 < value <= 100 else None)
    return Alpha(float(value), "number")


def _no_alpha(value: object, place: str | None, remedy: str | None = None) -> Refused:
    what = "this is not an alpha, the weight of the global score"
    return Refused(Problem(what, place, expected=_FORMS, found=printable(str(value)), remedy=remedy))


def _region(text: str) -> str | None:
    return next((region for region in TABLE if region.lower() == text.lower()), None)


def _of_region(region: str, year: int, kof_file: Path | None, place: str | None) -> Alpha:
    countries = COUNTRIES.get(region, ())
    if kof_file and countries:
        return _of_file(region, countries, year, kof_file, place)
    value = TABLE[region].get(year)
    if value is None:
        known = ", ".join(map(str, TABLE[region]))
        what = f"GG-EZ's table has no alpha for {region} in {year}"
        remedy = _GET if countries else f"list its countries, as in kof:SGP,IDN@{year}, and give a file of the index"
        raise Refused(Problem(what, place, expected=f"one of the years {known}", found=str(year), remedy=remedy))
    return Alpha(value, "table", region, INDEX, COMPONENT, year, countries, note=_NOTES.get((region, year)))


def _of_countries(who: str, year: int, kof_file: Path | None, place: str | None) -> Alpha:
    codes, problems = [], []
    for word in (word.strip() for word in who.split(",")):
        code = _alpha_3(word)
        if code is None:
            remedy = nearest(word, TABLE) if "," not in who else None
            expected = "ISO 3166 codes, such as SGP or SG" + ("" if "," in who else f"; or one of {', '.join(TABLE)}")
            problems.append(Problem("this is not a country", place, expected=expected, found=word, remedy=remedy))
        elif code in codes:
            problems.append(Problem("a country is listed twice", place, found=code))
        else:
            codes.append(code)
    if not problems and kof_file is None:
        problems.append(Problem("alpha for a list of countries needs a file of the index", place, remedy=_GET))
    if problems or kof_file is None:
        raise Refused(problems)
    return _of_file(None, codes, year, kof_file, place)


def _alpha_3(word: str) -> str | None:
    import pycountry

    if word.upper() == "XKX":  # Kosovo has no ISO code; this is the one in use, by KOF too
        return "XKX"
    try:
        return str(pycountry.countries.lookup(word).alpha_3)
    except LookupError:
        return None


def _of_file(region: str | None, codes: Sequence[str], year: int, kof_file: Path, place: str | None) -> Alpha:
    values = _read_index(kof_file, year)
    missing = [code for code in codes if code not in values]
    if missing:
        what = f"the file of the index has no {COMPONENT} of {year} for {', '.join(missing)}"
        remedy = "leave these countries out, or choose another year" if values else _GET
        raise Refused(Problem(what, place, expected=f"{len(codes)} countries", found=str(kof_file), remedy=remedy))
    value = math.fsum(values[code] for code in codes) / len(codes) / 100
    return Alpha(value, "file", region, INDEX, COMPONENT, year, tuple(codes), str(kof_file))


def _read_index(path: Path, year: int) -> Mapping[str, float]:
    """KOFIpGIdf of that year by country; a country without a value is left out."""
    values: dict[str, float] = {}
    problems: list[Problem] = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            lacking = [name for name in ("code", "year", COMPONENT) if name not in (rows.fieldnames or ())]
            if lacking:
                what, found = f"a file of the index needs the columns {', '.join(lacking)}", rows.fieldnames or ()
                raise Refused(Problem(what, str(path), found=printable(", ".join(found)) or "nothing", remedy=_GET))
            for row in rows:
                code, given = (row["code"] or "").strip().upper(), (row[COMPONENT] or "").strip()
                if not re.match(rf"{year}\b", (row["year"] or "").strip()) or given in ("", ".", "NA"):
                    continue
                number = _number(given)
                place = f"{path}:{rows.line_num}"
                if number is None or not 0 <= number <= 100:
                    what = f"{printable(code)}: this is no {COMPONENT}"
                    problems.append(Problem(what, place, expected="a number from 0 to 100", found=printable(given)))
                elif code in values:
                    problems.append(Problem(f"{printable(code)} is given twice for {year}", place))
                else:
                    values[code] = number
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        said = error.strerror if isinstance(error, OSError) else str(error)
        what = "the file of the index cannot be read"
        raise Refused(Problem(what, str(path), expected="CSV in UTF-8", found=said, remedy=_GET)) from None
    if problems:
        raise Refused(problems)
    return values


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
