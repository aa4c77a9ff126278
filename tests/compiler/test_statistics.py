"""Statistics of calibration in a file: runs that were interrupted, runs that are repeated, files that do not fit."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from build import normal, program, rewritten
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fxpress
from fxpress.compiler import statistics
from fxpress.compiler.statistics import statistics_file
from fxpress.ir.errors import ArtifactError, InputError
from fxpress.ir.graph import Program
from fxpress.ir.rewrite import Context
from fxpress.passes import Canonicalize, Quantize, quantize

BATCHES = [list(tiny.inputs(2, length).values()) for length in (6, 9, 7, 8)]
OF = {"model": "m", "calibration data": "c", "options": "o"}


@functools.cache
def encoder() -> Program:
    """Not to be changed."""
    return rewritten(program(tiny.encoder(), *tiny.inputs().values()), Canonicalize())[0]


class Stop(Exception):
    pass


def context(stop: tuple[str, int] | None = None, batches: Any = BATCHES) -> Context:
    """A context that keeps statistics; `stop` ends the run at an item of the work of a title."""

    def track(items: Sequence[Any], title: str) -> Iterable[Any]:
        for place, item in enumerate(items):
            if stop == (title, place):
                raise Stop
            yield item

    return Context(calibration=batches, track=track, statistics=statistics_file)


def quantized(path: Path | None, given: Context, **options: Any) -> Mapping[str, Tensor]:
    """The weights of a quantized encoder."""
    made = encoder().copy()
    rewrite = Quantize(statistics=None if path is None else str(path), min_cosine=0.9995, **options)
    rewrite.apply(made, given)
    found: Mapping[str, Tensor] = made.module.state_dict()
    return found


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def uninterrupted() -> Mapping[str, Tensor]:
    return quantized(None, context())


def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often a site's options are computed, an option is measured alone, and a choice is fitted, from now on."""
    calls = {"options": 0, "refined": 0}

    def counting(name: str) -> Any:
        usual = getattr(quantize, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return usual(*args, **kwargs)

        return call

    for name in calls:
        monkeypatch.setattr(quantize, name, counting(name))
    return calls


NODES = len(encoder().graph.nodes)
STOPS = {
    "at once": ("calibrating", 0),
    "among the layers": ("calibrating", NODES * 2 // 3),
    "among the sensitivities": ("measuring the sensitivity of layers", 5),
    "among the fits": ("fitting weights", NODES * 2 // 3),
}


@pytest.mark.parametrize("case", STOPS)
def test_an_interrupted_run_goes_on_and_ends_as_if_it_had_not_been(
    case: str, uninterrupted: Mapping[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)
    quantized(None, context())
    whole = dict(calls)
    with pytest.raises(Stop):
        quantized(tmp_path / "x.safetensors", context(STOPS[case]))
    assert os.listdir(tmp_path) == ["x.safetensors"]
    assert same(quantized(tmp_path / "x.safetensors", context()), uninterrupted)
    assert calls == {name: 2 * count for name, count in whole.items()}  # nothing was computed twice


def test_a_repeated_run_computes_nothing(
    uninterrupted: Mapping[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = quantized(tmp_path / "x.safetensors", context())
    calls = counted(monkeypatch)
    assert same(quantized(tmp_path / "x.safetensors", context(("calibrating", 0))), first) and same(
        first, uninterrupted
    )
    assert calls == {"options": 0, "refined": 0}


@pytest.mark.parametrize(
    "options",
    [
        {"weights": "int4"},
        {"weights": "int4", "activations": "int8"},
        {"weights": "float8_e4m3", "activations": "float8_e4m3"},
        {"activations": None, "method": "awq"},
    ],
    ids=str,
)
def test_every_kind_of_weight_is_read_back(options: dict[str, Any], tmp_path: Path) -> None:
    found = [quantized(tmp_path / "x.safetensors", context(), **options) for _ in range(2)]
    for name, value in found[0].items():
        assert value.dtype is found[1][name].dtype and bool((value == found[1][name]).all())


def test_what_does_not_change_the_statistics_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized(tmp_path / "x.safetensors", context())
    calls = counted(monkeypatch)
    quantized(tmp_path / "x.safetensors", context(), fold=False)
    assert calls == {"options": 0, "refined": 0}


def test_other_data_are_refused(tmp_path: Path) -> None:
    quantized(tmp_path / "x.safetensors", context())
    with pytest.raises(InputError, match="are of another calibration data; give another name, or remove the file"):
        quantized(tmp_path / "x.safetensors", context(batches=BATCHES[:3]))


def test_other_options_are_refused(tmp_path: Path) -> None:
    quantized(tmp_path / "x.safetensors", context())
    with pytest.raises(InputError, match="are of another options"):
        quantized(tmp_path / "x.safetensors", context(), skip=["up"])


def test_other_weights_are_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "x.safetensors")
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()
        arguments = ([Quantize(statistics=path)], (normal(2, 4),))
        if seed == 0:
            fxpress.compile(model, *arguments, calibration=[(normal(2, 4),)], backend="eager")
        else:
            with pytest.raises(InputError, match="are of another model"):
                fxpress.compile(model, *arguments, calibration=[(normal(2, 4),)], backend="eager")


# --- the file --------------------------------------------------------------------------------------------------


def test_what_was_put_is_read_back(tmp_path: Path) -> None:
    given = {"a": normal(3, 4), "b": torch.tensor(2), "c": normal(2, 3).to(torch.float8_e4m3fn)}
    with statistics_file(str(tmp_path / "x.safetensors"), OF) as file:
        assert file.get("site 1") is None
        file.put("site 1", given)
    with statistics_file(str(tmp_path / "x.safetensors"), OF) as file:
        found = file.get("site 1")
    assert found is not None and found.keys() == given.keys()
    assert all(bool((found[key] == value).all()) and found[key].dtype is value.dtype for key, value in given.items())


def test_it_is_written_every_thirty_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0]
    monkeypatch.setattr(statistics.time, "monotonic", lambda: clock[0])
    with statistics_file(str(tmp_path / "x.safetensors"), OF) as file:
        for now, written in ((29, 0), (31, 2), (60, 2), (62, 4)):
            clock[0] = now
            file.put(f"at {now}", {"a": normal(3)})
            assert len(load_file(tmp_path / "x.safetensors")) == written


def test_a_failed_writing_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with statistics_file(str(tmp_path / "x.safetensors"), OF) as file:
        file.put("one", {"a": normal(3)})

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(statistics, "save_file", fail)
    with (
        pytest.raises(InputError, match=r"cannot write statistics to .*: .*No space left"),
        statistics_file(str(tmp_path / "x.safetensors"), OF) as file,
    ):
        file.put("two", {"a": normal(3)})
    assert os.listdir(tmp_path) == ["x.safetensors"] and list(load_file(tmp_path / "x.safetensors")) == ["one/a"]


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with statistics_file(str(path), OF) as file:
        file.put("one", {"a": normal(300)})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="are truncated or altered"), statistics_file(str(path), OF):
        pass


def test_another_file_is_refused_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": normal(3)}, path)
    with pytest.raises(ArtifactError, match="holds no statistics of calibration"), statistics_file(str(path), OF):
        pass
    assert list(load_file(path)) == ["weight"]


@pytest.mark.parametrize("path", ["x.bin", "none/x.safetensors"])
def test_a_place_that_cannot_be_is_refused_before_any_work(path: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="safetensors file in a folder that exists"):
        Quantize(statistics=str(tmp_path / path))


def test_statistics_of_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="statistics needs calibration data"):
        fxpress.compile(nn.Linear(2, 2).eval(), [Quantize(statistics=str(tmp_path / "x.safetensors"))], (normal(1, 2),))


def test_a_driver_that_keeps_nothing_says_so(tmp_path: Path) -> None:
    rewrite = Quantize(statistics=str(tmp_path / "x.safetensors"))
    with pytest.raises(InputError, match=r"are kept by fxpress.compile\(\) and the command line alone"):
        rewrite.apply(encoder().copy(), Context(calibration=BATCHES))
