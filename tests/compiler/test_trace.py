"""From a model and an example to a functional program, or to an error that names the user's line."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from build import module
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from fxpress.compiler.sizes import admit_ones
from fxpress.compiler.trace import bind_example, trace
from fxpress.ir.equality import compare, run_float64
from fxpress.ir.errors import FxpressError, InputError, TraceError
from fxpress.ir.graph import Program
from fxpress.ir.verify import verify


def traced(model: nn.Module, *example: Any, **named: Any) -> Program:
    model.eval()
    program = trace(model, bind_example(model, named or example))
    verify(program)
    return program


def assert_equals(program: Program, model: nn.Module, *tensors: Tensor) -> None:
    with torch.no_grad():
        eager = model(*(tensor.clone() for tensor in tensors))
        found = program.run(tensors)
    assert compare(found, [eager], run_float64(program, tensors)).reasons == ()


# --- models that cannot be traced ------------------------------------------------------------------------------


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


class Reads(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float(x.max().numpy())


def test_a_branch_on_data_names_the_line_of_the_user() -> None:
    with pytest.raises(
        TraceError, match=r"cannot trace Branches at test_trace\.py:\d+ in forward: if x\.sum"
    ) as caught:
        traced(Branches(), torch.rand(2, 3))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("call", [torch.vmap(torch.sin), lambda x: flex_attention(x, x, x)], ids=["vmap", "flex"])
def test_vmap_is_refused_with_what_to_write(call: Any) -> None:
    with pytest.raises(TraceError, match=r"vmap.* cannot be replayed.*; write it by broadcasting"):
        traced(module(lambda m, x: call(x)), torch.rand(2, 2, 5, 4))


def test_a_value_read_from_data_names_the_line_of_the_user() -> None:
    with pytest.raises(TraceError, match=r"cannot trace Reads at test_trace\.py:\d+ in forward"):
        traced(Reads(), torch.rand(2, 3))


# --- changes in place ------------------------------------------------------------------------------------------


class AddsInPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y += x
        y.mul_(3)
        return y + 1


class ReadsBeforeAndAfter(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        before = y.sum(-1, keepdim=True)
        y.sub_(before)
        return y + before


class ChangesIntegers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.new_ones(x.shape, dtype=torch.float16)
        y.add_(x)
        y //= 4.0
        return y


class FillsMask(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y.masked_fill_(x > 0.5, -1.0)
        return y


@pytest.mark.parametrize("kind", [AddsInPlace, ReadsBeforeAndAfter, ChangesIntegers, FillsMask])
def test_changes_of_a_fresh_tensor_become_functional(kind: type[nn.Module]) -> None:
    model = kind()
    program = traced(model, torch.rand(3, 4))
    assert not any(
        getattr(node.target, "_schema", None) and node.target._schema.is_mutable for node in program.graph.nodes
    )
    assert_equals(program, model, torch.rand(3, 4))
    assert_equals(program, model, torch.rand(5, 2))


class ChangesView(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y[:, 0].zero_()
        return y


class ChangesViewed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        view = y.t()
        y.add_(1)
        return view + 0


class ChangesViewOfView(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        early, column = y[1:], y.transpose(0, 1)[0]
        y[1:][0, 1:].copy_(x[0, 1:])
        y[..., :2] = 7
        return y.sum() + early * column[1:, None]


class ChangesResultOfChange(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        z = y.add_(1)
        z.mul_(y)
        return y + 0 * z


class ChangesViewThatAloneIsRead(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = (x * 2).reshape(-1)
        y *= 3
        return y


class FillsEmpty(nn.Module):
    """As multi-head latent attention joins its keys."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.new_empty(x.shape[0], x.shape[1] + 1)
        y[:, :-1] = x
        y[:, -1:] = x[:, :1].double()
        return y


VIEWS = [ChangesView, ChangesViewed, ChangesViewOfView, ChangesResultOfChange, ChangesViewThatAloneIsRead, FillsEmpty]


@pytest.mark.parametrize("kind", VIEWS)
def test_changes_of_views_reach_the_tensor_and_its_other_views(kind: type[nn.Module]) -> None:
    model = kind()
    program = traced(model, torch.rand(4, 3))
    assert_equals(program, model, torch.rand(4, 3))
    assert_equals(program, model, torch.rand(5, 6))


class ChangesInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x += 1
        return x * 2


class ChangesBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return x + self.count


class ChangesPartOfSplit(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        first, _ = y.split(2)
        first.zero_()
        return y


class ChangesWhatReshapeMayShow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        flat = y.reshape(-1)
        y.add_(1)
        return flat + 0


REFUSED = [ChangesInput, ChangesBuffer, ChangesPartOfSplit, ChangesWhatReshapeMayShow]


@pytest.mark.parametrize("kind", REFUSED)
def test_changes_that_others_could_see_are_refused_with_the_line(kind: type[nn.Module]) -> None:
    with pytest.raises(TraceError, match=r"in place \(test_trace\.py:\d+: .*write it without aten") as caught:
        traced(kind(), torch.rand(3, 4))
    assert "\n" not in str(caught.value)


class Resizes(nn.Module):
    """As detection models bring a mask to the size of their features."""

    def forward(self, mask: Tensor, features: Tensor) -> Tensor:
        return nn.functional.interpolate(mask[None], size=features.shape[-2:])[0]


def test_resizing_to_the_size_of_another_input() -> None:
    model = Resizes()
    assert_equals(
        traced(model, torch.rand(2, 6, 6), torch.rand(2, 3, 4)), model, torch.rand(3, 8, 8), torch.rand(3, 5, 2)
    )


class AtLeastTwo(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.std(0) if x.shape[0] > 1 else x[5]


def test_the_bound_stays_where_the_model_itself_fails() -> None:
    model, example = AtLeastTwo(), torch.rand(3, 4)
    program = admit_ones(traced(model, example), model, [example])
    sizes = program.signature.inputs[0].shape
    assert [program.signature.ranges[size][0] for size in sizes if isinstance(size, str)] == [2, 1]


# --- names -----------------------------------------------------------------------------------------------------

EVIL = 'x"), __import__("pathlib").Path("{}").touch() or getattr(self, "weight'


class Named(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.register_parameter(name, nn.Parameter(torch.ones(3)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self._parameters[self.name]


def test_a_name_that_is_code_is_refused_and_not_run(tmp_path: Path) -> None:
    name = EVIL.format(str(tmp_path / "made").replace(".", "_"))
    model = nn.Module()
    with pytest.raises((InputError, KeyError)):
        model = Named(name.replace(".", ""))
        traced(model, torch.rand(2, 3))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ['a"', "a'b", "a(b", "a)b", "a\\b", "a\nb"])
def test_a_name_that_could_leave_its_quotes_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"of a weight or module cannot be used in a graph; rename it"):
        traced(Named(name), torch.rand(2, 3))


@pytest.mark.parametrize("name", ["a-b", "a b", "1", "ä", "a[0]", "a;b", "#"])
def test_another_name_becomes_an_identifier(name: str) -> None:
    model = Named(name)
    program = traced(model, torch.rand(2, 3))
    (weight,) = [str(node.target) for node in program.graph.nodes if node.op == "get_attr"]
    assert weight.isidentifier() and weight.isascii()
    assert_equals(program, model, torch.rand(4, 3))


class Keyed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"a-b": nn.Linear(3, 3), "a_b": nn.Linear(3, 3), "a b": nn.Linear(3, 3)})

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts.values():
            x = part(x)
        return x


def test_names_that_become_the_same_identifier_stay_apart() -> None:
    model = Keyed()
    program = traced(model, torch.rand(2, 3))
    assert len(list(program.module.parameters())) == 6
    assert_equals(program, model, torch.rand(4, 3))


class TakesAnything(nn.Module):
    def forward(self, **named: Tensor) -> Tensor:
        return sum(named.values())  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["x): import os #", "a b", "a-b", "1"])
def test_an_input_name_that_is_no_identifier_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="is no identifier; rename it"):
        traced(TakesAnything(), **{name: torch.rand(2)})


class TakesKeyword(nn.Module):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return sum(batch.values())  # type: ignore[return-value]


def test_keys_of_a_nested_input_never_reach_code(tmp_path: Path) -> None:
    keys = ["a-b", "class", EVIL.format(tmp_path / "made")]
    model = TakesKeyword()
    program = traced(model, {key: torch.rand(2, 3) for key in keys})
    assert all(tensor.name.isidentifier() for tensor in program.signature.inputs)
    assert EVIL[:8] not in program.module.code and list(tmp_path.iterdir()) == []
    given = {key: torch.rand(4, 3) for key in keys}
    assert torch.allclose(program(given), model(given))


# --- examples --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("example", [3, "text", {1, 2}, torch.rand(2)])
def test_an_example_of_another_kind(example: Any) -> None:
    with pytest.raises(InputError, match="example_inputs must be a dict of named or a tuple of positional inputs"):
        bind_example(tiny.encoder(), example)


@pytest.mark.parametrize("example", [{"idds": torch.ones(2, 3)}, {}, (1, 2, 3), ()])
def test_an_example_that_does_not_fit_forward(example: Any) -> None:
    with pytest.raises(InputError, match=r"the example inputs do not fit Encoder\.forward"):
        bind_example(tiny.encoder(), example)


def test_an_example_without_a_tensor() -> None:
    with pytest.raises(InputError, match="hold no tensor"):
        bind_example(tiny.encoder(), {"ids": [[1, 2]]})


def test_positional_examples_are_named() -> None:
    given = tiny.inputs()
    args, kwargs = bind_example(tiny.encoder(), tuple(given.values()))
    assert args == () and list(kwargs) == ["ids", "mask"]


# --- the program -----------------------------------------------------------------------------------------------


def test_batch_and_length_are_dynamic() -> None:
    program = traced(tiny.encoder(), **tiny.inputs())
    assert [tensor.shape for tensor in program.signature.inputs] == [("d0", "d1"), ("d0", "d1")]


def test_ranges_reach_one_where_the_graph_is_right_there() -> None:
    model = tiny.encoder()
    program = traced(model, **tiny.inputs())
    assert {low for low, _ in program.signature.ranges.values()} == {2}
    widened = admit_ones(program, model, list(tiny.inputs().values()))
    assert {low for low, _ in widened.signature.ranges.values()} == {1}
    assert {low for low, _ in program.signature.ranges.values()} == {2}


class WrongAtOne(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.shape[0] != 1 else x - 1


def test_ranges_stay_where_the_graph_is_wrong_at_one() -> None:
    model = WrongAtOne().eval()
    x = torch.rand(4, 3)
    program = admit_ones(traced(model, x), model, [x])
    assert program.signature.ranges[str(program.signature.inputs[0].shape[0])][0] == 2
    with pytest.raises(InputError, match="axis 0 of input 'x' is 1, the traced program is valid for at least 2"):
        program(torch.rand(1, 3))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


class Equal(Tied):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = nn.Parameter(self.embed.weight.detach().clone())


@pytest.mark.parametrize(("kind", "count"), [(Tied, 1), (Equal, 2)])
def test_weights_are_tied_by_identity(kind: type[nn.Module], count: int) -> None:
    assert len(list(traced(kind(), torch.ones(2, 3, dtype=torch.long)).module.parameters())) == count


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        whole = torch.rand(8)
        self.register_buffer("a", whole[:4])
        self.register_buffer("b", whole[:4])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.a + self.b


def test_weights_that_share_memory_are_not_tied() -> None:
    program = traced(Halves(), torch.rand(2, 4))
    assert len(list(program.module.buffers())) == 2


def test_a_size_that_is_fixed_later_is_a_number_throughout() -> None:
    class Late(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.reshape(x.shape[0], x.shape[1] * 3)
            return y if x.shape[1] == 4 else -y

    program = traced(Late(), torch.rand(2, 4, 3))
    reads = [node.args for node in program.graph.nodes if node.target is torch.ops.aten.sym_size.int]
    assert all(axis == 0 for _, axis in reads)
    assert_equals(program, Late(), torch.rand(5, 4, 3))


def test_dropout_in_evaluation_mode_is_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.9))
    program = traced(model, torch.rand(2, 3))
    assert_equals(program, model, torch.rand(4, 3))


def test_errors_are_fxpress_errors() -> None:
    assert issubclass(TraceError, FxpressError) and issubclass(InputError, ValueError)


@pytest.mark.parametrize("name", ["class", "graph"])
def test_a_name_that_means_something_in_a_graph_is_refused(name: str) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_parameter(name, nn.Parameter(torch.ones(3)))

        def forward(self, x: Tensor) -> Tensor:
            return x * getattr(self, name)

    with pytest.raises(InputError, match="has a meaning of its own"):
        trace(Named().eval(), ((), {"x": torch.randn(2, 3)}))


def test_an_axis_that_the_trace_fixes_is_a_number_in_the_signature() -> None:
    model = nn.Sequential(nn.Linear(8, 4)).eval()
    program = trace(model, bind_example(model, (torch.randn(2, 5, 8),)))
    assert program.signature.inputs[0].shape[-1] == 8
    with pytest.raises(InputError, match="must be 8, found 7"):
        program(torch.randn(2, 5, 7))


# --- masks of mask functions -----------------------------------------------------------------------------------


class MaskFunction(nn.Module):
    """The mask of a mask function of the model's own, as transformers makes it: by torch.vmap."""

    def forward(self, padding: Tensor) -> Tensor:
        from transformers import masking_utils

        def allowed(batch: Any, head: Any, row: Any, column: Any) -> Any:
            return (column <= row + 2) & padding[batch, column]

        places = [torch.arange(size) for size in (padding.shape[0], 1, padding.shape[1], padding.shape[1])]
        with masking_utils.TransformGetItemToIndex():
            mask: Tensor = masking_utils._vmap_expansion_sdpa(allowed)(*places)
        return mask


def test_masks_of_mask_functions_are_traced_by_broadcasting() -> None:
    masking = pytest.importorskip("transformers.masking_utils")
    usual = masking._vmap_expansion_sdpa
    model = MaskFunction().eval()
    program = trace(model, bind_example(model, (torch.rand(2, 5) > 0.3,)))
    assert masking._vmap_expansion_sdpa is usual
    for batch, length in ((2, 5), (3, 8)):
        padding = torch.rand(batch, length) > 0.3
        assert torch.equal(program.run([padding])[0], model(padding))


def test_an_input_may_be_called_as_what_the_graph_calls() -> None:
    class Named(nn.Module):
        def forward(self, torch: Tensor, device: Tensor, inf: Tensor) -> Tensor:
            return torch @ device + inf

    given = {"torch": torch.randn(2, 3), "device": torch.randn(3, 2), "inf": torch.randn(2)}
    traced = trace(Named().eval(), ((), given))
    assert torch.equal(traced(**given), Named()(**given))
