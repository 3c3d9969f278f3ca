"""What a merge computes on, and why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from merging import INTERPOLATE, TIES, models, plan_of

from ggez_merge.backend import Device, choose
from ggez_merge.cli import app
from ggez_merge.errors import Refused
from ggez_merge.merge import device_for

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")


def device(wanted: str, method: str = "ties", measures: bool = True, doubles: bool = False) -> Device:
    return choose(wanted, method=method, measures=measures, doubles=doubles)


def test_the_processor_as_asked_for() -> None:
    assert (device("cpu").name, device("cpu").why) == ("cpu", "as asked for")
    assert device("cpu").load().name == "cpu (numba)"


@NO_GPU
def test_without_a_gpu_auto_says_so() -> None:
    assert (device("auto").name, device("auto").why) == ("cpu", "there is no GPU")


@NO_GPU
@pytest.mark.parametrize("wanted", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_refused(wanted: str) -> None:
    with pytest.raises(Refused) as caught:
        device(wanted)
    (problem,) = caught.value.problems
    assert problem.what == f"there is no device {wanted}"
    assert (problem.found, problem.remedy) == ("torch can use 0 GPUs", "use --device cpu")


def test_the_plan_says_what_matters_for_the_choice(tmp_path: Path) -> None:
    models(tmp_path, ("base", "one", "two"), {"a": (10,)})
    assert plan_of(tmp_path, INTERPOLATE).measure_bytes == 0
    assert plan_of(tmp_path, TIES).measure_bytes > 0
    assert device_for(plan_of(tmp_path, TIES), "cpu").name == "cpu"


@NO_GPU
def test_the_command_line_refuses_what_is_not_there(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    models(tmp_path, ("base", "one"), {"a": (10,)})
    (tmp_path / "recipe.yaml").write_text(INTERPOLATE)
    arguments = [str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out")]
    refused = CliRunner().invoke(app, [*arguments, "--device", "cuda:1"])
    assert (refused.exit_code, "there is no device cuda:1" in refused.output) == (2, True)
    assert CliRunner().invoke(app, [*arguments, "--device", "gpu"]).exit_code == 2
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0
    assert "on cpu: there is no GPU" in done.output
