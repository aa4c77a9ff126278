"""The pass pipeline: which passes run, the checks around each, and what each one did."""

from __future__ import annotations

import ast
import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode

from .. import passes as pass_folder
from ..ir.calibration.lockstep import BatchError
from ..ir.equality import TakenBranch, compare, sqnr_db
from ..ir.errors import FxpressError, InputError, RewriteError, VerifyError, nearest, one_line
from ..ir.graph import Program, arguments
from ..ir.ops.attention import attention
from ..ir.ops.float8 import float8_quantize
from ..ir.ops.int8_attention import int8_attention
from ..ir.ops.quantize import dequantize, expand_int4, int4_embedding, int4_linear, quantize, unpack_int4
from ..ir.padding import Padding, Real
from ..ir.pruning.masks import is_masked, masked
from ..ir.rewrite import Context, Pass, PassResult
from ..ir.verify import verify
from .report import PassReport

aten = torch.ops.aten

PASSES: dict[str, type[Pass]] = {
    kind.pass_name(): kind for kind in (getattr(pass_folder, name) for name in pass_folder.__all__)
}


def parse_passes(given: Any) -> list[Pass]:
    """The pass list that a user means, canonical spelling first.

    `None` is exact optimisation only; a list of Pass objects and texts, or one text such as `"fuse"` or
    `"quantize(int8, skip=['head']), fuse"`, is itself.

    Raises:
        InputError: an unknown pass or option, with the nearest valid name.
    """
    if given is None:
        given = "fuse"
    if isinstance(given, str | Pass):
        given = [given]
    if not isinstance(given, Sequence):
        raise InputError(f"passes must be a list of passes or a text, found a {type(given).__name__}")
    found: list[Pass] = []
    for item in given:
        if isinstance(item, Pass):
            found.append(item)
        elif isinstance(item, str):
            found += _parse_text(item)
        else:
            hint = f"write {item.__name__}()" if isinstance(item, type) else "see fxpress.passes"
            raise InputError(f"{item!r} is no pass; {hint}")
    if found and not isinstance(found[0], PASSES["canonicalize"]):
        found.insert(0, PASSES["canonicalize"]())
    return found


def _parse_text(text: str) -> list[Pass]:
    try:
        tree = ast.parse(f"[{text}]", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"cannot read the passes {text[:80]!r}; write them as 'name(option=value), name'") from error
    if not isinstance(tree, ast.List):
        raise InputError(f"cannot read the passes {text[:80]!r}; write them as 'name(option=value), name'")
    return [_parse_one(item, text) for item in tree.elts]


def check_name(name: str) -> None:
    """Refuse a name that no pass has.

    Raises:
        InputError: with the nearest valid name.
    """
    if name not in PASSES:
        raise InputError(f"unknown pass {name!r}: {nearest(name, PASSES)}")


def _parse_one(item: ast.expr, text: str) -> Pass:
    call = item if isinstance(item, ast.Call) else ast.Call(item, [], [])
    if not isinstance(call.func, ast.Name):
        raise InputError(f"cannot read the passes {text!r}; write them as 'name(option=value), name'")
    name = call.func.id
    check_name(name)
    kind = PASSES[name]
    options = [entry.name for entry in dataclasses.fields(kind) if entry.init]
    if len(call.args) > len(options):
        raise InputError(f"pass {name!r} takes {len(options)} options, found {len(call.args)} in {text!r}")
    values = {option: _literal(value, text) for option, value in zip(options, call.args, strict=False)}
    for keyword in call.keywords:
        if keyword.arg is None or (keyword.arg not in options and not kind.more_options):
            raise InputError(f"unknown option {keyword.arg!r} of pass {name!r}: {nearest(str(keyword.arg), options)}")
        if keyword.arg in values:
            raise InputError(f"option {keyword.arg!r} of pass {name!r} is given twice in {text!r}; give it once")
        values[keyword.arg] = _literal(keyword.value, text)
    needed = [entry.name for entry in dataclasses.fields(kind) if _is_needed(entry) and entry.name not in values]
    if needed:
        raise InputError(f"pass {name!r} needs {needed[0]}; write {name}({needed[0]}=...)")
    return kind(**values)


def _is_needed(entry: dataclasses.Field[Any]) -> bool:
    return entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING


class _Words(ast.NodeTransformer):
    """Bare words become texts, in lists too."""

    def visit_Name(self, node: ast.Name) -> ast.expr:  # as ast calls it
        return ast.Constant(node.id)


def _literal(value: ast.expr, text: str) -> Any:
    """A literal; a bare word is a text."""
    try:
        return ast.literal_eval(_Words().visit(value))
    except ValueError as error:
        raise InputError(f"an option in {text!r} is no literal value") from error


@dataclass(frozen=True)
class Passed:
    """What a list of passes did to a program.

    Attributes:
        reports: of each pass.
        macs_before, macs_after: multiplications of `counted`, before the first pass and after the last; None: not run.
        reshaped: outputs that have another shape than before, as those of fewer heads do: [before, after].
        padding: which vectors of the outputs are padding; None: not known.
        real: gives those of the outputs on the example that are not.
    """

    reports: list[PassReport]
    macs_before: int | None = None
    macs_after: int | None = None
    reshaped: dict[str, list[list[int]]] = field(default_factory=dict)
    padding: Padding | None = None
    real: Real = list


def run_passes(
    program: Program,
    passes: Sequence[Pass],
    context: Context,
    expected: tuple[Sequence[Any], Sequence[Any]] | None = None,
) -> Passed:
    """Run passes on a program in place, verified before and after each.

    Args:
        context: with the example inputs on which the error of each pass is measured.
        expected: the model's outputs on them, and those in fp64; None: the program is not run.

    Raises:
        RewriteError, VerifyError: name the pass and those before it; VerifyError also when a pass that is exact
            changed the result (`max_rewrites` finds the rewrite).
    """
    reports: list[PassReport] = []
    verify(program)
    padding: Padding | None = None
    real: Real = list
    first, macs_before = counted(program, context.inputs) if expected else (None, None)
    before, macs_after = first, macs_before
    for index, rewrite in enumerate(passes):
        start = time.perf_counter()
        try:
            # Of what the passes before it were not allowed to finish, a pass would only say that it is not there.
            result = PassResult() if context.is_spent else rewrite.apply(program, context)
            verify(program)
            after, macs_after = counted(program, context.inputs) if expected else (None, None)
        except BatchError as error:
            where = f"calibration batch {_number(error, context)} {error}; mend it, or leave it out"
            raise InputError(f"{_place(passes, index)}: {where}") from error
        except (FxpressError, RuntimeError, ValueError) as error:
            own = isinstance(error, FxpressError)
            kind, text = (type(error), str(error)) if own else (RewriteError, one_line(error))
            raise kind(f"{_place(passes, index)}: {text}") from error
        seconds = time.perf_counter() - start
        if expected and after is not None and rewrite.exact and all(item.exact for item in passes[:index]):
            whole = all(item.keeps_padding for item in passes[: index + 1])
            found, usual, truth = map(list if whole else real, (after, *expected))
            verdict = compare(found, usual, truth, program.signature.outputs)
            if not verdict.equal:
                raise VerifyError(
                    f"{_place(passes, index)}: the result changed: {verdict.reasons[0]}; "
                    f"find the rewrite by lowering max_rewrites from {context.rewrites}"
                )
        reports.append(
            PassReport(
                name=str(rewrite),
                changes=result.changes,
                rewrites=dict(result.rewrites),
                refusals=[{"rule": item.rule, "node": item.node, "reason": item.reason} for item in result.refusals],
                matches=[dataclasses.asdict(item) for item in result.matches],
                seconds=seconds,
                sqnr_db=_introduced(after, before, real),
                sparsity=[dataclasses.asdict(item) for item in result.sparsity],
            )
        )
        before = after
        if expected and index == 0:
            # Canonical attention says what padding is.
            padding = Padding.of(program, follow=not all(item.keeps_padding for item in passes))
            real = padding.left_out(context.inputs)
    reshaped = _reshaped(program.signature.outputs, first, before)
    return Passed(reports, macs_before, macs_after, reshaped, padding, real)


def _place(passes: Sequence[Pass], index: int) -> str:
    earlier = f" (after {', '.join(map(str, passes[:index]))})" if index else ""
    return f"pass {passes[index]}{earlier}"


def _number(error: BatchError, context: Context) -> int:
    """Passes run on some of the batches only."""
    return next(place for place, batch in enumerate(context.calibration) if batch is error.batch)


def _introduced(after: Sequence[Any] | None, before: Sequence[Any] | None, real: Real) -> float | None:
    """The lowest SQNR among the outputs that a pass left their shape; padding is left out."""
    if after is None or before is None:
        return None
    pairs = zip(real(after), real(before), strict=True)
    floats = [(a, b) for a, b in pairs if isinstance(a, Tensor) and a.is_floating_point()]
    return min((sqnr_db(a, b) for a, b in floats if a.shape == b.shape), default=None)


def _reshaped(
    names: Sequence[str], before: Sequence[Any] | None, after: Sequence[Any] | None
) -> dict[str, list[list[int]]]:
    if after is None or before is None:
        return {}
    outputs = zip(names, before, after, strict=True)
    return {
        name: [list(old.shape), list(new.shape)]
        for name, old, new in outputs
        if isinstance(old, Tensor) and isinstance(new, Tensor) and old.shape != new.shape
    }


# --- what a program consists of ------------------------------------------------------------------------------------


def counted(program: Program, inputs: Sequence[Tensor]) -> tuple[list[Any], int]:
    """Run a program on flat inputs: its outputs, and how many numbers it multiplied.

    Those of matmuls, of integers too, of convolutions and of attention, as the operators' references compute them: all
    scores of an attention, those that a mask hides too. Multiplications by element and those of recurrent layers are
    not counted.
    """
    rules = {aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    counter = FlopCounterMode(display=False, custom_mapping=rules)
    # The counter follows gradients of what a branch of torch.cond is given, weights too, where there are none.
    weights = {name: weight.detach() for name, weight in program.module.named_parameters(remove_duplicate=False)}
    with torch.no_grad(), counter, TakenBranch():  # type: ignore[no-untyped-call]
        outputs = list(torch.func.functional_call(program.module, weights, tuple(inputs)))
    return outputs, counter.get_total_flops() // 2


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """torch has this rule for the kernels of GPUs alone; arguments are shapes."""
    batch, heads, rows, width = query
    return int(2 * batch * heads * rows * key[-2] * (width + value[-1]))


def parameters(program: Program) -> int:
    """Numbers of a program's weights, zeros too: tied ones once, without masks and the scales of quantization."""
    sizes = {id(tensor): tensor.numel() for tensor in program.module.parameters()}
    for _, weight, reader in _weights(program, "weight", "bias"):
        tensor = program.tensor(weight)
        sizes[id(tensor)] = len(tensor) * _width(reader) if _is_packed(tensor, reader) else tensor.numel()
    return sum(sizes.values())


def zeros(program: Program) -> float:
    """The share of zeros among the numbers of linear layers' weights, those that are masked counted as zeros."""
    found: dict[int, tuple[int, int]] = {}
    for value, weight, reader in _weights(program, "weight"):
        stored = program.tensor(weight).detach()
        if stored.dim() != 2 or reader.target in (aten.embedding.default, int4_embedding):
            continue
        if _is_packed(stored, reader):
            given = {name: item and program.tensor(item) for name, item in arguments(reader).items() if name in _SCALES}
            numbers = dequantize(unpack_int4(stored, _width(reader)), *given.values())
        else:
            numbers = program.computed(value)
        found[id(program.tensor(weight))] = (int((numbers == 0).sum()), numbers.numel())  # float8 has no count_nonzero
    total = sum(size for _, size in found.values())
    return sum(count for count, _ in found.values()) / total if total else 0.0


def has_masks(program: Program) -> bool:
    """Whether weights are still multiplied by masks, for training."""
    return bool(masked(program))


_SCALES = ("weight_scale", "zero_point")


def _weights(program: Program, *kinds: str) -> Iterator[tuple[fx.Node, fx.Node, fx.Node]]:
    """What operators read as their weights: that value, the stored tensor that it is made of, the operator."""
    for reader in program.graph.nodes:
        if reader.op != "call_function" or reader.target in (attention, int8_attention) or _looks_up_scales(reader):
            continue  # attention's bias is a mask
        for name, value in arguments(reader).items():
            if name.endswith(kinds) and isinstance(value, fx.Node):
                *_, weight = _through(value)
                if weight.op == "get_attr":
                    yield value, weight, reader


def _through(value: Any) -> Iterator[fx.Node]:
    """A value, and what it is made of by quantization and masks."""
    yield value
    while value.target in (quantize, dequantize, float8_quantize) or is_masked(value):
        value = value.args[0]
        yield value


def _looks_up_scales(node: fx.Node) -> bool:
    """Whether a lookup gives the scales of the rows of another table."""
    if node.target is not aten.embedding.default:
        return False
    return any(user.target is dequantize and arguments(user)["input"] is not node for user in node.users)


def _is_packed(tensor: Tensor, reader: fx.Node) -> bool:
    return reader.target in (int4_linear, int4_embedding, expand_int4) and tensor.dtype == torch.uint8


def _width(reader: fx.Node) -> int:
    given = arguments(reader)
    return int(given["width"] if "width" in given else given["input"].meta["val"].shape[-1])
