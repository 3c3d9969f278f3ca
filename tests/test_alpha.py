"""alpha: the forms it is written in, and where each is from."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ggez_merge.errors import Refused
from ggez_merge.sweep.alpha import COUNTRIES, TABLE, Alpha, read_alpha

SEA = dict(zip(COUNTRIES["SEA"], (91.5, 30, 62, 70, 52, 33, 31, 12.25, 40, 28, 36), strict=True))


def index(
    folder: Path, values: dict[str, float | str], year: str = "2024", header: str = "code,country,year,KOFIpGIdf"
) -> Path:
    path = folder / "kof.csv"
    rows = [f"{code},some name,{year},{value}" for code, value in values.items()]
    path.write_text("\n".join([header, *rows, "SGP,Singapore,1999,1"]), encoding="utf-8-sig")
    return path


@given(st.floats(0, 1))
def test_a_number_is_itself_and_claims_no_origin(value: float) -> None:
    assert read_alpha(value) == read_alpha(str(value)) == Alpha(value, "number")


@pytest.mark.parametrize(
    "value", [-0.01, 1.01, 43, "43", float("nan"), "nan", "inf", True, None, [0.4], "", "0,43", "kof:SEA"]
)
def test_what_is_no_alpha(value: object) -> None:
    with pytest.raises(Refused) as refused:
        read_alpha(value, place="recipe.yaml:9")
    (problem,) = refused.value.problems
    assert problem.place == "recipe.yaml:9" and "kof:SEA@2023" in str(problem.expected)
    assert (problem.remedy is not None) == (value in (43, "43", 1.01, "kof:SEA"))


@pytest.mark.parametrize("region", TABLE)
def test_every_region_of_the_paper(region: str) -> None:
    alpha = read_alpha(region)
    assert alpha == read_alpha(region.lower()) == read_alpha(f"kof:{region}@2023") == read_alpha(f"KOF: {region} @2023")
    assert alpha.value == TABLE[region][2023]
    assert (alpha.source, alpha.region, alpha.component, alpha.year) == ("table", region, "KOFIpGIdf", 2023)
    assert alpha.countries == COUNTRIES.get(region, ())


def test_southeast_asia_by_year() -> None:
    values = [read_alpha(f"kof:SEA@{year}").value for year in range(2018, 2024)]
    assert values == [0.4621, 0.4429, 0.4133, 0.3987, 0.4211, 0.4340]
    assert "0.43" in str(read_alpha("SEA").note) and read_alpha("kof:SEA@2022").note is None
    with pytest.raises(Refused, match=r"2018, 2019(?s:.*)download the index"):
        read_alpha("kof:SEA@2017")
    with pytest.raises(Refused, match="list its countries"):
        read_alpha("kof:EAP@2022")


def test_countries_are_the_mean_of_the_file(tmp_path: Path) -> None:
    file = index(tmp_path, SEA)
    alpha = read_alpha("kof:SG, idn,Viet Nam@2024", file)
    assert alpha.value == pytest.approx((91.5 + 30 + 31) / 300)
    assert alpha.countries == ("SGP", "IDN", "VNM") and alpha.file == str(file)
    assert (alpha.source, alpha.region, alpha.year) == ("file", None, 2024)
    whole = read_alpha("kof:SEA@2024", file)
    assert whole.value == pytest.approx(sum(SEA.values()) / 1100) and whole.region == "SEA"
    assert whole.value == pytest.approx(read_alpha(f"kof:{','.join(SEA)}@2024", file).value)
    assert read_alpha("kof:SGP@1999", file).value == 0.01
    assert read_alpha("kof:SGP@2024", index(tmp_path, {"SGP": 100})).value == 1
    assert read_alpha("kof:ECA@2023", file).source == "table"  # the paper does not list its countries


def test_years_may_be_dates_and_kosovo_has_a_code(tmp_path: Path) -> None:
    assert read_alpha("kof:XKX@2024", index(tmp_path, {"XKX": 50.0}, year="2024-01-01")).value == 0.5


def test_a_list_without_a_file_says_where_to_get_it() -> None:
    with pytest.raises(Refused, match=r"https://www\.kof\.ethz\.ch/globalisation"):
        read_alpha("kof:SGP,IDN@2023")


def test_every_wrong_country_is_found_at_once() -> None:
    with pytest.raises(Refused) as refused:
        read_alpha("kof:SGP,Atlantis,SG,,Narnia@2023")
    assert [problem.found for problem in refused.value.problems] == ["Atlantis", "SGP", "", "Narnia"]
    with pytest.raises(Refused, match="did you mean `MENA`"):
        read_alpha("kof:MENNA@2023")


def test_what_a_file_lacks_is_named(tmp_path: Path) -> None:
    file = index(tmp_path, {**SEA, "TLS": "", "MMR": "."})
    with pytest.raises(Refused, match=r"of 2024 for MMR, TLS(?s:.*)leave these countries out"):
        read_alpha("kof:SEA@2024", file)
    with pytest.raises(Refused, match=r"of 2001 for SGP(?s:.*)download the index"):
        read_alpha("kof:SGP@2001", file)


@pytest.mark.parametrize(
    ("values", "header", "said"),
    [
        ({"SGP": "many"}, "code,country,year,KOFIpGIdf", "no KOFIpGIdf"),
        ({"SGP": -0.1}, "code,country,year,KOFIpGIdf", "no KOFIpGIdf"),
        ({"SGP": 100.1}, "code,country,year,KOFIpGIdf", "no KOFIpGIdf"),
        ({"SGP": 50, "sgp": 50}, "code,country,year,KOFIpGIdf", "SGP is given twice"),
        ({"SGP": 50}, "iso,country,year,KOFGI", "needs the columns code, KOFIpGIdf"),
    ],
)
def test_a_broken_file_is_refused_by_line(
    values: dict[str, float | str], header: str, said: str, tmp_path: Path
) -> None:
    file = index(tmp_path, values, header=header)
    with pytest.raises(Refused, match=said) as refused:
        read_alpha("kof:SGP@2024", file)
    assert str(refused.value.problems[0].place).startswith(str(file))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "kof.xlsx").write_bytes(b"PK\x03\x04\xff\xfe")
    for name in ("kof.xlsx", "none.csv"):
        with pytest.raises(Refused, match="cannot be read"):
            read_alpha("kof:SGP@2024", tmp_path / name)
