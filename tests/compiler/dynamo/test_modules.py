"""Small modules under torch.compile(backend="fxpress"), equal to themselves: what real code does around a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import dynamo
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxpress


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    with dynamo.fresh():
        yield


class Of(nn.Module):
    """A module of parts and a function of them."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, part in parts.items():
            made = part() if callable(part) and not isinstance(part, nn.Module) else part
            if isinstance(made, Tensor) and not isinstance(made, nn.Parameter):
                self.register_buffer(name, made)
            else:
                setattr(self, name, made)
        self.function = function
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def x(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(sizes or (3, 8), generator=torch.Generator().manual_seed(seed + sum(sizes)))


def up() -> nn.Module:
    return nn.Linear(8, 16)


def down() -> nn.Module:
    return nn.Linear(16, 8)


def norm() -> nn.Module:
    return nn.LayerNorm(8)


def encoder(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu", **settings)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


@dataclass
class Case:
    """A module, the arguments of its calls, who should run its graphs, and how many there should be."""

    model: Callable[[], Any]
    calls: list[tuple[Any, ...]]
    graphs: int | None = 1
    reason: str = ""  # of one that PyTorch runs
    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    rewrites: str = ""  # a rule that has to have rewritten


def check(case: Case) -> None:
    reports = dynamo.assert_equal(case.model(), *case.calls, options=case.options, **case.settings)
    assert case.graphs is None or len(reports) == case.graphs, str(reports)
    reasons = [report.reason for report in reports if report.runner == "pytorch"]
    if case.reason:
        assert any(case.reason in reason for reason in reasons), str(reports)
    else:
        assert not reasons
    if case.rewrites:
        assert any(case.rewrites in report.rewrites for report in reports), str(reports)


# --- ordinary modules ------------------------------------------------------------------------------------------------

ORDINARY = {
    "linear": Case(lambda: nn.Linear(8, 4), [(x(),)]),
    "feed forward": Case(
        lambda: Of(lambda m, v: m.down(F.gelu(m.up(v))), up=up, down=down), [(x(),)], rewrites="linear_gelu"
    ),
    "residual norm": Case(
        lambda: Of(lambda m, v: m.norm(v + m.down(F.relu(m.up(v)))), up=up, down=down, norm=norm),
        [(x(2, 3, 8),)],
        rewrites="add_layer_norm",
    ),
    "spelled rms norm": Case(
        lambda: Of(
            lambda m, v: m.weight * (v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + 1e-6)),
            weight=lambda: nn.Parameter(torch.rand(8)),
        ),
        [(x(),)],
        rewrites="rms_norm",
    ),
    "attention": Case(
        lambda: Of(lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3)),
        [(x(1, 2, 5, 4), x(1, 2, 5, 4, seed=1), x(1, 2, 5, 4, seed=2))],
    ),
    "causal attention": Case(
        lambda: Of(lambda m, q: F.scaled_dot_product_attention(q, q, q, is_causal=True)), [(x(1, 2, 5, 4),)]
    ),
    "spelled attention": Case(
        lambda: Of(lambda m, q: torch.softmax(q @ q.transpose(-1, -2) / 2, -1) @ q), [(x(1, 2, 5, 4),)]
    ),
    "masked attention": Case(
        lambda: Of(lambda m, q, keep: F.scaled_dot_product_attention(q, q, q, keep[:, None, None, :])),
        [(x(2, 2, 5, 4), torch.tensor([[True] * 5, [True] * 3 + [False] * 2]))],
    ),
    "embedding": Case(
        lambda: Of(lambda m, i: m.norm(m.table(i)), table=lambda: nn.Embedding(9, 8), norm=norm),
        [(torch.arange(6).view(2, 3),)],
    ),
    "multi head": Case(
        lambda: Of(lambda m, v: m.attend(v, v, v, need_weights=False)[0],
                   attend=lambda: nn.MultiheadAttention(8, 2, batch_first=True)),
        [(x(2, 5, 8),)],
    ),
    "transformer layer": Case(lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), [(x(2, 5, 8),)]),
    "encoder of layers": Case(lambda: encoder(), [(x(2, 5, 8),)], rewrites="attention"),
    "encoder of layers, norms first": Case(lambda: encoder(norm_first=True), [(x(2, 5, 8),)], rewrites="attention"),
    "encoder layer with a mask": Case(
        lambda: Of(lambda m, v, keep: m.layer(v, src_key_padding_mask=~keep),
                   layer=lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)),
        [(x(2, 5, 8), torch.tensor([[True] * 5, [True] * 3 + [False] * 2]))],
        rewrites="attention",
    ),
    "encoder layer with a causal mask": Case(
        lambda: Of(lambda m, v: m.layer(v, torch.ones(5, 5).triu(1).bool()),
                   layer=lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)),
        [(x(2, 5, 8),)],
        rewrites="attention",
    ),
    "multi head with weights": Case(
        lambda: Of(lambda m, v: m.attend(v, v, v), attend=lambda: nn.MultiheadAttention(8, 2, batch_first=True)),
        [(x(2, 5, 8),)],
    ),
    "convolution": Case(
        lambda: Of(lambda m, v: F.relu(m.norm(m.conv(v))), conv=lambda: nn.Conv2d(3, 4, 3),
                   norm=lambda: nn.BatchNorm2d(4)),
        [(x(2, 3, 6, 6),)],
    ),
    "lstm, which dynamo leaves alone": Case(
        lambda: Of(lambda m, v: m.rnn(v)[0], rnn=lambda: nn.LSTM(8, 4, batch_first=True)), [(x(2, 5, 8),)], graphs=0
    ),
    "evaluated dropout": Case(
        lambda: Of(lambda m, v: m.drop(m.up(v)), up=up, drop=lambda: nn.Dropout(0.5)), [(x(),)]
    ),
    "integers": Case(lambda: Of(lambda m, i: (i // 2 + i % 3) * 2), [(torch.arange(12).view(3, 4),)]),
    "bools": Case(lambda: Of(lambda m, v: (v > 0) & (v < 1)), [(x(),)]),
    "half": Case(lambda: Of(lambda m, v: v * 2 + 1), [(x().half(),)]),
    "bfloat16": Case(lambda: Of(lambda m, v: m.up(v), up=up).bfloat16(), [(x().bfloat16(),)]),
    "float64": Case(lambda: Of(lambda m, v: m.up(v), up=up).double(), [(x().double(),)]),
    "mixed dtypes": Case(lambda: Of(lambda m, v, i: m.up(v * i) + 1.5, up=up), [(x(), torch.arange(8))]),
    "einsum": Case(lambda: Of(lambda m, v: torch.einsum("bij,bkj->bik", v, v)), [(x(2, 3, 4),)]),
    "constants made within": Case(
        lambda: Of(lambda m, v: m.up(v + torch.arange(8) * torch.tensor(0.5)), up=up), [(x(),)]
    ),
    "empty": Case(lambda: Of(lambda m, v: m.up(v), up=up), [(torch.zeros(0, 8),)]),
    "nan and infinity": Case(
        lambda: Of(lambda m, v: torch.softmax(v, -1) * 2), [(torch.tensor([[1.0, float("nan")], [-torch.inf, 2.0]]),)]
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ORDINARY.values(), ids=ORDINARY)
def test_ordinary(case: Case) -> None:
    check(case)


# --- graph breaks, several graphs, control flow ----------------------------------------------------------------------


def broken(m: Any, v: Tensor) -> Tensor:
    v = F.gelu(m.up(v))
    torch._dynamo.graph_break()
    return m.down(v)


def broken_twice(m: Any, v: Tensor) -> Tensor:
    v = m.up(v)
    torch._dynamo.graph_break()
    v = m.down(v)
    torch._dynamo.graph_break()
    return m.norm(v)


def by_value(m: Any, v: Tensor) -> Tensor:
    v = m.up(v)
    if v.sum() > 1e6:
        v = v * 2
    return m.down(v)


def loop_with_break(m: Any, v: Tensor) -> Tensor:
    for _ in range(2):
        v = m.down(m.up(v))
        torch._dynamo.graph_break()
    return v


def python_list(m: Any, v: Tensor) -> Any:
    found = []
    for size in range(3):
        found.append(m.up(v) * size)
    return torch.stack(found).tolist()


@torch._dynamo.disable
def outside(v: Tensor) -> Tensor:
    return v * 2


BREAKS = {
    "one break": Case(lambda: Of(broken, up=up, down=down), [(x(),)], graphs=2),
    "two breaks": Case(lambda: Of(broken_twice, up=up, down=down, norm=norm), [(x(),)], graphs=3),
    "branch on values": Case(lambda: Of(by_value, up=up, down=down), [(x(),)], graphs=2),
    "break in a loop": Case(lambda: Of(loop_with_break, up=up, down=down), [(x(),)], graphs=None),
    "tolist": Case(lambda: Of(python_list, up=up), [(x(),)], graphs=None),
    "disabled function": Case(lambda: Of(lambda m, v: m.down(outside(m.up(v))), up=up, down=down), [(x(),)], graphs=2),
    "item": Case(lambda: Of(lambda m, v: m.up(v) * v.sum().item(), up=up), [(x(),)], graphs=None),
    "branch on a size": Case(
        lambda: Of(lambda m, v: m.up(v) if v.shape[0] > 2 else m.up(v) * 2, up=up), [(x(3, 8),), (x(2, 8),)], graphs=2
    ),
    "branch on a flag": Case(
        lambda: Of(lambda m, v, flag: m.up(v) if flag else m.up(v) * 2, up=up), [(x(), True), (x(), False)], graphs=2
    ),
    "full graph": Case(
        lambda: Of(lambda m, v: m.down(m.up(v)), up=up, down=down), [(x(),)], settings={"fullgraph": True}
    ),
    "cond": Case(
        lambda: Of(lambda m, v: torch.cond(v.sum() > 0, lambda u: u * 2, lambda u: u + 1, (v,))),
        [(x(),), (-x().abs(),)],
    ),
    "cond of layers": Case(
        lambda: Of(lambda m, v: torch.cond(v.sum() > 0, lambda u: m.up(u), lambda u: m.up(u) * 2, (F.gelu(m.part(v)),)),
                   up=up, part=lambda: nn.Linear(8, 8)),
        [(x(),), (-x().abs(),)],
        rewrites="linear_gelu",
    ),
    "cond that draws": Case(
        lambda: Of(lambda m, v: torch.cond(v.sum() > 1e9, lambda u: torch.rand_like(u), lambda u: u + 1, (v,))),
        [(x(),)],
        reason="draws random numbers",
    ),
    "scan": Case(
        lambda: Of(lambda m, v: torch._higher_order_ops.associative_scan(torch.add, v, 0, combine_mode="generic")),
        [(x(),)],
    ),
    "checkpoint": Case(
        lambda: Of(lambda m, v: checkpoint(m.up, v, use_reentrant=False), up=up), [(x(),)],
        reason="higher-order operator tag_activation_checkpoint",
    ),
    "while loop": Case(
        lambda: Of(lambda m, v: torch.while_loop(
            lambda i, u: i < 3, lambda i, u: (i + 1, u * 2), (torch.tensor(0), v))[1]),
        [(x(),)],
    ),
    "vmap": Case(lambda: Of(lambda m, v: torch.func.vmap(lambda u: F.gelu(u) * 2)(v)), [(x(),)]),
    "vmap of a weight": Case(lambda: Of(lambda m, v: torch.func.vmap(m.up)(v), up=up), [(x(),)]),
    "gradient by torch.func": Case(
        lambda: Of(lambda m, v: torch.func.grad(lambda u: F.gelu(m.up(u)).sum())(v), up=up), [(x(),)]
    ),
    "jvp": Case(lambda: Of(lambda m, v: torch.func.jvp(lambda u: F.gelu(m.up(u)), (v,), (v,)), up=up), [(x(),)]),
    "jacobian": Case(
        lambda: Of(lambda m, v: torch.func.jacrev(lambda u: F.gelu(m.up(u)).sum(0))(v), up=up), [(x(),)]
    ),
    "nested modules": Case(
        lambda: nn.Sequential(nn.Sequential(up(), nn.GELU()), nn.ModuleList([down()])[0], norm()).eval(), [(x(),)]
    ),
    "one module twice": Case(lambda: Of(lambda m, v: m.part(m.part(v)), part=lambda: nn.Linear(8, 8)), [(x(),)]),
    "module dict": Case(
        lambda: Of(lambda m, v: sum(part(v) for part in m.parts.values()),
                   parts=lambda: nn.ModuleDict({"a": up(), "b": up()})),
        [(x(),)],
    ),
    "hook": Case(lambda: hooked(), [(x(),)]),
    "closure": Case(lambda: Of(lambda m, v: scaled_by(3)(m.up(v)), up=up), [(x(),)]),
    "generator": Case(lambda: Of(lambda m, v: sum(part for part in (m.up(v), m.up(v) * 2)), up=up), [(x(),)]),
}  # fmt: skip


def scaled_by(number: float) -> Callable[[Tensor], Tensor]:
    return lambda v: v * number


def double_output(module: Any, args: Any, result: Tensor) -> Tensor:
    return result * 2


def hooked() -> nn.Module:
    model = Of(lambda m, v: m.up(v), up=up)
    model.up.register_forward_hook(double_output)  # type: ignore[union-attr, operator]
    return model


# torch's decompositions for forward-mode gradients are scripts
@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("case", BREAKS.values(), ids=BREAKS)
def test_breaks_and_control_flow(case: Case) -> None:
    check(case)


# --- sizes -----------------------------------------------------------------------------------------------------------


def marked(*axes: int) -> Callable[[Tensor], Tensor]:
    def mark(v: Tensor) -> Tensor:
        for axis in axes:
            torch._dynamo.mark_dynamic(v, axis)
        return v

    return mark


BLOCK = {"up": up, "down": down, "norm": norm}
SIZES = {
    "batch": Case(
        lambda: Of(lambda m, v: m.norm(v + m.down(m.up(v))), **BLOCK), [(x(n, 8),) for n in (2, 3, 5)], graphs=2
    ),
    "length": Case(
        lambda: Of(lambda m, v: F.scaled_dot_product_attention(v, v, v)), [(x(2, 2, n, 4),) for n in (4, 5, 7)],
        graphs=2,
    ),
    "batch and length": Case(
        lambda: Of(lambda m, v: m.up(v), up=up), [(x(2, 3, 8),), (x(4, 5, 8),), (x(6, 2, 8),)], graphs=2
    ),
    "dynamic at once": Case(
        lambda: Of(lambda m, v: m.up(v), up=up), [(x(n, 8),) for n in (2, 3, 5)], settings={"dynamic": True}
    ),
    "never dynamic": Case(
        lambda: Of(lambda m, v: m.up(v), up=up), [(x(n, 8),) for n in (2, 3)], graphs=2, settings={"dynamic": False}
    ),
    "one": Case(lambda: Of(lambda m, v: m.up(v), up=up), [(x(2, 8),), (x(1, 8),), (x(3, 8),)], graphs=None),
    "view by size": Case(
        lambda: Of(lambda m, v: m.up(v.view(v.shape[0] * v.shape[1], 8)), up=up), [(x(2, n, 8),) for n in (3, 4, 5)],
        graphs=2,
    ),
    "number as input": Case(
        lambda: Of(lambda m, v, n: m.up(v) * n, up=up), [(x(), 2), (x(), 5), (x(), 9)], graphs=2
    ),
    "number as size": Case(
        lambda: Of(lambda m, v, n: m.up(v)[:, :n] + torch.arange(n), up=up), [(x(), 2), (x(), 5), (x(), 9)], graphs=2
    ),
    "negative number": Case(
        lambda: Of(lambda m, v, n: m.up(v) * n, up=up), [(x(), 2), (x(), 5), (x(), -3)], graphs=3,
        reason="a negative number",
    ),
    "float as input": Case(
        lambda: Of(lambda m, v, n: m.up(v) * n, up=up), [(x(), 0.5), (x(), 0.25), (x(), 1.5)], graphs=2,
        reason=".item()",
    ),
    "split by size": Case(
        lambda: Of(lambda m, v: torch.cat([part * 2 for part in m.up(v).chunk(2, -1)], -1), up=up),
        [(x(n, 8),) for n in (2, 3, 5)],
        graphs=2,
    ),
    "size in the arithmetic": Case(
        lambda: Of(lambda m, v: m.up(v).sum(0) / v.shape[0], up=up), [(x(n, 8),) for n in (2, 3, 5)], graphs=2
    ),
    "mask by size": Case(
        lambda: Of(lambda m, v: F.scaled_dot_product_attention(
            v, v, v, torch.ones(v.shape[2], v.shape[2], dtype=torch.bool).tril())),
        [(x(2, 2, n, 4),) for n in (4, 5, 7)],
        graphs=2,
    ),
    "two of one size": Case(
        lambda: Of(lambda m, v, w: m.up(v) + m.up(w), up=up), [(x(n, 8), x(n, 8, seed=1)) for n in (2, 3, 5)], graphs=2
    ),
    "two sizes": Case(
        lambda: Of(lambda m, v, w: m.up(v) @ m.up(w).T, up=up), [(x(n, 8), x(n + 1, 8)) for n in (2, 3, 5)], graphs=2
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SIZES.values(), ids=SIZES)
def test_sizes(case: Case) -> None:
    check(case)


def test_marked_dynamic_is_one_graph() -> None:
    model = Of(lambda m, v: m.down(m.up(v)), up=up, down=down)
    compiled = torch.compile(model, backend="fxpress", options={"backend": "eager"})
    with torch.no_grad():
        for size in (4, 3, 6):
            given = marked(0)(x(size, 8))
            torch.testing.assert_close(compiled(given), model(given))
    (report,) = fxpress.reports()
    assert report.calls == 3
    assert "s" in report.inputs[0]


# --- what comes back -------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


OUTPUTS = {
    "tuple": Case(lambda: Of(lambda m, v: (m.up(v), m.up(v) * 2), up=up), [(x(),)]),
    "named tuple": Case(lambda: Of(lambda m, v: Pair(m.up(v), m.up(v) + 1), up=up), [(x(),)]),
    "dictionary": Case(lambda: Of(lambda m, v: {"a": m.up(v), "b": [m.up(v).sum()]}, up=up), [(x(),)]),
    "none and numbers": Case(lambda: Of(lambda m, v: (m.up(v), None, 3, "text"), up=up), [(x(),)]),
    "a size": Case(
        lambda: Of(lambda m, v: (m.up(v), v.shape[0] * 2), up=up), [(x(n, 8),) for n in (2, 3, 5)], graphs=2
    ),
    "one twice": Case(lambda: Of(lambda m, v: (y := m.up(v), y), up=up), [(x(),)]),
    "views of one": Case(lambda: Of(lambda m, v: (y := m.up(v), y[0], y.t()), up=up), [(x(),)]),
    "view of an input": Case(lambda: Of(lambda m, v: (m.up(v), v[0], v.view(-1)), up=up), [(x(),)]),
    "an input itself": Case(lambda: Of(lambda m, v: (m.up(v), v), up=up), [(x(),)]),
    "a weight itself": Case(lambda: Of(lambda m, v: (m.up(v), m.up.weight), up=up), [(x(),)]),
    "nothing but views": Case(lambda: Of(lambda m, v: v.t()[1:]), [(x(),)], reason="computes nothing"),
    "dropout's input": Case(lambda: Of(lambda m, v: (m.drop(v), v * 2), drop=lambda: nn.Dropout(0.5)), [(x(),)]),
    "reshaped input": Case(lambda: Of(lambda m, v: (v.reshape(4, 6), v * 2)), [(x(),)]),
    "split output": Case(lambda: Of(lambda m, v: m.up(v).chunk(2, -1), up=up), [(x(),)]),
}


@pytest.mark.parametrize("case", OUTPUTS.values(), ids=OUTPUTS)
def test_outputs(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("backend", ["eager", "onnx"])
def test_outputs_have_memory_of_their_own(backend: str) -> None:
    """Passes drop copies and join what is equal; constants are folded."""

    def function(v: Tensor) -> Any:
        return v.clone(), v * 1, v + 2, v + 2, torch.arange(8) * 2, v.contiguous() + 0

    compiled = torch.compile(function, backend="fxpress", options={"backend": backend})
    given = x()
    for _ in range(2):
        found, usual = compiled(given), function(given)
        torch.testing.assert_close(found, usual)
        for value in found:
            value.zero_()
        torch.testing.assert_close(given, x())
    assert fxpress.reports()[0].runner == backend


ONNX = {"backend": "onnx"}
IN_ONNX = {
    "cond": Case(
        lambda: Of(lambda m, v: torch.cond(v.sum() > 0, lambda u: m.up(u), lambda u: m.up(u) * 2, (v,)), up=up),
        [(x(),), (-x().abs(),)],
        options=ONNX,
    ),
    "sizes and views": Case(
        lambda: Of(lambda m, v: (y := m.up(v), y[0], v.shape[0] * 2, v[1]), up=up),
        [(x(n, 8),) for n in (2, 3, 5)],
        graphs=2,
        options=ONNX,
    ),
    "number as size": Case(
        lambda: Of(lambda m, v, n: m.up(v)[:, :n] + torch.arange(n), up=up),
        [(x(), 2), (x(), 5), (x(), 9)],
        graphs=2,
        options=ONNX,
    ),
    "transposed inputs": Case(lambda: Of(lambda m, v: m.up(v), up=up), [(x(8, 3).t(),)], options=ONNX),
    "empty": Case(lambda: Of(lambda m, v: m.up(v), up=up), [(torch.zeros(0, 8),)], options=ONNX),
    "bool, half and integers": Case(
        lambda: Of(lambda m, v, i: (v > 0, v.half() * 2, i + 1, None)), [(x(), torch.arange(8))], options=ONNX
    ),
    "random": Case(
        lambda: Of(lambda m, v: m.up(v) + torch.rand(3, 16) * 0, up=up), [(x(),)], options=ONNX, reason="random numbers"
    ),
    "bfloat16": Case(
        lambda: Of(lambda m, v: m.up(v), up=up).bfloat16(), [(x().bfloat16(),)], options=ONNX, reason="no bfloat16"
    ),
}


@pytest.mark.parametrize("case", IN_ONNX.values(), ids=IN_ONNX)
def test_in_onnx_runtime(case: Case) -> None:
    check(case)


def test_a_view_of_an_input_shares_its_memory() -> None:
    compiled = torch.compile(lambda v: (v[1], v * 2), backend="fxpress", options={"backend": "eager"})
    given = x()
    view, _ = compiled(given)
    view.zero_()
    assert given[1].abs().sum() == 0


def test_views_of_one_output_share_its_memory() -> None:
    compiled = torch.compile(lambda v: (y := v * 2, y[1]), backend="fxpress", options={"backend": "eager"})
    whole, view = compiled(x())
    view.zero_()
    assert whole[1].abs().sum() == 0
