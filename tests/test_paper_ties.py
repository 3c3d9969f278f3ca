"""TIES and DARE against dense implementations written from the papers' formulas, through whole merges.

TIES: Yadav et al. 2023, arXiv 2306.01708, section 4. DARE: Yu et al. 2023, arXiv 2311.03099, section 3.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import write_checkpoint
from merging import arrays
from models import merged

from ggez_kernels.reference.drop import keep_mask
from ggez_kernels.sparsify import Sparsify

Array = np.ndarray[Any, Any]
State = dict[str, Array]
# several layers of different spread, so that one threshold for all is not one threshold for each
SHAPES = {
    "embed.weight": (97, 8),
    "layers.0.w": (31, 17),
    "layers.0.b": (31,),
    "layers.1.w": (5, 7, 11),
    "scale": (),
    "last.bias": (1,),
}
SPREAD = {name: 0.2 * (i + 1) for i, name in enumerate(SHAPES)}


def states(count: int, seed: int, step: float | None = None, dtype: Any = np.float32) -> list[State]:
    """A base and `count` models near it. With `step`, base and deltas are multiples of it, and many are equal."""
    random = np.random.default_rng(seed)
    made: list[State] = []
    for _ in range(count + 1):
        state = {}
        for name, shape in SHAPES.items():
            values = random.normal(size=shape) * (SPREAD[name] if made else 1.0)
            if step:
                values = np.round(values / step) * step
            state[name] = np.asarray(made[0][name].astype(np.float64) + values if made else values, dtype)
        made.append(state)
    return made


def merge_states(
    folder: Path, method: str, found: list[State], per_model: list[dict[str, Any]], **parameters: Any
) -> State:
    """Our merge of the states, flat arrays by name."""
    for number, state in enumerate(found):
        write_checkpoint(folder / f"{number}", state)
    models = [{"model": folder / f"{i + 1}", "parameters": given} for i, given in enumerate(per_model)]
    return arrays(merged(folder, merge_method=method, base_model=folder / "0", models=models, parameters=parameters))


def vector(state: State) -> Array:
    """A whole model as one vector, as the papers have it."""
    return np.concatenate([state[name].astype(np.float64).ravel() for name in SHAPES])


def assert_close(found: State, expected: Array, tolerance: float = 2e-6) -> None:
    np.testing.assert_allclose(vector(found), expected, rtol=0, atol=tolerance * np.abs(expected).max())


# --- TIES, dense -----------------------------------------------------------------------------------------------------


def trim_all_equals(tau: Array, density: float) -> Array:
    """Keep what is at least as large as the k-th largest magnitude, k = density of all entries."""
    k = max(1, int(density * tau.size))
    return np.where(np.abs(tau) >= np.sort(np.abs(tau))[-k], tau, 0.0)


def trim_first_equals(tau: Array, density: float) -> Array:
    """Keep exactly k, of equal magnitudes those that come first."""
    k = max(1, int(density * tau.size))
    kept = np.zeros(tau.size, bool)
    kept[np.argsort(-np.abs(tau), kind="stable")[:k]] = True
    return np.where(kept, tau, 0.0)


def elect_and_average(taus: list[Array], by_count: bool = False) -> Array:
    """The disjoint mean: of the models whose sign is the elected one, by their number. A vote of zero elects +."""
    votes = np.sum([np.sign(tau) if by_count else tau for tau in taus], axis=0)
    elected = np.where(votes >= 0, 1.0, -1.0)
    agree = np.array([np.sign(tau) == elected for tau in taus])
    return (np.array(taus) * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)


def deltas(found: list[State]) -> list[Array]:
    return [vector(state) - vector(found[0]) for state in found[1:]]


@pytest.mark.parametrize("vote", ["sum", "count"])
@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_ties_of_the_paper(count: int, density: float, vote: str, tmp_path: Path) -> None:
    """Trimmed over the whole model, all equals kept, mean by number, scaled by lambda."""
    found = states(count, seed=count)
    given = [{"weight": 1.0, "density": density}] * count
    scale = {"lambda": 0.7}
    out = merge_states(tmp_path, "ties", found, given, scope="global", ties="all", vote=vote, **scale)
    taus = [trim_all_equals(tau, density) for tau in deltas(found)]
    assert_close(out, vector(found[0]) + 0.7 * elect_and_average(taus, by_count=vote == "count"))


@pytest.mark.parametrize("vote", ["sum", "count"])
@pytest.mark.parametrize("density", [0.05, 0.3, 0.8])
def test_all_equals_are_kept_over_the_whole_model(density: float, vote: str, tmp_path: Path) -> None:
    """Magnitudes of a coarse grid: hundreds of entries are exactly at the threshold, in every tensor."""
    found = states(3, seed=7, step=1 / 8)
    raw = deltas(found)
    taus = [trim_all_equals(tau, density) for tau in raw]
    for tau in raw:
        k = int(density * tau.size)
        assert (np.abs(tau) >= np.sort(np.abs(tau))[-k]).sum() > k + 5
    given = [{"weight": 1.0, "density": density}] * 3
    out = merge_states(tmp_path, "ties", found, given, scope="global", ties="all", vote=vote)
    assert_close(out, vector(found[0]) + elect_and_average(taus, by_count=vote == "count"))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64], ids=str)
@pytest.mark.parametrize("density", [0.05, 0.3, 0.8])
def test_exactly_k_are_kept_in_each_tensor(density: float, dtype: Any, tmp_path: Path) -> None:
    """mergekit's choice (scope: tensor), made reproducible: of equal magnitudes the first are kept."""
    found = states(3, seed=11, step=1 / 8, dtype=dtype)
    given = [{"weight": 1.0, "density": density}] * 3
    out = merge_states(tmp_path, "ties", found, given)
    for name in SHAPES:
        base = found[0][name].astype(np.float64).ravel()
        taus = [trim_first_equals(s[name].astype(np.float64).ravel() - base, density) for s in found[1:]]
        expected = base + elect_and_average(taus)
        rounding = float(ml_dtypes.finfo(dtype).eps) if np.dtype(dtype).itemsize == 2 else 1e-6
        np.testing.assert_allclose(out[name].astype(np.float64), expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("density", [0.05, 0.3, 0.8])
def test_exactly_k_are_kept_of_the_whole_model(density: float, tmp_path: Path) -> None:
    found = states(2, seed=13, step=1 / 8)
    out = merge_states(tmp_path, "ties", found, [{"weight": 1.0, "density": density}] * 2, scope="global")
    taus = [trim_first_equals(tau, density) for tau in deltas(found)]
    assert_close(out, vector(found[0]) + elect_and_average(taus))


def test_all_equals_are_kept_in_each_tensor(tmp_path: Path) -> None:
    found = states(2, seed=17, step=1 / 8)
    out = merge_states(tmp_path, "ties", found, [{"weight": 1.0, "density": 0.3}] * 2, ties="all")
    parts = []
    for name in SHAPES:
        base = found[0][name].astype(np.float64).ravel()
        parts.append(
            base + elect_and_average([trim_all_equals(s[name].ravel().astype(float) - base, 0.3) for s in found[1:]])
        )
    assert_close(out, np.concatenate(parts))


def test_weights_vote_and_average(tmp_path: Path) -> None:
    """mergekit's weights: they weigh the vote and the mean; without `normalize` the mean is a sum."""
    found = states(3, seed=19)
    weights = [1.0, 0.25, 2.5]
    given = [{"weight": w, "density": d} for w, d in zip(weights, (0.5, 0.9, 0.2), strict=True)]
    taus = [w * trim_all_equals(tau, m["density"]) for w, m, tau in zip(weights, given, deltas(found), strict=True)]
    elected = np.where(np.sum(taus, axis=0) >= 0, 1.0, -1.0)
    agree = np.array([np.sign(tau) == elected for tau in taus])
    total = (np.array(taus) * agree).sum(axis=0)
    divisor = (np.array(weights)[:, None] * agree).sum(axis=0)
    plain = merge_states(tmp_path / "sum", "ties", found, given, scope="global", normalize=False)
    assert_close(plain, vector(found[0]) + total)
    mean = merge_states(tmp_path / "mean", "ties", found, given, scope="global", normalize=True)
    assert_close(mean, vector(found[0]) + total / np.where(divisor == 0, 1, divisor))


def test_a_vote_of_exactly_zero_elects_plus(tmp_path: Path) -> None:
    """The paper's sgn(0) = 0 leaves the base, its code asks the majority; mergekit and we take the positive side."""
    found = [{name: np.full(shape, value, np.float32) for name, shape in SHAPES.items()} for value in (1, 1.5, 0.5)]
    out = merge_states(tmp_path, "ties", found, [{"weight": 1.0}] * 2)
    assert all((values == 1.5).all() for values in out.values())


def test_a_global_threshold_is_not_one_for_each_tensor(tmp_path: Path) -> None:
    """Of a tensor that hardly moved nothing is left, and all of one that moved much."""
    found = states(1, seed=23)
    found[1]["layers.0.w"] = found[0]["layers.0.w"] + np.float32(1e-3)
    found[1]["layers.1.w"] = found[0]["layers.1.w"] + np.float32(100)
    out = merge_states(tmp_path, "ties", found, [{"weight": 1.0, "density": 0.5}], scope="global")
    np.testing.assert_array_equal(out["layers.0.w"], found[0]["layers.0.w"].ravel())
    np.testing.assert_array_equal(out["layers.1.w"], found[1]["layers.1.w"].ravel())


# --- DARE ------------------------------------------------------------------------------------------------------------


def kept(name: str, size: int, density: float, model: int, seed: int = 0) -> Array:
    """Which entries of one tensor's delta a drop keeps, from what the documentation says it depends on."""
    key = hashlib.blake2b(f"{seed}\0{name}\0{model}".encode(), digest_size=8).digest()
    return keep_mask(Sparsify(keep=density, seed=int.from_bytes(key, "little")), size)


def dropped(found: list[State], densities: list[float], rescale: Any, seed: int = 0) -> list[Array]:
    """Every model's delta after DARE, as one vector."""
    result = []
    for m, density in enumerate(densities):
        parts = []
        for name in SHAPES:
            tau = found[m + 1][name].astype(np.float64).ravel() - found[0][name].astype(np.float64).ravel()
            thinned = np.where(kept(name, tau.size, density, m, seed), tau, 0.0)
            factor = 1.0
            if rescale == "exact":
                factor = 1 / density
            elif rescale and np.abs(tau).sum() >= 1e-7 and np.abs(thinned).sum() >= 1e-7:
                factor = np.abs(tau).sum() / np.abs(thinned).sum()
            parts.append(factor * thinned)
        result.append(np.concatenate(parts))
    return result


@pytest.mark.parametrize("rescale", ["exact", "l1", True, False], ids=str)
@pytest.mark.parametrize("densities", [[0.3], [0.5, 0.9], [0.1, 1.0, 0.7]], ids=str)
def test_dare_with_addition(densities: list[float], rescale: Any, tmp_path: Path) -> None:
    found = states(len(densities), seed=29)
    weights = [0.8, -0.4, 1.1][: len(densities)]
    given = [{"weight": w, "density": d} for w, d in zip(weights, densities, strict=True)]
    scale = {"lambda": 0.9}
    out = merge_states(tmp_path, "dare_linear", found, given, rescale=rescale, seed=5, **scale)
    taus = dropped(found, densities, rescale, seed=5)
    assert_close(out, vector(found[0]) + 0.9 * sum(w * tau for w, tau in zip(weights, taus, strict=True)))


@pytest.mark.parametrize("rescale", ["exact", "l1"])
@pytest.mark.parametrize("vote", ["sum", "count"])
def test_dare_with_election(vote: str, rescale: str, tmp_path: Path) -> None:
    densities = [0.6, 0.4, 0.8]
    found = states(3, seed=31)
    given = [{"weight": 1.0, "density": d} for d in densities]
    out = merge_states(tmp_path, "dare_ties", found, given, rescale=rescale, vote=vote, normalize=True)
    taus = dropped(found, densities, rescale)
    assert_close(out, vector(found[0]) + elect_and_average(taus, by_count=vote == "count"))


def test_l1_is_the_default_as_in_mergekit(tmp_path: Path) -> None:
    found = states(1, seed=37)
    given = [{"weight": 1.0, "density": 0.4}]
    plain = merge_states(tmp_path / "a", "dare_linear", found, given)
    assert_close(plain, vector(found[0]) + dropped(found, [0.4], "l1")[0])


@pytest.mark.parametrize("density", [0.1, 0.37, 0.9])
def test_drops_are_as_frequent_and_as_independent_as_asked(density: float, tmp_path: Path) -> None:
    """Deltas are all 1 and 2, so the merged model shows which were kept: in one model, in both, and in neighbours."""
    n = 200_000
    base = {"w": np.zeros(n, np.float32), "v": np.zeros(n, np.float32)}
    for number, value in enumerate((0, 1, 2)):
        write_checkpoint(tmp_path / f"{number}", {name: zeros + np.float32(value) for name, zeros in base.items()})
    models = [{"model": tmp_path / f"{m}", "parameters": {"weight": 1.0, "density": density}} for m in (1, 2)]
    out = arrays(
        merged(
            tmp_path,
            merge_method="dare_linear",
            base_model=tmp_path / "0",
            models=models,
            parameters={"rescale": False, "seed": 3},
        )
    )
    of = {(name, m): out[name].astype(int) & (m + 1) > 0 for name in base for m in (0, 1)}

    def assert_share(mask: Array, expected: float) -> None:
        sigma = (expected * (1 - expected) / mask.size) ** 0.5
        assert abs(mask.mean() - expected) < 4.5 * sigma

    for mask in of.values():
        assert_share(mask, density)
        assert_share(mask[1:] & mask[:-1], density**2)
    assert_share(of["w", 0] & of["w", 1], density**2)
    assert_share(of["w", 0] & of["v", 0], density**2)


def test_exact_rescaling_keeps_the_mean(tmp_path: Path) -> None:
    """The expectation of a rescaled delta is the delta: over many entries of 1 the merged mean is 1."""
    n = 100_000
    found = [{"w": np.full(n, value, np.float32)} for value in (0, 1)]
    for number, state in enumerate(found):
        write_checkpoint(tmp_path / f"{number}", state)
    models = [{"model": tmp_path / "1", "parameters": {"weight": 1.0, "density": 0.25}}]
    out = merged(
        tmp_path,
        merge_method="dare_linear",
        base_model=tmp_path / "0",
        models=models,
        parameters={"rescale": "exact"},
    )
    values = arrays(out)["w"]
    assert set(np.unique(values)) == {0.0, 4.0}
    assert values.mean() == pytest.approx(1.0, abs=4.5 * (3 / n) ** 0.5)


@pytest.mark.parametrize("what", ["seed", "place", "name"])
def test_which_entries_drop_depends_on_seed_place_and_name(what: str, tmp_path: Path) -> None:
    """Each of the three changes the choice, and nothing else does."""
    n = 4096
    zeros, ones = np.zeros(n, np.float32), np.ones(n, np.float32)

    def chosen(where: str, name: str = "w", place: int = 0, seed: int = 0) -> Array:
        folder = tmp_path / where
        write_checkpoint(folder / "base", {name: zeros})
        write_checkpoint(folder / "still", {name: zeros + 0})
        write_checkpoint(folder / "moved", {name: ones})
        order = ["moved", "still"] if place == 0 else ["still", "moved"]
        models = [{"model": folder / m, "parameters": {"weight": 1.0, "density": 0.5}} for m in order]
        out = merged(
            folder,
            merge_method="dare_linear",
            base_model=folder / "base",
            models=models,
            parameters={"rescale": False, "seed": seed},
        )
        return arrays(out)[name] > 0

    changed: dict[str, Any] = {"seed": {"seed": 1}, "place": {"place": 1}, "name": {"name": "v"}}[what]
    plain = chosen("plain")
    assert np.array_equal(plain, chosen("again"))
    assert 0.4 < (plain != chosen("changed", **changed)).mean() < 0.6
