"""Calls of every fxpress operator that the ONNX backend lowers in several ways: inputs, weights and options of each."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from fxpress.compiler.trace import bind_example, trace
from fxpress.ir.graph import Program
from fxpress.ir.ops.attention import attention
from fxpress.ir.ops.linear import ACTIVATIONS, gated_linear, linear_act, mlp, split_linear
from fxpress.ir.ops.norm import add_layer_norm, add_rms_norm, rms_norm
from fxpress.ir.ops.rotary import rotary

Inputs = dict[str, Tensor]


class Calls(nn.Module):
    """A model of equal calls; `weights` are parameters, everything else is an input."""

    def __init__(self, target: Any, weights: Inputs, options: dict[str, Any], count: int) -> None:
        super().__init__()
        self.target, self.options, self.count = target, options, count
        for name, value in weights.items():
            self.register_parameter(f"weight_{name}", nn.Parameter(value))
        self.names = list(weights)

    def forward(self, inputs: Inputs) -> Any:
        weights = {name: getattr(self, f"weight_{name}") for name in self.names}
        return [self.target(**inputs, **weights, **self.options) for _ in range(self.count)]


@dataclass(frozen=True)
class Case:
    """An operator, its inputs at a batch and length, its weights and other options."""

    name: str
    target: Any
    inputs: Callable[[int, int], Inputs]
    weights: Callable[[], Inputs] = dict
    options: tuple[tuple[str, Any], ...] = ()
    call: Callable[..., Any] | None = None  # computes the operator's arguments from the inputs; None: they are these

    def program(self, count: int = 1) -> Program:
        torch.manual_seed(0)
        model = Calls(self.call or self.target, self.weights(), dict(self.options), count).eval()
        example, other = self.inputs(2, 6), self.inputs(3, 9)
        # Equal sizes are one size, as in a model.
        dims = {2: Dim("batch"), 6: Dim("length", min=2)}
        varying = {
            name: {
                axis: dims.get(tensor.shape[axis], Dim.AUTO)
                for axis, size in enumerate(other[name].shape)
                if size != tensor.shape[axis]
            }
            for name, tensor in example.items()
        }
        return trace(model, bind_example(model, {"inputs": example}), {"inputs": varying})


def heads(batch: int, length: int, keys: int | None = None, groups: int = 4, size: int = 8) -> Inputs:
    torch.manual_seed(batch * 100 + length)
    keys = keys or length
    return {
        "query": torch.randn(batch, 4, length, size),
        "key": torch.randn(batch, groups, keys, size),
        "value": torch.randn(batch, groups, keys, size),
    }


def key_mask(batch: int, keys: int, none: bool = False) -> Tensor:
    mask = torch.ones(batch, keys, dtype=torch.bool)
    mask[-1, keys - keys // 3 :] = False
    mask[0] &= not none
    return mask


def left_padded(batch: int, keys: int) -> Tensor:
    return key_mask(batch, keys).flip(1)


def bool_mask(batch: int, length: int, keys: int, none: bool = False) -> Tensor:
    mask = torch.rand(batch, 1, length, keys) > 0.3
    mask[..., 0] = True
    if none:
        mask[0, :, length // 2] = False
    return mask


def float_mask(batch: int, length: int, keys: int, none: bool = False) -> Tensor:
    shut = ~bool_mask(batch, length, keys, none)
    return torch.randn(batch, 1, length, keys).masked_fill(shut, -math.inf)


def lowest_beside_none(batch: int, length: int) -> Tensor:
    """Rows whose one key has the lowest number: all others are -inf."""
    mask = float_mask(batch, length, length, none=True)
    mask[0, :, length // 2, 0] = torch.finfo(torch.float32).min
    return mask


def case(name: str, inputs: Callable[[int, int], Inputs], **options: Any) -> Case:
    return Case(f"attention, {name}", attention, inputs, options=tuple(options.items()))


def bottom_right(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Sizes as arguments."""
    result: Tensor = attention(query, key, value, left=key.shape[2], right=key.shape[2] - query.shape[2])
    return result


ATTENTIONS = [
    case("no mask", heads),
    case("scale", heads, scale=0.7),
    case("cross lengths", lambda b, n: heads(b, n, 2 * n + 1)),
    case("wide values", lambda b, n: {**heads(b, n), "value": torch.randn(b, 4, n, 12)}),
    case("causal, square", heads, right=0),
    case("causal, more keys", lambda b, n: heads(b, n, 2 * n + 1), right=0),
    case("causal, fewer keys", lambda b, n: heads(b, 2 * n + 1, n), right=0),
    case("grouped heads", lambda b, n: heads(b, n, groups=2)),
    case("grouped heads, key mask", lambda b, n: {**heads(b, n, groups=2), "key_mask": key_mask(b, n)}),
    case("key mask", lambda b, n: {**heads(b, n), "key_mask": key_mask(b, n)}),
    case("key mask without keys", lambda b, n: {**heads(b, n), "key_mask": key_mask(b, n, none=True)}),
    case("key mask, causal", lambda b, n: {**heads(b, n), "key_mask": key_mask(b, n)}, right=0),
    case("bool mask", lambda b, n: {**heads(b, n), "bias": bool_mask(b, n, n)}),
    case("bool mask, empty rows", lambda b, n: {**heads(b, n), "bias": bool_mask(b, n, n, none=True)}),
    case("bool mask, causal", lambda b, n: {**heads(b, n), "bias": bool_mask(b, n, n)}, right=0),
    case("bool mask of rank 2", lambda b, n: {**heads(b, n), "bias": bool_mask(1, n, n)[0, 0]}),
    case("float mask", lambda b, n: {**heads(b, n), "bias": float_mask(b, n, n)}),
    case("float mask, empty rows", lambda b, n: {**heads(b, n), "bias": float_mask(b, n, n, none=True)}),
    case(
        "float mask, rows of the lowest number",
        lambda b, n: {
            **heads(b, n),
            "bias": float_mask(b, n, n, none=True).clamp(min=torch.finfo(torch.float32).min),
        },
    ),
    case(
        "float mask, the lowest number in else empty rows",
        lambda b, n: {**heads(b, n), "bias": lowest_beside_none(b, n)},
    ),
    case("bias of rank 0", lambda b, n: {**heads(b, n), "bias": torch.tensor(-0.5)}, empty="nan"),
    case("float mask, causal", lambda b, n: {**heads(b, n), "bias": float_mask(b, n, n)}, right=0),
    case(
        "float mask, key mask",
        lambda b, n: {**heads(b, n), "bias": float_mask(b, n, n), "key_mask": key_mask(b, n)},
        scale=0.3,
    ),
    case("bias a head, one row", lambda b, n: {**heads(b, n), "bias": torch.randn(1, 4, 1, n)}),
    case("soft cap", heads, softcap=2.0),
    case("soft cap, key mask", lambda b, n: {**heads(b, n), "key_mask": key_mask(b, n)}, softcap=2.0),
    case("sinks", lambda b, n: {**heads(b, n), "sinks": torch.arange(4.0)}),
    case("sinks, causal", lambda b, n: {**heads(b, n, groups=2), "sinks": torch.arange(4.0)}, right=0),
    case(
        "sinks, key mask, causal",
        lambda b, n: {**heads(b, n), "sinks": torch.arange(4.0), "key_mask": key_mask(b, n, none=True)},
        right=0,
    ),
    case("causal, grouped heads", lambda b, n: heads(b, n, groups=2), right=0),
    case("causal, soft cap", lambda b, n: heads(b, n, groups=2), right=0, softcap=2.0),
    case("causal, heads of an odd size", lambda b, n: heads(b, n, groups=2, size=5), right=0),
    case("causal window, heads of an odd size", lambda b, n: heads(b, n, groups=2, size=5), left=2, right=0),
    case("causal window", lambda b, n: heads(b, n, groups=2), left=2, right=0),
    case("causal window of one", heads, left=0, right=0),
    case("causal window, all keys", heads, left=50, right=0),
    case(
        "causal window, key mask", lambda b, n: {**heads(b, n), "key_mask": key_mask(b, n, none=True)}, left=2, right=0
    ),
    *[
        Case(f"attention, causal from the bottom right, {name}", attention, inputs, call=bottom_right)
        for name, inputs in (
            ("more keys", lambda b, n: heads(b, n, 2 * n + 1)),
            ("fewer keys", lambda b, n: heads(b, 2 * n + 1, n, groups=2)),
        )
    ],
    case("window", heads, left=2, right=1),
    case("window without the own place", heads, left=-1, right=3),
    case("window, cross lengths", lambda b, n: heads(b, 2 * n + 1, n), left=1, right=1),
    *[
        case(
            f"{name}, empty rows give {empty}",
            lambda b, n, none=none, groups=groups: {**heads(b, n, groups=groups), **none(b, n)},
            empty=empty,
            **options,
        )
        for empty in ("nan", "mean")
        for groups in (4, 2)
        for name, none, options in (
            (f"key mask, {groups} groups", lambda b, n: {"key_mask": key_mask(b, n, none=True)}, {}),
            (f"key mask, causal, {groups} groups", lambda b, n: {"key_mask": left_padded(b, n)}, {"right": 0}),
            (f"bool mask, causal, {groups} groups", lambda b, n: {"bias": bool_mask(b, n, n, none=True)}, {"right": 0}),
            (
                f"float mask, causal, {groups} groups",
                lambda b, n: {"bias": float_mask(b, n, n, none=True)},
                {"right": 0},
            ),
        )
    ],
    case("key mask, causal, left padded", lambda b, n: {**heads(b, n), "key_mask": left_padded(b, n)}, right=0),
    case("negative scale", heads, scale=-0.7),
    case("no scale", heads, scale=0.0),
]


def rows(batch: int, length: int) -> Inputs:
    torch.manual_seed(batch * 100 + length)
    return {"input": torch.randn(batch, length, 16)}


def two_rows(batch: int, length: int) -> Inputs:
    return {**rows(batch, length), "residual": torch.randn(batch, length, 16)}


def vectors(*names: str) -> Callable[[], Inputs]:
    return lambda: {name: torch.randn(16) for name in names}


def linear(out: int, bias: bool = True) -> Callable[[], Inputs]:
    return lambda: {"weight": torch.randn(out, 16)} | ({"bias": torch.randn(out)} if bias else {})


def gates(bias: str) -> Callable[[], Inputs]:
    """The weights of a gated linear layer, and the biases named in `bias`."""
    return lambda: (
        {"gate_weight": torch.randn(24, 16), "up_weight": torch.randn(24, 16)}
        | {name: torch.randn(24) for name in bias.split()}
    )


def wide_rows(batch: int, length: int) -> Inputs:
    """Rows of 1024 numbers: 4096 bytes."""
    torch.manual_seed(batch * 100 + length)
    return {"input": torch.randn(batch, length, 1024)}


def wide_weights(names: str) -> Callable[[], Inputs]:
    """Weights [8, 1024] and biases [8]."""
    return lambda: {name: torch.randn(*((8,) if "bias" in name else (8, 1024))) for name in names.split()}


def block(hidden: int, names: str) -> Callable[[], Inputs]:
    """The weights of a feed-forward block of 16 columns, those in `names`."""
    shapes = {"down_weight": (16, hidden), "down_bias": (16,), "up_bias": (hidden,), "gate_bias": (hidden,)}
    return lambda: {name: torch.randn(shapes.get(name, (hidden, 16))) for name in names.split()}


def no_bias(*names: str) -> tuple[tuple[str, Any], ...]:
    return tuple((name, None) for name in names)


def turned(target: Any, columns: int, interleaved: bool, batch_angles: bool = True) -> Callable[..., Any]:
    """`rotary` of angles that are computed in the program, one a pair, different in each row of the batch."""

    def call(input: Tensor, angles: Tensor) -> Tensor:
        angles = angles if batch_angles else angles[:1]
        wide = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
        return target(input, wide.cos().unsqueeze(1), wide.sin().unsqueeze(1), interleaved)

    return call


def angled(columns: int) -> Callable[[int, int], Inputs]:
    return lambda b, n: {"input": torch.randn(b, 4, n, 8), "angles": torch.randn(b, n, columns // 2)}


def free_angles(batch: int, length: int) -> Inputs:
    """cos and sin as inputs: nothing is known of them."""
    given = {name: torch.randn(batch, 1, length, 8) for name in ("cos", "sin")}
    return {"input": torch.randn(batch, 4, length, 8), **given}


ROTARIES = [
    Case(f"rotary, {columns} of 8 columns{kind}{rows}", rotary, angled(columns),
         call=turned(rotary, columns, bool(kind), not rows))
    for columns in (8, 4)
    for kind in ("", ", interleaved")
    for rows in ("", ", one row of angles")
]  # fmt: skip
OTHERS = [
    *ROTARIES,
    Case("rotary, any angles", rotary, free_angles),
    Case("gated_linear", gated_linear, rows, gates("gate_bias up_bias"), (("activation", "silu"),)),
    Case(
        "gated_linear, no bias",
        gated_linear,
        rows,
        gates(""),
        (*no_bias("gate_bias", "up_bias"), ("activation", "gelu_tanh")),
    ),
    Case(
        "gated_linear, one bias", gated_linear, rows, gates("up_bias"), (*no_bias("gate_bias"), ("activation", "relu"))
    ),
    Case("rms_norm, no weight", rms_norm, rows, options=(("weight", None), ("eps", 1e-5))),
    Case("add_rms_norm, no weight", add_rms_norm, two_rows, options=(("weight", None), ("eps", 1e-5))),
    Case("add_layer_norm, no bias", add_layer_norm, two_rows, vectors("weight"), (("bias", None), ("eps", 1e-5))),
    Case("add_layer_norm, no weight", add_layer_norm, two_rows, vectors("bias"), (("weight", None), ("eps", 1e-5))),
    Case("rms_norm", rms_norm, rows, vectors("weight"), (("eps", 1e-5),)),
    Case("rms_norm, large eps", rms_norm, rows, vectors("weight"), (("eps", 0.3),)),
    Case("add_rms_norm", add_rms_norm, two_rows, vectors("weight"), (("eps", 1e-6),)),
    Case("add_rms_norm, large eps", add_rms_norm, two_rows, vectors("weight"), (("eps", 0.3),)),
    Case("add_layer_norm", add_layer_norm, two_rows, vectors("weight", "bias"), (("eps", 1e-5),)),
    Case("add_layer_norm, large eps", add_layer_norm, two_rows, vectors("weight", "bias"), (("eps", 0.3),)),
    *[
        Case(f"linear_act, {name}", linear_act, rows, linear(24), (("activation", name),))
        for name in sorted(ACTIVATIONS)
    ],
    *[
        Case(
            f"mlp, {name}, {hidden} hidden columns",
            mlp,
            rows,
            block(hidden, names),
            (*no_bias(*missing), ("activation", activation)),
        )
        for hidden in (24, 1024)
        for name, names, missing, activation in (
            ("gelu", "up_weight up_bias down_weight down_bias", (), "gelu"),
            ("no bias", "up_weight down_weight", ("up_bias", "down_bias"), "relu"),
            ("gated", "gate_weight up_weight down_weight", ("up_bias", "down_bias"), "silu"),
            ("gated, biases", "gate_weight gate_bias up_weight up_bias down_weight down_bias", (), "gelu_tanh"),
        )
    ],
    Case(
        "mlp of a matrix",
        mlp,
        lambda b, n: {"input": rows(b, n)["input"].flatten(0, 1)},
        block(24, "up_weight up_bias down_weight"),
        (*no_bias("down_bias"), ("activation", "gelu")),
    ),
    Case("linear, rows of 4096 bytes", torch.ops.aten.linear.default, wide_rows, wide_weights("weight bias")),
    Case(
        "split_linear, rows of 4096 bytes", split_linear, wide_rows, wide_weights("weight bias"), (("sizes", [3, 5]),)
    ),
    Case(
        "linear_act, rows of 4096 bytes", linear_act, wide_rows, wide_weights("weight bias"), (("activation", "silu"),)
    ),
    Case(
        "gated_linear, rows of 4096 bytes",
        gated_linear,
        wide_rows,
        wide_weights("gate_weight up_weight"),
        (*no_bias("gate_bias", "up_bias"), ("activation", "silu")),
    ),
    Case("linear", torch.ops.aten.linear.default, rows, linear(24)),
    Case("linear, no bias", torch.ops.aten.linear.default, rows, linear(24, bias=False)),
    Case("linear_act, no bias", linear_act, rows, linear(24, bias=False), (("bias", None), ("activation", "gelu"))),
    Case("split_linear", split_linear, rows, linear(24), (("sizes", [12, 4, 8]),)),
    Case("split_linear, no bias", split_linear, rows, linear(24, bias=False), (("bias", None), ("sizes", [20, 4]))),
]
CASES = {item.name: item for item in (*ATTENTIONS, *OTHERS)}
