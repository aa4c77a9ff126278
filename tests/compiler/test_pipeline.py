"""Pass lists as users write them, and the checks around each pass."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
import torch

from fxpress import compile
from fxpress.compiler import pipeline
from fxpress.compiler.pipeline import parse_passes, run_passes
from fxpress.compiler.trace import bind_example, trace
from fxpress.ir.equality import run_float64
from fxpress.ir.errors import InputError, RewriteError, VerifyError
from fxpress.ir.graph import Program
from fxpress.ir.rewrite import Context, Pass, PassResult, Sparsity
from fxpress.passes import Canonicalize, Fuse

aten = torch.ops.aten


@dataclass(frozen=True)
class Options(Pass):
    """Changes nothing; has options."""

    rate: float = 0.5
    method: str = "plain"
    skip: tuple[str, ...] = ()

    def apply(self, program: Program, context: Context) -> PassResult:
        return PassResult()


@dataclass(frozen=True)
class Edits(Pass):
    """Applies any edit."""

    edit: Callable[[Program], None] = lambda program: None

    @classmethod
    def pass_name(cls) -> str:
        return "edits"

    def apply(self, program: Program, context: Context) -> PassResult:
        self.edit(program)
        return PassResult(Counter(edit=1))

    def __str__(self) -> str:
        return "edits"


class Lossy(Edits):
    exact: ClassVar[bool] = False


@pytest.fixture
def with_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pipeline.PASSES, "options", Options)


# --- reading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [None, "fuse", ["fuse"], Fuse(), [Fuse()], (Fuse(),), "canonicalize, fuse", "fuse()"])
def test_ways_to_say_the_default(given: Any) -> None:
    assert parse_passes(given) == [Canonicalize(), Fuse()]


@pytest.mark.parametrize("given", [[], "", ()])
def test_no_passes(given: Any) -> None:
    assert parse_passes(given) == []


@pytest.mark.usefixtures("with_options")
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("options", Options()),
        ("options(0.25)", Options(0.25)),
        ("options(0.25, wanda)", Options(0.25, "wanda")),
        ("options(method='wan, da')", Options(method="wan, da")),
        ("options(rate=-1, skip=('head', 'a(b'))", Options(-1, skip=("head", "a(b"))),
    ],
)
def test_options(text: str, expected: Options) -> None:
    assert parse_passes(text) == [Canonicalize(), expected]


@pytest.mark.usefixtures("with_options")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("fues", "unknown pass 'fues': did you mean 'fuse'"),
        ("options(rat=1)", "unknown option 'rat' of pass 'options': did you mean 'rate'"),
        ("options(1, 2, 3, 4)", "takes 3 options, found 4"),
        ("fuse(1)", "takes 0 options, found 1"),
        ("options(rate=open('x'))", "no literal value"),
        ("options(1, rate=2)", "option 'rate' of pass 'options' is given twice"),
        ("options(rate=1, rate=1)", "option 'rate' of pass 'options' is given twice"),
        ("fuse, (", "cannot read the passes"),
        ("a.b", "cannot read the passes"),
        ("'fuse'", "cannot read the passes"),
        ("fuse\0", "cannot read the passes"),
        ([Fuse], r"write Fuse\(\)"),
        ([3], "3 is no pass"),
        (3, "passes must be a list of passes or a text, found a int"),
        ({"fuse": 1}, "found a dict"),
    ],
)
def test_what_cannot_be_read(given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_passes(given)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("with_options")
@pytest.mark.parametrize("text", ["{0}", "options({0})", "options(rate={0})", "fuse, [{0}]", "{0}.x()", "(x := {0})"])
def test_code_in_the_text_is_not_run(text: str, tmp_path: Path) -> None:
    target = tmp_path / "made"
    with pytest.raises(InputError):
        parse_passes(text.format(f"__import__('pathlib').Path({str(target)!r}).touch()"))
    assert not target.exists()


# --- running -----------------------------------------------------------------------------------------------------


def double_the_norm(program: Program) -> None:
    """A wrong rewrite: the last norm counts twice."""
    node = program.calls(aten.layer_norm.default)[-1]
    wrong = program.call(aten.add.Tensor, node, node, before=node.next)
    node.replace_all_uses_with(wrong, delete_user_cb=lambda user: user is not wrong)
    program.clean()


def forget_a_shape(program: Program) -> None:
    del program.calls(aten.gelu.default)[0].meta["val"]


def lie_about_a_shape(program: Program) -> None:
    node = program.calls(aten.gelu.default)[0]
    node.meta["val"] = program.calls(aten.layer_norm.default)[0].meta["val"]


def change_in_place(program: Program) -> None:
    node = program.calls(aten.gelu.default)[0]
    program.call(aten.relu_.default, node.args[0], before=node)


def use_before_definition(program: Program) -> None:
    node = program.calls(aten.gelu.default)[0]
    node.args[0].append(program.graph.call_function(aten.relu.default, (node,)))


def fail(program: Program) -> None:
    raise RuntimeError("tensor sizes differ\n\nFor more information, set a variable")


def refuse(program: Program) -> None:
    raise RewriteError("no weight to cut")


def compiled_with(*passes: Pass) -> Any:
    return compile(tiny.encoder(), passes=list(passes), example_inputs=tiny.inputs(), backend="eager")


def test_a_pass_that_changes_the_result_is_named() -> None:
    with pytest.raises(VerifyError, match=r"^pass edits \(after canonicalize\): the result changed: output has RMSE"):
        compiled_with(Edits(double_the_norm))


def test_a_lossy_pass_is_measured() -> None:
    report = compiled_with(Lossy(double_the_norm)).report
    assert report.equal is False and report.reasons
    assert report.passes[1].sqnr_db == pytest.approx(0, abs=0.1)  # the error is as large as the result


def test_what_a_pass_says_of_sparsity_is_kept() -> None:
    @dataclass(frozen=True)
    class Thins(Pass):
        def apply(self, program: Program, context: Context) -> PassResult:
            return PassResult(sparsity=[Sparsity("up", 512, 256, 20.5)])

    report = compiled_with(Thins()).report.passes[1]
    assert report.sparsity == [{"layer": "up", "numbers": 512, "zeros": 256, "sqnr_db": 20.5}]


def halve_the_output(program: Program) -> None:
    (result,) = program.graph.output_node().args[0]
    half = program.call(aten.slice.Tensor, result, 2, 0, 8, before=program.graph.output_node())
    program.graph.output_node().args = ([half],)
    program.clean()


def test_an_output_of_another_shape_is_no_error_of_a_lossy_pass_and_noted() -> None:
    program, context, expected = on_the_example()
    passed = run_passes(program, [Lossy(halve_the_output), Fuse()], context, expected)
    assert passed.reshaped == {"output": [[2, 6, 16], [2, 6, 8]]}
    assert passed.reports[0].sqnr_db is None  # nothing is left to compare
    assert passed.reports[1].sqnr_db is not None and passed.reports[1].sqnr_db > 100


def test_an_output_of_another_shape_is_an_error_of_an_exact_pass() -> None:
    program, context, expected = on_the_example()
    with pytest.raises(VerifyError, match=r"^pass edits: the result changed: output is float32\[2, 6, 8\], expected"):
        run_passes(program, [Edits(halve_the_output)], context, expected)


def on_the_example() -> tuple[Program, Context, tuple[list[Any], list[Any]]]:
    """A traced program, its example, and what the model gives there."""
    model, flat = tiny.encoder(), list(tiny.inputs().values())
    program = trace(model, bind_example(model, tiny.inputs()))
    with torch.no_grad():
        return program, Context(inputs=flat), ([model(*flat)], run_float64(program, flat))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (forget_a_shape, "has no fake value"),
        (lie_about_a_shape, "its node says"),
        (change_in_place, "programs are functional"),
        (use_before_definition, "the graph is malformed"),
    ],
)
def test_an_ill_formed_graph_is_found(edit: Callable[[Program], None], message: str) -> None:
    with pytest.raises(VerifyError, match=rf"^pass edits \(after canonicalize\): .*{message}"):
        compiled_with(Edits(edit))


def test_an_ill_formed_node_is_named_with_its_line() -> None:
    with pytest.raises(VerifyError, match=r"node gelu: .*\(tiny\.py:\d+: "):
        compiled_with(Edits(lie_about_a_shape))


def test_a_pass_that_raises_is_a_rewrite_error() -> None:
    with pytest.raises(RewriteError, match=r"^pass edits \(after canonicalize\): tensor sizes differ$"):
        compiled_with(Edits(fail))


def test_a_pass_that_refuses_keeps_its_message() -> None:
    with pytest.raises(RewriteError, match=r"^pass edits \(after canonicalize\): no weight to cut$"):
        compiled_with(Edits(refuse))


def test_the_first_pass_has_none_before_it() -> None:
    model = tiny.encoder()
    program = trace(model, bind_example(model, tiny.inputs()))
    with pytest.raises(RewriteError, match=r"^pass edits: no weight to cut$"):
        run_passes(program, [Edits(refuse)], Context(inputs=list(tiny.inputs().values())))


def test_the_default_passes_are_measured() -> None:
    for item in compiled_with(Fuse()).report.passes:
        assert item.changes == sum(item.rewrites.values())
        assert item.sqnr_db is not None and item.sqnr_db > 100


@pytest.mark.parametrize("text", ["fuse]+[fuse", "-" * 5000 + "1", "fuse("], ids=["expression", "deep", "open"])
def test_text_that_is_no_list_of_passes(text: str) -> None:
    with pytest.raises(InputError, match="cannot read the passes"):
        parse_passes(text)
