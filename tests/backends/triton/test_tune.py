"""The measured choice between ways to run products and attention: every way gives the same, the choice is remembered,
and neither a clock nor a GPU is needed to see that."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from build import normal, program
from kernels_agree import calling, poisoned
from operator_cases import BY_NAME, CASES
from torch import Tensor

import fxpress
from fxpress.backends.memory import Memory
from fxpress.backends.triton import candidates, tune
from fxpress.backends.triton.runner import Loaded, TritonRunner
from fxpress.backends.triton.tune import Tuner
from fxpress.compiler import runners
from fxpress.compiler.report import Report, render
from fxpress.ir.equality import compare, run_float64
from fxpress.ir.graph import Program
from fxpress.ir.ops.attention import attention
from fxpress.ir.ops.float8 import float8_products
from fxpress.ir.ops.integer import integer_linear
from fxpress.ir.ops.quantize import int4_linear, pack_int4
from fxpress.ir.ops.window_attention import window_attention
from fxpress.kernels import attention as attention_kernels
from fxpress.kernels.matmul_configs import matmul_configs


class Clock:
    """Gives times in turn, and counts what was measured."""

    def __init__(self, times: Iterator[float]) -> None:
        self.times, self.calls = times, 0

    def __call__(self, call: Callable[[], Any]) -> float:
        call()
        self.calls += 1
        return next(self.times)


def last_wins() -> Clock:
    return Clock(1.0 / 2**number for number in itertools.count())


def equal() -> Clock:
    return Clock(itertools.repeat(1.0))


def tuner(folder: Path, clock: Any, place: str = "a GPU") -> Tuner:
    return Tuner(clock, Memory("triton", folder), place)


def chosen(traced: Program, tensors: list[Tensor], folder: Path, clock: Clock | None = None) -> list[str]:
    """What ran, after it has been compared with eager PyTorch."""
    runner = TritonRunner(traced, tuner(folder, clock or last_wins()))
    with poisoned():
        runner.run(tensors)  # measures
        found = runner.run(tensors)
    with torch.no_grad():
        eager = list(traced.run(tensors))
    verdict = compare(found, eager, run_float64(traced, tensors))
    assert verdict.equal, verdict.reasons
    return [item["chosen"] for item in runner.tuned]


# --- ways -----------------------------------------------------------------------------------------------------------

x, w, b = normal(2, 5, 16), normal(24, 16, seed=1), normal(24, seed=2)


def plain(self: Any, x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, self.w)


def biased(self: Any, x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, self.w, self.b)


def longer(self: Any, x: Tensor) -> Tensor:
    y = torch.nn.functional.linear(x, self.w, self.b)
    return torch.nn.functional.gelu(y) + y * 0.5


def two_results(self: Any, x: Tensor) -> Tensor:
    y = torch.nn.functional.linear(x, self.w)
    return y.relu(), y  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("function", "way"),
    [(plain, "torch.matmul"), (biased, "torch.matmul"), (longer, "torch.matmul, epilogue"),
     (two_results, "torch.matmul, epilogue")],
)  # fmt: skip
def test_linear_layers(function: Any, way: str, dtype: torch.dtype, tmp_path: Path) -> None:
    traced = program(function, x.to(dtype), w=w.to(dtype), b=b.to(dtype))
    assert chosen(traced, [x.to(dtype)], tmp_path) == [way]


@pytest.mark.parametrize(
    "other", [normal(2, 3, 16, 7, seed=3), normal(2, 3, 7, 16, seed=3).transpose(-1, -2), normal(1, 3, 16, 7, seed=3)]
)
@pytest.mark.parametrize("epilogue", [False, True])
def test_batches_of_products(other: Tensor, epilogue: bool, tmp_path: Path) -> None:
    left = normal(2, 3, 5, 16)
    traced = program(lambda self, x, y: (x @ y).relu() if epilogue else x @ y, left, other)
    assert chosen(traced, [left, other], tmp_path) == ["torch.matmul, epilogue" if epilogue else "torch.matmul"]


@pytest.mark.parametrize("epilogue", [False, True], ids=["plain", "epilogue"])
def test_a_weight_that_is_expanded_is_multiplied_as_a_dense_one(epilogue: bool, tmp_path: Path) -> None:
    def function(self: Any, x: Tensor) -> Tensor:
        found: Tensor = int4_linear(x, self.weight, self.scale, None, None)
        return found.tanh() if epilogue else found

    weight, scale = pack_int4((normal(24, 16) * 3).round().clamp(-8, 7).to(torch.int8)), normal(24, 2).abs()
    traced = program(function, x, weight=weight, scale=scale)
    runner = TritonRunner(traced, tuner(tmp_path, last_wins()))
    vars(runner._loaded.module)["MANY_ROWS"] = 4
    found = [runner.run([x])[0] for _ in range(2)]
    expected = {"torch.matmul, epilogue" if epilogue else "torch.matmul"}
    assert {item["chosen"] for item in runner.tuned if item["operator"].endswith("_whole")} == expected
    assert any("expanded, then" in name for item in runner.tuned for name in item["milliseconds"])
    for result in found:
        torch.testing.assert_close(result, traced.run([x])[0])


def test_products_of_integers(tmp_path: Path) -> None:
    numbers = (normal(4, 8, 16) * 40).to(torch.int8)
    weight = (w * 40).to(torch.int8)
    traced, tensors = calling(integer_linear, numbers, weight, None)
    assert chosen(traced, tensors, tmp_path / "many") == ["torch._int_mm, epilogue"]
    traced, tensors = calling(integer_linear, numbers[:1, :3], weight, None)  # too few rows for it
    assert "_int_mm" not in chosen(traced, tensors, tmp_path / "few")[0]


def test_products_of_float8(tmp_path: Path) -> None:
    numbers, weight = ((item * 100).to(torch.float8_e4m3fn) for item in (normal(4, 8, 16), normal(32, 16, seed=1)))
    traced, tensors = calling(float8_products, numbers, weight)
    assert chosen(traced, tensors, tmp_path / "many") == ["torch._scaled_mm, epilogue"]
    traced, tensors = calling(float8_products, numbers, weight[:7])  # widths that it does not take
    assert "_scaled_mm" not in chosen(traced, tensors, tmp_path / "odd")[0]


def test_every_configuration(tmp_path: Path) -> None:
    """Each of the first configurations, as sizes like these have on sm_80, and the library's product."""
    rows, weight = normal(40, 32), normal(48, 32, seed=1)
    traced = program(longer, rows, w=weight, b=normal(48, seed=2))
    first = TritonRunner(traced, tuner(tmp_path, equal()))
    first.run([rows])
    (choice,) = first.tuned
    names = list(choice["milliseconds"])
    assert len(names) > 2 and names[-1] == "torch.matmul, epilogue" and choice["chosen"] == names[0]
    for number, name in enumerate(names):
        clock = Clock(itertools.cycle([2.0] * number + [1.0] + [2.0] * (len(names) - number - 1)))
        assert chosen(traced, [rows], tmp_path / str(number), clock) == [name]


FORMATS = [case for case in CASES if case[0] in ("int4_linear", "float8_linear", "sparse24_linear")]


@pytest.mark.parametrize(("name", "args", "options"), FORMATS, ids=[case[0] for case in FORMATS])
def test_weights_of_other_formats(name: str, args: Any, options: Any, tmp_path: Path) -> None:
    """Of these the kernel's configurations are measured; of 70 rows by a sparse weight, the product with the whole."""
    traced, tensors = calling(BY_NAME[name], *args, **options)
    clock = last_wins()
    (*_, way) = chosen(traced, tensors, tmp_path, clock)
    assert clock.calls > 1
    assert "warps" in way or "torch.matmul" in way or "generated" in way


@pytest.mark.parametrize(("rows", "arch"), [(8, 80), (4096, 80), (4096, 90), (4096, 100)])
def test_few_configurations_are_measured_of_which_the_first_is_the_best_guess(rows: int, arch: int) -> None:
    configs = matmul_configs(rows, 3072, 768, torch.bfloat16, arch, tma=arch >= 90)
    found = candidates.pruned(configs)
    assert found[0] == configs[0] and len(found) <= candidates.CONFIGS
    tiles = {(config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"], config["SPLIT"]) for config in found}
    assert len(tiles) >= 3


q, k, v = normal(2, 4, 5, 8), normal(2, 4, 7, 8, seed=1), normal(2, 4, 7, 8, seed=2)
few_k, few_v = normal(2, 2, 7, 8, seed=1), normal(2, 2, 7, 8, seed=2)
padding = torch.arange(7)[None] < torch.tensor([4, 0])[:, None]  # of the second row nothing is left
SDPA, OURS = "SDPA", "attention, 16x16, 4 warps, 2 stages"


@pytest.mark.parametrize(
    ("tensors", "options"),
    [
        ((q, k, v), {}),
        ((q, k, v), {"scale": 0.3}),
        ((q, k, v), {"right": 0}),
        ((q, few_k, few_v), {}),
        ((q, k, v), {"empty": "mean"}),
        ((q.half(), k.half(), v.half()), {"right": 0}),
        ((q.transpose(1, 2).contiguous().transpose(1, 2), k, v), {}),
    ],
    ids=["plain", "scale", "causal", "groups", "empty", "half", "strides"],
)
def test_attention(tensors: Any, options: dict[str, Any], tmp_path: Path) -> None:
    traced, given = calling(attention, *tensors, **options)
    assert chosen(traced, given, tmp_path) == [SDPA]


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 2.0},
        {"sinks": normal(4)},
        {"left": 2},
        {"right": 2},  # aligned at the bottom right
        {"left": 1, "right": 0},
        {"key_mask": padding},
        {"bias": normal(5, 7) > -0.3},
        {"key_mask": padding, "right": 0},
        {"key_mask": padding, "empty": "mean"},
        {"bias": normal(5, 7)},
        {"bias": normal(5, 7) > 0, "key_mask": padding},
    ],
    ids=str,
)
def test_attention_of_another_meaning_stays(options: dict[str, Any], tmp_path: Path) -> None:
    clock = last_wins()
    traced, given = calling(attention, q, k, v, **options)
    assert chosen(traced, given, tmp_path, clock) == [OURS]
    assert clock.calls == 0, "there is nothing to choose between"


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "columns"])
def test_cudnn_is_asked_for_what_it_takes(rows: bool) -> None:
    """Unlike PyTorch's choice of a kernel, it has nothing to fall back to."""
    tensors = [normal(2, 4, 32, 16, dtype=torch.float16) for _ in range(3)]
    if not rows:  # are what lies together
        tensors[1] = tensors[1].transpose(2, 3).contiguous().transpose(2, 3)
    ways = candidates.attention_ways(attention_kernels, attention_kernels.attention, *tensors)
    assert ("SDPA, cuDNN" in [way.name for way in ways]) == rows


def test_few_queries_are_named_as_they_run() -> None:
    """The heads of a group are rows of one block."""
    query, key = normal(1, 32, 16, 64, dtype=torch.float16), normal(1, 8, 64, 64, dtype=torch.float16)
    (own, *_) = candidates.attention_ways(attention_kernels, attention_kernels.attention, query, key, key)
    assert own.name.startswith("attention, 64x")


def test_windows_stay(tmp_path: Path) -> None:
    traced, given = calling(window_attention, q, normal(2, 4, 5, 8), normal(2, 4, 5, 8), left=1, right=1)
    assert chosen(traced, given, tmp_path) == []


def test_tf32_is_no_way_to_run_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "full_precision", lambda: False)
    monkeypatch.setattr(tune, "full_precision", lambda: False)
    clock = last_wins()
    assert chosen(program(plain, x, w=w), [x], tmp_path, clock)[0] != "torch.matmul"
    traced, given = calling(attention, q, k, v)
    assert chosen(traced, given, tmp_path) == [OURS]


# --- choice and memory ----------------------------------------------------------------------------------------------


@pytest.fixture
def layer() -> Program:
    return program(longer, x, w=w, b=b)


def run(traced: Program, folder: Path, clock: Any, place: str = "a GPU", *batches: Tensor) -> TritonRunner:
    runner = TritonRunner(traced, tuner(folder, clock, place))
    for batch in batches or (x,):
        runner.run([batch])
    return runner


def test_what_was_measured_is_remembered(layer: Program, tmp_path: Path) -> None:
    clock, again, elsewhere = last_wins(), equal(), equal()
    first = run(layer, tmp_path, clock)
    assert clock.calls == 2
    second = run(layer, tmp_path, again)
    assert again.calls == 0 and second.tuned == first.tuned
    run(layer, tmp_path, elsewhere, "another GPU")
    assert elsewhere.calls == 2


def test_sizes_up_to_a_power_of_two_are_one_class(layer: Program, tmp_path: Path) -> None:
    clock = equal()
    runner = run(layer, tmp_path, clock, "a GPU", normal(2, 5, 16), normal(3, 4, 16), normal(4, 4, 16))
    (choice,) = runner.tuned
    assert clock.calls == 2 and choice["calls"] == 3
    assert choice["sizes"] == "f32 [<=1, <=16, 16] x [24, 16]"
    runner.run([normal(4, 5, 16)])
    assert [item["sizes"] for item in runner.tuned][1:] == ["f32 [<=1, <=32, 16] x [24, 16]"]


def test_a_growing_cache_is_not_measured_at_each_token(tmp_path: Path) -> None:
    module = ModuleType("generated")
    vars(module).update(vars(attention_kernels))
    choosing = tuner(tmp_path, equal())
    choosing.attach(module, {})
    for past in (5, 6, 7):
        keys, values = normal(1, 4, past + 1, 8), normal(1, 4, past + 1, 8, seed=1)
        found = module.attention(normal(1, 4, 1, 8, seed=2), keys, values, right=past)
        torch.testing.assert_close(found, F.scaled_dot_product_attention(normal(1, 4, 1, 8, seed=2), keys, values))
    assert [item["calls"] for item in choosing.choices] == [3]


def test_another_epilogue_is_measured_anew(layer: Program, tmp_path: Path) -> None:
    run(layer, tmp_path, equal())
    clock = equal()
    run(program(lambda self, x: torch.nn.functional.linear(x, self.w).tanh(), x, w=w), tmp_path, clock)
    assert clock.calls == 2


@pytest.mark.parametrize(("second", "wins"), [(1.0, False), (0.98, False), (0.96, True)])
def test_generated_kernels_run_unless_another_way_is_faster(
    layer: Program, tmp_path: Path, second: float, wins: bool
) -> None:
    runner = run(layer, tmp_path, Clock(iter([1.0, second])))
    assert (runner.tuned[0]["chosen"] == "torch.matmul, epilogue") == wins


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: dict.fromkeys(entry, -1.0),
        lambda entry: dict.fromkeys(entry),
        lambda entry: dict.fromkeys(entry, "1"),
        lambda entry: dict(list(entry.items())[1:]),
        lambda entry: {**entry, "more": 1.0},
        lambda entry: [1.0, 2.0],
    ],
)
def test_what_is_no_measurement_is_measured_anew(layer: Program, tmp_path: Path, change: Any) -> None:
    run(layer, tmp_path, equal())
    (file,) = tmp_path.iterdir()
    file.write_text(json.dumps({key: change(entry) for key, entry in json.loads(file.read_text()).items()}))
    clock = equal()
    run(layer, tmp_path, clock)
    assert clock.calls == 2


def test_a_damaged_file_costs_a_warning_and_a_measurement(layer: Program, tmp_path: Path) -> None:
    run(layer, tmp_path, equal())
    (file,) = tmp_path.iterdir()
    file.write_text('{"linear')
    clock = equal()
    with pytest.warns(RuntimeWarning, match="not remembered"):
        run(layer, tmp_path, clock)
    assert clock.calls == 2
    assert json.loads(file.read_text())


def test_a_way_that_fails_is_not_taken(layer: Program, tmp_path: Path) -> None:
    def fails(call: Callable[[], Any]) -> float:
        fails.calls += 1  # type: ignore[attr-defined]
        if fails.calls == 2:  # type: ignore[attr-defined]
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")
        return 1.0

    fails.calls = 0  # type: ignore[attr-defined]
    runner = run(layer, tmp_path, fails)
    (choice,) = runner.tuned
    failed = [name for name, ms in choice["milliseconds"].items() if ms is None]
    assert failed == ["torch.matmul, epilogue"] and choice["chosen"] not in failed
    report = Report("model", "triton", tuned=[choice])
    assert "torch.matmul, epilogue failed" in " ".join(render(report, width=300).split())
    again = equal()
    run(layer, tmp_path, again)
    assert again.calls == 0, "that it fails is remembered"


def test_what_is_wrong_with_the_generated_kernel_is_not_hidden(layer: Program, tmp_path: Path) -> None:
    def fails(call: Callable[[], Any]) -> float:
        raise RuntimeError("illegal memory access")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(layer, tmp_path, fails)


def test_while_a_graph_is_recorded_nothing_is_measured(layer: Program, tmp_path: Path) -> None:
    recording, clock = [True], last_wins()
    way = Tuner(clock, Memory("triton", tmp_path), "a GPU", lambda: not recording[0])
    runner = TritonRunner(layer, way)
    (first,) = runner.run([x])
    assert clock.calls == 0 and runner.tuned == []
    recording[0] = False
    (second,) = runner.run([x])
    assert clock.calls == 2 and runner.tuned[0]["chosen"] == "torch.matmul, epilogue"
    recording[0] = True
    assert torch.equal(runner.run([x])[0], second)
    torch.testing.assert_close(first, second)


HELPER = """import triton

@triton.jit
def helper(x):
    return x + {number}

@triton.jit
def kernel(x):
    helper(x)
"""


def test_a_digest_is_of_what_a_kernel_calls_too() -> None:
    loaded = [Loaded(HELPER.format(number=number)) for number in (1, 2, 2)]
    first, second, third = (tune.digest(item.module.kernel) for item in loaded)
    assert first != second == third


WRITER = """
import sys
from pathlib import Path
from fxpress.backends.memory import Memory
for number in range(40):
    Memory("triton", Path(sys.argv[1])).write({f"{sys.argv[2]} {number}": {"a": 1.0, "b": 2.0}})
"""


def test_two_processes_at_once_leave_a_whole_file(tmp_path: Path) -> None:
    """One may lose what the other wrote, which is then measured again; none reads a part."""
    command = [sys.executable, "-P", "-c", WRITER, str(tmp_path)]
    writers = [subprocess.Popen([*command, name]) for name in ("one", "two")]
    while any(writer.poll() is None for writer in writers):
        assert all(entry == {"a": 1.0, "b": 2.0} for entry in Memory("triton", tmp_path).read().values())
    assert [writer.returncode for writer in writers] == [0, 0]
    found = Memory("triton", tmp_path).read()
    assert found and all(entry == {"a": 1.0, "b": 2.0} for entry in found.values())
    assert [file.name for file in tmp_path.iterdir()] == ["triton.json"]


# --- compile --------------------------------------------------------------------------------------------------------


def test_the_report_says_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxpress.backends.triton.runner.tuner_here", lambda: tuner(tmp_path, last_wins()))
    given = tiny.inputs()
    compiled = fxpress.compile(tiny.encoder(), example_inputs=given, backend="triton", verify=False)
    assert compiled.report.tuned == []
    expected = fxpress.compile(tiny.encoder(), example_inputs=given, backend="triton", verify=False, tune=False)
    torch.testing.assert_close(compiled(**given), expected(**given))
    assert [item["operator"] for item in compiled.report.tuned].count("attention") == 1
    assert {item["chosen"] for item in compiled.report.tuned} == {"torch.matmul", "torch.matmul, epilogue", OURS}
    assert "products and attention, by measured time" in str(compiled.report) and "torch.matmul" in str(compiled.report)
    assert expected.report.tuned == []


def test_nothing_is_measured_where_that_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxpress.backends.onnx.choose._measure", lambda *_: pytest.fail("measured"))
    given = tiny.inputs()
    compiled = fxpress.compile(tiny.encoder(), example_inputs=given, backend="onnx", tune=False)
    assert compiled.report.choices and not any(choice["milliseconds"] for choice in compiled.report.choices)
    assert compiled.then([]).report.choices == compiled.report.choices


def test_without_a_gpu_nothing_is_measured() -> None:
    assert runners.make_runner("triton", program(plain, x, w=w), None, runners.Clock()).tuned == []  # type: ignore[attr-defined]


def test_a_key_names_what_a_measurement_holds_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU 1")
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    place = tune.this_gpu()
    assert place.startswith("GPU 1; driver 13000, triton ") and torch.__version__ in place
