"""A session of OpenVINO: faults are one line, threads share it, and no precision is lost unasked."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import pytest
import tiny
import torch

import fxpress
from fxpress.backends.openvino.session import OpenVinoSession, check_dtype
from fxpress.ir.errors import ArtifactError, InputError


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A matmul of two inputs, both sizes free."""

    class Product(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x @ y

    path = tmp_path_factory.mktemp("product") / "model.onnx"
    inputs = (torch.randn(4, 6), torch.randn(6, 5))
    fxpress.compile(Product().eval(), [], inputs, backend="eager").to_onnx(path, form="qdq")
    return path


def arrays(rows: int, inner: int = 6) -> list[Any]:
    random = numpy.random.default_rng(rows)
    return [random.standard_normal(size, numpy.float32) for size in ((rows, inner), (inner, 5))]


def test_runs_at_any_size(file: Path) -> None:
    session = OpenVinoSession(file, threads=1)
    for rows in (4, 1, 9, 0):
        x, y = arrays(rows)
        (found,) = session.run([x, y])
        numpy.testing.assert_allclose(found, x @ y, rtol=1e-5, atol=1e-6)


def test_takes_arrays_that_are_not_contiguous(file: Path) -> None:
    x, y = arrays(8)
    (found,) = OpenVinoSession(file, threads=1).run([x[::2], numpy.asfortranarray(y)])
    numpy.testing.assert_allclose(found, x[::2] @ y, rtol=1e-5, atol=1e-6)


def test_results_outlive_the_next_run(file: Path) -> None:
    session = OpenVinoSession(file, threads=1)
    x, y = arrays(4)
    (first,) = session.run([x, y])
    session.run([-x, y])
    numpy.testing.assert_allclose(first, x @ y, rtol=1e-5, atol=1e-6)


def test_threads_share_a_session(file: Path) -> None:
    session = OpenVinoSession(file, threads=1)
    given = [arrays(rows) for rows in range(1, 41)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(session.run, given))
    for (x, y), (result,) in zip(given, found, strict=True):
        numpy.testing.assert_allclose(result, x @ y, rtol=1e-5, atol=1e-6)


def test_an_input_that_does_not_fit_is_named(file: Path) -> None:
    with pytest.raises(InputError, match=re.escape("OpenVINO failed on inputs of [(4, 6), (7, 5)]")) as caught:
        OpenVinoSession(file).run([arrays(4)[0], arrays(4, 7)[1]])
    assert "\n" not in str(caught.value)


def test_threads_are_at_least_one(file: Path) -> None:
    with pytest.raises(InputError, match="threads must be at least 1, found 0"):
        OpenVinoSession(file, threads=0)


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ArtifactError, match=re.escape("OpenVINO cannot load model.onnx")) as caught:
        OpenVinoSession(tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)


def test_a_processor_without_bfloat16_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Core:
        def get_property(self, device: str, name: str) -> list[str]:
            return ["FP32", "INT8"]

    monkeypatch.setattr("openvino.Core", Core)
    check_dtype(None)
    with pytest.raises(InputError, match="this processor does not compute in bfloat16"):
        OpenVinoSession(file, dtype="bfloat16")


def test_float32_is_not_narrowed_where_the_processor_has_less(tmp_path: Path) -> None:
    # Left to itself OpenVINO computes in bfloat16 where there are units for it: two of a number's 24 bits in three.
    compiled = fxpress.compile(tiny.bert(), example_inputs=tiny.text(), backend="openvino")
    assert compiled.report.equal and compiled.report.sqnr_db is not None and compiled.report.sqnr_db > 110
