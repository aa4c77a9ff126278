"""Reading masks: at every index the expression is worth what the graph computes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from build import module, program
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from fxpress.compiler import families
from fxpress.compiler.trace import bind_example, trace
from fxpress.ir.graph import Program, shape
from fxpress.ir.masks import expression as e
from fxpress.ir.masks.evaluate import Values, evaluate, symbols, wrong_masks
from fxpress.ir.masks.reader import Reader
from fxpress.ir.ops.attention import attention
from fxpress.ir.rewrite import Context
from fxpress.passes import Canonicalize


def assert_read(traced: Program, node: fx.Node, extents: tuple[Any, ...], tensors: list[Tensor]) -> e.Expression:
    """The mask's expression, which is worth what the node holds at every index."""
    found = Reader(traced, extents).mask(node)
    known = symbols(traced, tensors)
    sizes = [size if isinstance(size, int) else int(size.node.expr.subs(known)) for size in extents]
    values = Values(traced, tensors).values
    expected = values[node].expand(sizes)
    worth = torch.as_tensor(evaluate(found, sizes, values, known)).expand(sizes)
    assert worth.dtype == expected.dtype
    assert torch.equal(worth, expected), str(found)
    return found


# --- masks as they are written ---------------------------------------------------------------------------------


def padding(length: int, batch: int = 2) -> Tensor:
    """A mask of ones that hides the last third of the last row."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, length - length // 3 :] = 0
    return mask


def rows(mask: Tensor) -> Tensor:
    return torch.arange(mask.shape[1])[:, None]


def columns(mask: Tensor) -> Tensor:
    return torch.arange(mask.shape[1])[None, :]


def packed(positions: Tensor) -> Tensor:
    """The number of the prompt that each token belongs to, as transformers counts them: positions jump between two."""
    return (positions.diff(prepend=positions[:, :1] - 1) != 1).cumsum(-1)


def same_prompt(prompts: Tensor) -> Tensor:
    """[B, N] -> [B, 1, N, N]: earlier tokens of one prompt."""
    return (prompts[:, None, :, None] == prompts[:, None, None, :]) & (columns(prompts) <= rows(prompts))


LOWEST = torch.finfo(torch.float32).min
TABLE = torch.ones(30, 30, dtype=torch.bool).tril()
SPELLINGS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "padding": (lambda m, pad: pad.bool()[:, None, None, :], "pad[b, j] != 0"),
    "padding_compared": (lambda m, pad: pad[:, None, None, :] == 1, "pad[b, j] == 1"),
    "padding_inverted": (lambda m, pad: ~(pad == 0)[:, None, None, :], "pad[b, j] != 0"),
    "causal": (lambda m, pad: columns(pad) <= rows(pad), "j <= i"),
    "causal_other_way": (lambda m, pad: rows(pad) >= columns(pad), "j <= i"),
    "causal_strict": (lambda m, pad: rows(pad) + 1 > columns(pad), "j <= i"),
    "causal_not_above": (lambda m, pad: ~(columns(pad) > rows(pad)), "j <= i"),
    "causal_difference": (lambda m, pad: columns(pad) - rows(pad) <= 0, "j <= i"),
    "causal_tril": (lambda m, pad: torch.ones(pad.shape[1], pad.shape[1], dtype=torch.bool).tril(), "j <= i"),
    "causal_triu": (lambda m, pad: torch.ones(pad.shape[1], pad.shape[1]).triu(1) == 0, "j <= i"),
    "causal_buffer": (lambda m, pad: m.table[: pad.shape[1], : pad.shape[1]], "j <= i"),
    "causal_buffer_row": (lambda m, pad: m.table[5:6, : pad.shape[1]], "j <= 5"),
    "causal_infinite": (
        lambda m, pad: torch.full((pad.shape[1], pad.shape[1]), -math.inf).triu(1),
        "(-inf if i + 1 <= j else 0.0)",
    ),
    "zeros_of_another_shape": (
        lambda m, pad: torch.zeros(4 * pad.shape[0], pad.shape[1] ** 2).view(-1, 4, pad.shape[1], pad.shape[1]),
        "0.0",
    ),
    "anti_causal": (lambda m, pad: columns(pad) >= rows(pad), "i <= j"),
    "window": (
        lambda m, pad: (columns(pad) <= rows(pad)) & (columns(pad) > rows(pad) - 4),
        "i <= j + 3 & j <= i",
    ),
    "window_both_sides": (lambda m, pad: (rows(pad) - columns(pad)).abs() <= 3, "i <= j + 3 & j <= i + 3"),
    "outside_window": (lambda m, pad: (rows(pad) - columns(pad)).abs() > 3, "i + 4 <= j | j + 4 <= i"),
    "blocks": (lambda m, pad: rows(pad) // 4 == columns(pad) // 4, "(i) // 4 == (j) // 4"),
    "strides": (lambda m, pad: (rows(pad) - columns(pad)) % 3 == 0, "(i - j) % 3 == 0"),
    "always": (lambda m, pad: columns(pad) >= 0, "True"),
    "never": (lambda m, pad: columns(pad) < -rows(pad), "False"),
    "padding_and_causal": (
        lambda m, pad: pad.bool()[:, None, None, :] & (columns(pad) <= rows(pad)),
        "j <= i & pad[b, j] != 0",
    ),
    "padding_product": (
        lambda m, pad: pad.bool()[:, None, None, :] * (columns(pad) <= rows(pad)),
        "j <= i & pad[b, j] != 0",
    ),
    "prefix": (lambda m, pad: (columns(pad) <= rows(pad)) | (columns(pad) < 3), "j <= 2 | j <= i"),
    "same_segment": (
        lambda m, pad: pad[:, None, :, None] == pad[:, None, None, :],
        "pad[b, i] == pad[b, j]",
    ),
    "additive": (
        lambda m, pad: torch.where(pad.bool()[:, None, None, :], 0.0, LOWEST),
        f"(0.0 if pad[b, j] != 0 else {LOWEST})",
    ),
    "additive_scaled": (
        lambda m, pad: (1.0 - pad.bool()[:, None, None, :].float()) * -10000.0,
        "(-0.0 if pad[b, j] != 0 else -10000.0)",
    ),
    "additive_filled": (
        lambda m, pad: torch.zeros(pad.shape[1], pad.shape[1]).masked_fill(columns(pad) > rows(pad), -math.inf),
        "(-inf if i + 1 <= j else 0.0)",
    ),
    "filled_twice": (
        lambda m, pad: torch.zeros(pad.shape[1], pad.shape[1])
        .masked_fill(columns(pad) > rows(pad), -1e9)
        .masked_fill((pad == 0)[:, None, None, :], -1e9),
        "(-1000000000.0 if i + 1 <= j | pad[b, j] == 0 else 0.0)",
    ),
    "gathered": (
        lambda m, pad: pad.bool()[torch.arange(pad.shape[0])[:, None, None, None], columns(pad)[None, None]],
        "pad[b, j] != 0",
    ),
    "from_the_end": (lambda m, pad: pad.bool().flip(1)[:, None, None, :], "flip[b, j]"),
    "last_columns": (lambda m, pad: pad.bool()[:, 1:][:, None, None, :], "pad[b, j + 1] != 0"),
    "selected": (lambda m, pad: pad.bool()[:, -1][:, None, None, None], None),
    "reshaped": (lambda m, pad: pad.reshape(pad.shape[0], 1, 1, -1).bool(), "pad[b, j] != 0"),
    "counted": (lambda m, pad: (pad.cumsum(-1) > 2)[:, None, None, :], "3 <= cumsum[b, j]"),
    "running_sum_of_a_number": (
        lambda m, pad: torch.full((pad.shape[1],), 2).cumsum(0) <= rows(pad),
        "2*j + 2 <= i",
    ),
    "running_sum_of_a_truth": (lambda m, pad: (columns(pad) >= 0).cumsum(-1) > rows(pad), "i <= j"),
    "running_sum_of_what_changes": (lambda m, pad: (columns(pad) >= 1).cumsum(-1) > 1, "2 <= cumsum[0, j]"),
    "running_sum_up_to_a_number": (lambda m, pad: (columns(pad) >= 1).cumsum(-1)[:, 1:2] > 1, "2 <= cumsum[0, 1]"),
    "running_sum_of_a_diagonal": (
        lambda m, pad: (columns(pad) <= rows(pad)).cumsum(-1).diagonal()[None] > 1,
        None,
    ),
    "differences": (lambda m, pad: columns(pad).diff() == 1, "True"),
    "differences_after_a_number": (
        lambda m, pad: (3 * columns(pad)).diff(prepend=columns(pad)[:, :1] - 3) == 3,
        "True",
    ),
    "differences_after_another_number": (
        lambda m, pad: columns(pad).diff(prepend=columns(pad)[:, :1]) > 0,
        "(0 if j == 0 else j - 1) + 1 <= j",
    ),
    "differences_of_rows": (lambda m, pad: (rows(pad) * 2).diff(dim=0, prepend=rows(pad)[:1]) == 2, None),
    "differences_of_differences": (lambda m, pad: columns(pad).diff(n=2) == 0, "diff[0, j] == 0"),
    "differences_before_a_number": (
        lambda m, pad: columns(pad).diff(append=columns(pad)[:, :1]) == 1,
        "diff[0, j] == 1",
    ),
    "differences_of_two_before": (
        lambda m, pad: columns(pad).diff(prepend=columns(pad)[:, :2]) == 1,
        "diff[0, j] == 1",
    ),
    "differences_of_elements": (
        lambda m, pad: (pad.diff(prepend=pad[:, :1] - 1) != 1)[:, None, None, :],
        None,
    ),
    "packed_prompts": (lambda m, pad: same_prompt(packed(columns(pad).expand(*pad.shape))), "j <= i"),
    "packed_prompts_of_a_user": (
        lambda m, pad: same_prompt(packed(pad)),
        "cumsum[b, i] == cumsum[b, j] & j <= i",
    ),
    "position_bias": (
        lambda m, pad: -0.5 * (rows(pad) - columns(pad)).abs().float(),
        "mul(_to_copy(|i - j|), -0.5)",
    ),
    "row_of_unknown_length": (lambda m, pad: columns(pad)[..., max(0, 1 - pad.shape[1]) :, :] < 3, None),
    "bytes_overflow": (lambda m, pad: (pad.to(torch.uint8) - 1)[:, None, None, :] > 100, None),
    "size_limit": (lambda m, pad: columns(pad) < pad.shape[1] - 2, None),
}  # fmt: skip


def traced_mask(mask: Callable[[Any, Tensor], Tensor]) -> tuple[Program, fx.Node]:
    model = module(lambda self, pad: mask(self, pad))
    model.register_buffer("table", TABLE)
    found = program(model, padding(7))
    Canonicalize().apply(found, Context())
    (result,) = next(iter(reversed(found.graph.nodes))).args[0]
    return found, result


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling(name: str) -> None:
    mask, expected = SPELLINGS[name]
    traced, node = traced_mask(mask)
    placeholder = traced.graph.find_nodes(op="placeholder")[0]
    batch_size, size = shape(placeholder)
    for length, batch in ((7, 2), (13, 3), (2, 1)):
        columns = shape(node)[-1]
        found = assert_read(traced, node, (batch_size, 4, size, columns), [padding(length, batch)])
    if expected is not None:
        assert e.spell(found) == expected


# --- masks that programs make up -------------------------------------------------------------------------------


CONDITIONS: dict[str, Callable[..., Tensor]] = {
    "pad": lambda pad, i, j, k: pad.bool()[:, None, None, :],
    "pad of the query": lambda pad, i, j, k: pad.bool()[:, None, :, None],
    "j <= i + k": lambda pad, i, j, k: j <= i + k,
    "i - j < k": lambda pad, i, j, k: i - j < k,
    "|i - j| > k": lambda pad, i, j, k: (i - j).abs() > k,
    "blocks": lambda pad, i, j, k: i // (abs(k) + 1) == j // (abs(k) + 1),
    "strided": lambda pad, i, j, k: (j - i) % (abs(k) + 2) != 0,
    "j < k": lambda pad, i, j, k: j < k,
    "2j >= i": lambda pad, i, j, k: 2 * j >= i - k,
    "triangle": lambda pad, i, j, k: torch.ones(i.shape[0], j.shape[1]).triu(k).bool(),
    "same segment": lambda pad, i, j, k: pad[:, None, :, None] == pad[:, None, None, :],
}  # fmt: skip
LEAVES = st.tuples(st.sampled_from(sorted(CONDITIONS)), st.integers(-3, 5))
MASKS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.tuples(st.just("and"), inner, inner),
        st.tuples(st.just("or"), inner, inner),
        st.tuples(st.just("xor"), inner, inner),
        st.tuples(st.just("not"), inner),
        st.tuples(st.just("where"), inner, inner, inner),
        st.tuples(st.just("filled"), inner, inner),
        st.tuples(st.just("added"), inner, inner),
    ),
    max_leaves=6,
)


def made_up(recipe: Any, pad: Tensor) -> Tensor:
    """A boolean mask [B or 1, 1, N, N] by a recipe."""
    kind, *parts = recipe
    if kind in CONDITIONS:
        return CONDITIONS[kind](pad, rows(pad), columns(pad), parts[0])
    masks = [made_up(part, pad) for part in parts]
    match kind:
        case "and":
            return masks[0] & masks[1]
        case "or":
            return masks[0] | masks[1]
        case "xor":
            return masks[0] ^ masks[1]
        case "not":
            return ~masks[0]
        case "where":
            return torch.where(masks[0], masks[1], masks[2])
        case "filled":
            hidden = torch.zeros(pad.shape[1], pad.shape[1]).masked_fill(masks[0], -math.inf)
            return hidden.masked_fill(masks[1], LOWEST) < -1.0
    return masks[0].long() + masks[1].int() >= 1


@given(recipe=MASKS)
@settings(max_examples=25)
def test_made_up_mask(recipe: Any) -> None:
    traced, node = traced_mask(lambda m, pad: made_up(recipe, pad))
    batch, size = shape(traced.graph.find_nodes(op="placeholder")[0])
    for length, count in ((5, 2), (8, 1)):
        assert_read(traced, node, (batch, 1, size, size), [padding(length, count)])


# --- masks of model families -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", [family.name for family in families.families()])
def test_family(name: str) -> None:
    """Every mask of every attention of a model is worth what the model computes."""
    family = next(item for item in families.families() if item.name == name)
    torch.manual_seed(0)
    model = family.model().eval()
    traced = trace(model, bind_example(model, family.inputs(2, 12)))
    Canonicalize(masks=False).apply(traced, Context())
    for batch, length in ((2, 12), (3, 17)):
        tensors = [torch.as_tensor(item) for item in traced.signature.bind((), family.inputs(batch, length))]
        assert list(wrong_masks(traced, tensors)) == []


def test_wrong_mask_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, x: Tensor, pad: Tensor) -> Tensor:
        return attention(x, x, x, pad.bool()[:, None, None, :] & (columns(pad) <= rows(pad)))

    traced = program(module(forward), torch.randn(2, 2, 7, 4), padding(7))
    Canonicalize(masks=False).apply(traced, Context())
    tensors = [torch.randn(2, 2, 7, 4), padding(7)]
    assert list(wrong_masks(traced, tensors)) == []
    monkeypatch.setattr(Reader, "mask", lambda self, node: e.at_most(e.index(3), e.index(2), self.extents))
    ((node, found),) = wrong_masks(traced, tensors)
    assert node.target is attention and e.spell(found) == "j <= i"
