"""Exporting: what cannot be exported is listed with its line, and what the exporter has to be given another way."""

from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from fxpress.backends.onnx.choose import choose
from fxpress.backends.onnx.export import check, check_supported, save, to_onnx
from fxpress.backends.onnx.session import Session
from fxpress.compiler.trace import bind_example, trace
from fxpress.ir.equality import compare, run_float64
from fxpress.ir.errors import LoweringError
from fxpress.ir.graph import Program
from fxpress.ir.ops.attention import attention
from fxpress.ir.ops.norm import rms_norm
from fxpress.ir.rewrite import Context
from fxpress.passes import Canonicalize

# --- check -----------------------------------------------------------------------------------------------------


class Unsupported(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        a = torch.digamma(x)
        b = torch.mode(x).values
        return a + b


def traced(model: nn.Module, *example: Tensor) -> Program:
    return trace(model.eval(), bind_example(model, example))


def test_check_lists_every_unsupported_node_with_its_line() -> None:
    problems = check(traced(Unsupported(), torch.rand(3, 3)))
    assert len(problems) == 2
    for problem, operator in zip(problems, ("aten.digamma", "aten.mode"), strict=True):
        assert operator in problem and "test_export.py:" in problem


def test_unsupported_nodes_are_one_error_of_one_line() -> None:
    with pytest.raises(LoweringError, match="2 unsupported: ") as caught:
        check_supported(traced(Unsupported(), torch.rand(3, 3)))
    assert "\n" not in str(caught.value)


def test_what_depends_on_layouts_is_refused() -> None:
    class Strided(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 2).as_strided((2, 3), (1, 2))

    with pytest.raises(LoweringError, match="depends on layouts"):
        check_supported(traced(Strided(), torch.rand(3, 4)))


def test_bfloat16_is_refused_with_what_to_do() -> None:
    with pytest.raises(LoweringError, match=r"no bfloat16 kernels on CPU; use model\.float\(\)"):
        check_supported(traced(nn.Linear(2, 2).bfloat16(), torch.rand(2, 2).bfloat16()))


class Supported(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return attention(x, x, x)


def test_a_supported_program_has_no_problems() -> None:
    assert check(traced(Supported(), torch.rand(2, 4, 6, 8))) == []


# --- what is written -----------------------------------------------------------------------------------------------


def test_the_file_says_nothing_of_the_machine_that_made_it(tmp_path: Path) -> None:
    """The exporter notes with every node the lines of source that it comes from."""
    save(to_onnx(traced(Respelled(), torch.rand(2, 6)), {}), tmp_path / "model.onnx")
    written = (tmp_path / "model.onnx").read_bytes()
    assert Path(__file__).name.encode() not in written and b"stack_trace" not in written


# --- what the exporter is given another way --------------------------------------------------------------------


class Respelled(nn.Module):
    """Thirds of a length, and numbers less tensors, beside an operator that the exporter has to decompose."""

    def forward(self, x: Tensor) -> Tensor:
        first, _, last = (1 - x).chunk(3, 1)
        return torch.rsub(first * last, 2, alpha=3) + torch.nn.functional.softshrink(x)[:, :1]


def test_respelled_for_the_exporter(tmp_path: Path) -> None:
    model = Respelled().eval()
    length = Dim("third", min=1) * 3
    program = trace(model, bind_example(model, (torch.rand(2, 6),)), {"x": {1: length}})
    rewritten = program.copy()
    Canonicalize().apply(rewritten, Context())
    save(to_onnx(rewritten, {}), tmp_path / "model.onnx")
    session = Session(tmp_path / "model.onnx", threads=1)
    for size in (6, 9):
        x = torch.rand(2, size)
        (found,) = session.run([x.numpy()])
        assert compare([torch.from_numpy(found)], program.run([x]), run_float64(program, [x])).equal


BOUNDARIES = torch.tensor([-1.0, 0.0, 0.0, 0.5])
EDGES = torch.tensor([[0.0, 0.5, float("nan"), float("inf"), -2.0], [-1.0, 1.0, -0.0, 0.25, float("-inf")]])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.bucketize(x, BOUNDARIES),
        lambda x: torch.bucketize(x, BOUNDARIES, right=True, out_int32=True),
        lambda x: torch.bucketize((x > 0).long(), torch.tensor([0, 1, 1])),
        lambda x: torch.searchsorted(BOUNDARIES, x, side="right"),
        lambda x: torch.searchsorted(x.nan_to_num().sort(-1).values, x.flip(-1).contiguous()),
        lambda x: torch.cdist(x.clamp(-1, 1), 2 * x.clamp(-1, 1)),
        lambda x: torch.cdist(x.clamp(-1, 1)[None], x.clamp(0, 1)[None], p=1.0),
    ],
)
def test_what_the_exporter_has_no_translation_of(function: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    class Of(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    save(to_onnx(traced(Of(), EDGES), {}), tmp_path / "model.onnx")
    session = Session(tmp_path / "model.onnx", threads=1)
    for x in (EDGES, torch.randn(3, 5)):
        torch.testing.assert_close(torch.from_numpy(session.run([x.numpy()])[0]), function(x), equal_nan=True)


class Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x) * torch.exp(x).detach()


def test_a_detach_is_no_node() -> None:
    program = traced(Detached(), torch.rand(2, 6))
    assert program.calls(torch.ops.aten.detach.default)
    assert sorted(node.op_type for node in to_onnx(program, {}).graph) == ["Exp", "Mul", "Sin"]


class Tied(nn.Module):
    """An embedding whose weight is the head's, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(300, 16)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.nn.functional.linear(torch.tanh(self.embedding(ids)), self.embedding.weight)


def test_a_tied_weight_is_written_once(tmp_path: Path) -> None:
    """The head's is the embedding's turned, which a session does when it is made and not at each run."""
    program = traced(Tied(), torch.arange(6).reshape(2, 3))
    save(to_onnx(program, choose(program, threads=1)[0]), tmp_path / "model.onnx")
    assert (tmp_path / "model.safetensors").stat().st_size < 1.1 * 300 * 16 * 4
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options)
    loaded = onnx.load(tmp_path / "loaded.onnx", load_external_data=False)
    assert not any(node.op_type == "Transpose" for node in loaded.graph.node)
    ids = torch.tensor([[5, 7, 299, 0]])
    (found,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
    assert compare([torch.from_numpy(found)], program.run([ids]), run_float64(program, [ids])).equal


def test_integers_are_scaled_by_a_ratio_of_sizes(tmp_path: Path) -> None:
    class Coordinates(nn.Module):  # as in the relative positions of Segment Anything
        def forward(self, x: Tensor) -> Tensor:
            queries, keys = x.shape[1], x.shape[2]
            return x + torch.arange(queries)[:, None] * (keys / queries) - torch.arange(keys) / (keys / queries)

    save(to_onnx(traced(Coordinates(), torch.rand(2, 4, 6)), {}), tmp_path / "model.onnx")
    x = torch.rand(3, 5, 3)
    (found,) = Session(tmp_path / "model.onnx", threads=1).run([x.numpy()])
    torch.testing.assert_close(torch.from_numpy(found), Coordinates()(x))


@pytest.mark.parametrize("of", [Tensor.exp, Tensor.clone, lambda scale: scale])
def test_an_output_may_have_the_name_of_a_weight(of: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    class Clip(nn.Module):  # open_clip's models give their scale so
        def __init__(self) -> None:
            super().__init__()
            self.logit_scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"features": x * self.logit_scale, "logit_scale": of(self.logit_scale)}

    x = torch.rand(2, 3)
    save(to_onnx(traced(Clip(), x), {}), tmp_path / "model.onnx")
    session = Session(tmp_path / "model.onnx", threads=1)
    assert session.outputs == ["features", "logit_scale"]
    assert session.run([x.numpy()])[1] == pytest.approx(of(torch.tensor(2.0)))


def test_the_exporters_table_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.onnx._internal.exporter import _registration

    program = traced(nn.ReLU(), torch.rand(3, 2))
    first = to_onnx(program, {})
    described = _registration.ONNXRegistry.__dict__["from_torchlib"]
    monkeypatch.setattr(_registration, "onnxscript_apis", None)  # reading it again would fail
    assert [node.op_type for node in to_onnx(program, {}).graph] == [node.op_type for node in first.graph]
    assert _registration.ONNXRegistry.__dict__["from_torchlib"] is described
    assert isinstance(described, classmethod)


class Masked(nn.Module):
    """What torch's exporter would decompose: `&` and `|` of masks, and the lowerings of causal and masked attention."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query = x.unflatten(-1, (2, 4)).transpose(1, 2)
        keys = (mask & (x[..., 0] > -3)) | (x[..., 1] > 3)
        causal = attention(query, query, query, key_mask=mask, right=0)
        return attention(causal, query, query, key_mask=keys)


def test_nothing_of_ours_makes_the_exporter_trace_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    program = traced(Masked(), torch.randn(2, 6, 8), torch.ones(2, 6, dtype=torch.bool))
    with monkeypatch.context() as patch:
        patch.setattr(torch.export.ExportedProgram, "run_decompositions", lambda *_: pytest.fail("it traces twice"))
        choices, _ = choose(program)
        to_onnx(program, choices)


class Spelled(nn.Module):
    """Squares, casts and transposes as models and our references write them, which torch's exporter would decompose."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        casts = mask.to(torch.float32) + mask.to(torch.int64) + x[..., 0].to(torch.float16).to(torch.float32)
        product = (x[0].square().T @ x[0]).T.to(x.dtype)
        return rms_norm(x, torch.ones(8), 1e-6) + product[:1] + casts[..., None]


def test_other_spellings_of_what_the_exporter_knows_do_not_either(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = [torch.randn(2, 6, 8), torch.ones(2, 6, dtype=torch.bool)]
    program = traced(Spelled(), *given)
    with monkeypatch.context() as patch:
        patch.setattr(torch.export.ExportedProgram, "run_decompositions", lambda *_: pytest.fail("it traces twice"))
        choices, _ = choose(program)
        model = to_onnx(program, choices)
    save(model, tmp_path / "m.onnx")
    found = Session(tmp_path / "m.onnx").run([tensor.numpy() for tensor in given])
    comparison = compare([torch.from_numpy(found[0])], program.run(given), run_float64(program, given))
    assert comparison.equal, comparison.reasons
