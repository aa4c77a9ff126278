"""Corner cases of cutting channels, each of which once went wrong."""

import torch
import torch.nn.functional as F
from build import assert_equal, inputs, normal, program, verify

from fxpress.ir.pruning import layers, masks, select, sensitivity
from fxpress.ir.pruning.channels import follow, small_sizes
from fxpress.ir.pruning.cut import cut
from fxpress.ir.pruning.units import cut_unread, families
from fxpress.ir.rewrite import Context, untracked
from fxpress.passes import Fold, MaskWeights

H, S = 4, 2
W = 8
X = normal(2, 5, W)
A = {n: normal(W, W, seed=i) for i, n in enumerate("qkvo")}


def split(y, h=H):
    return y.view(y.shape[0], y.shape[1], h, -1).transpose(1, 2)


def merge(y):
    return y.transpose(1, 2).reshape(y.shape[0], y.shape[2], -1)


def att(q, k, v, **o):
    return torch.ops.fxpress.attention(q, k, v, **o)


def same(p, expect=None):
    after = p.copy()
    counts = cut_unread(after)
    verify(after)
    if expect is not None:
        assert counts == expect
    for b in (3, 6):
        assert_equal(p, after, inputs(p, b))


def zero(w, cols):
    w = w.clone()
    w[:, cols] = 0
    return w


def test_slices_behind_what_is_cut_are_moved():
    def f(m, x):
        h = F.relu(F.linear(x, m.u))
        return F.linear(h[..., :16], m.a), F.linear(h[..., 16:32], m.b), F.linear(h[..., 32:], m.c)

    a, b, c = (normal(4, 16, seed=i) for i in range(3))
    same(program(f, X, u=normal(48, W), a=zero(a, slice(0, 8)), b=b, c=zero(c, slice(0, 8))), {"neurons": 16})


def test_heads_of_a_packed_parallel_block():
    def f(m, x):
        y = F.linear(x, m.all)
        q, k, v, h = y[..., :W], y[..., W : 2 * W], y[..., 2 * W : 3 * W], y[..., 3 * W :]
        return F.linear(merge(att(*map(split, (q, k, v)))), m.o) + F.linear(F.gelu(h), m.d)

    same(program(f, X, all=normal(3 * W + 16, W), o=zero(A["o"], [0, 1]), d=normal(W, 16)), {"heads": 1})


def test_overlapping_families():
    def f(m, x):
        h = F.relu(F.linear(x, m.u))
        return F.linear(h, m.a), F.linear(h[..., :16], m.b)

    same(program(f, X, u=normal(32, W), a=normal(4, 32), b=zero(normal(4, 16), slice(0, 8))), {})


def test_norm_over_heads_and_size():
    def f(m, x):
        q = F.layer_norm(F.linear(x, m.q).view(x.shape[0], x.shape[1], H, S), (H, S)).transpose(1, 2)
        return F.linear(merge(att(q, split(F.linear(x, m.k)), split(F.linear(x, m.v)))), m.o)

    assert families(follow(program(f, X, **A)))[0] == []


def test_order_of_operands():
    def f(m, x):
        return F.linear(torch.cat([F.linear(x, m.a), x], -1) + F.linear(x, m.b), m.c)

    same(program(f, X, a=normal(16, W), b=normal(24, W), c=zero(normal(4, 24), slice(16, 24))), {})


def gatedf(m, x):
    c = torch.sigmoid(split(F.linear(x, m.g))) * att(*(split(F.linear(x, n)) for n in (m.q, m.k, m.v)))
    return c, F.linear(merge(c), m.o)


def test_gated_context_output():
    assert families(follow(program(gatedf, X, **A, g=normal(W, W, seed=9))))[0] == []


def test_query_output():
    def f(m, x):
        q, k, v = (split(F.linear(x, n)) for n in (m.q, m.k, m.v))
        return q, F.linear(merge(att(q, k, v)), m.o)

    assert families(follow(program(f, X, **A)))[0] == []


def test_angles_by_head():
    def f(m, x, cos, sin):
        q, k, v = (split(F.linear(x, n)) for n in (m.q, m.k, m.v))
        return F.linear(merge(att(torch.ops.fxpress.rotary(q, cos, sin), k, v)), m.o)

    a = normal(2, H, 5, S)
    o = zero(A["o"], [0, 1])
    same(program(f, X, a.cos(), a.sin(), **{**A, "o": o}))


def test_vector_weight():
    follow(program(lambda m, x: F.linear(x, m.w), X, w=normal(W)))


def test_users_mask():
    p = program(
        lambda m, x: F.linear(x, m.w * m.pad_mask) + F.linear(x.relu(), m.w),
        X,
        w=normal(W, W),
        pad_mask=(normal(W, W, seed=2) > 0).float(),
    )
    after = p.copy()
    masks.fold(after)
    verify(after)
    assert_equal(p, after, inputs(p))


def test_masked_scale():
    p = program(
        lambda m, x: F.linear(F.relu(F.linear(x, m.u)) * m.s, m.d), X, u=normal(24, W), s=normal(24), d=normal(W, 24)
    )
    n = len(families(follow(p))[0])
    masks.put(p, next(x for x in p.graph.nodes if x.target == "s"), torch.ones(24))
    assert len(families(follow(p))[0]) == n == 1


def test_masking_neurons_twice_with_a_scale():
    p = program(
        lambda m, x: F.linear(F.relu(F.linear(x, m.u)) * m.s, m.d), X, u=normal(24, W), s=normal(24), d=normal(W, 24)
    )
    MaskWeights(0.4, pattern="neurons", fold=False).apply(p, Context())
    MaskWeights(0.4, pattern="neurons", fold=False).apply(p, Context())


def test_bias_made_by_a_linear():
    def f(m, x, q):
        h = F.linear(x, m.u)
        return att(q, q, q, bias=h[:, None]), F.linear(h, m.d)

    same(program(f, normal(2, 24, W), normal(2, 2, 24, 4), u=normal(24, W), d=zero(normal(4, 24), slice(0, 8))), {})


def test_fold_where_no_rectangle_is_left():
    def f(m, x):
        return F.linear(
            F.linear(x, m.u).view(x.shape[0], x.shape[1], 4, 8).relu().view(x.shape[0], x.shape[1], 32), m.d
        )

    p = program(f, X, u=normal(32, W), d=normal(3, 32))
    keep = torch.ones(3, 32)
    keep[:, 3:12] = 0
    masks.put(p, next(x for x in p.graph.nodes if x.target == "d"), keep)
    p.clean()
    Fold().apply(p, Context())


def test_give_a_loss():
    p = program(lambda m, x: (k := F.linear(x, m.w), att(k, x, x).argmax(-1)), normal(2, 2, 5, 4), w=normal(4, 4))
    sensitivity.fisher(p, ["w"], [inputs(p)], lambda o: o[0].sum(), untracked)


def test_no_weights():
    p = program(lambda m, x: F.linear(x, m.w), X, w=normal(4, W))
    assert sensitivity.fisher(p, [], [[X]], None, untracked) == {}


def test_max_rewrites():
    p = program(lambda m, x: F.linear(F.linear(x, m.w).relu(), m.v), X, w=normal(4, W), v=normal(4, 4))
    MaskWeights(0.5, method="fisher").apply(p, Context(calibration=[[X]], max_rewrites=0))


def test_one_weight_that_nothing_depends_on():
    p = program(lambda m, x: (F.linear(x, m.d), F.linear(x, m.u).argmax(-1)), X, d=normal(3, W), u=normal(3, W, seed=1))
    assert not sensitivity.fisher(p, ["u"], [[X]], None, untracked)["u"].any()


def test_padding_does_not_change_the_unit():
    """Other content of padded tokens, the same real ones."""

    def f(m, x, mask):
        y = F.linear(x, m.u)
        return F.linear(y + att(y[:, None], y[:, None], y[:, None], key_mask=mask)[:, 0], m.d)

    mask = torch.tensor([[True, True, False, False, False]] * 2)
    p = program(f, X, mask, u=normal(4, W), d=normal(3, 4))
    other = X.clone()
    other[:, 2:] *= 100
    a, b = (sensitivity.fisher(p, ["u"], [[x, mask]], None, untracked)["u"] for x in (X, other))
    torch.testing.assert_close(a, b)


def test_rows_take_as_many_as_lowest():
    v = normal(10, 7)
    assert (~select.rows(v, 0.55)).sum() == (~select.lowest([v], 0.55)[0]).sum()


def test_small_sizes_are_not_alike():
    p = program(lambda m, x: x[:, 5:, :].sum() + x[:4].sum(), normal(5, 9, 9))
    s = list(small_sizes(p).values())
    assert len(set(s)) == len(s)


def test_stream_plus_attention_plus_mlp():
    def f(m, x):
        h = F.layer_norm(x, (W,))
        return x + F.linear(F.relu(F.linear(h, m.q)), m.k) + F.linear(F.relu(F.linear(h, m.v)), m.o)

    p = program(f, X, **A)
    found = layers.branches(p)
    assert found
    layers.drop(p, layers.Layer("", tuple(found)))
    p.clean()
    assert not p.calls(torch.ops.aten.linear.default)


def test_broadcast_branch():
    p = program(lambda m, x: x + F.linear(x.mean(1, keepdim=True), m.q), X, q=A["q"])
    b = layers.branches(p)
    layers.least(layers.grouped(b), p, [[X]], untracked)


def test_heads_beside_neurons():
    def f(m, x):
        return F.linear(
            torch.cat([merge(att(*(split(F.linear(x, n)) for n in (m.q, m.k, m.v)))), F.gelu(F.linear(x, m.u))], -1),
            m.oo,
        )

    fs = families(follow(program(f, X, **A, u=normal(16, W), oo=normal(W, W + 16))))[0]
    assert sorted((x.kind, len(x.channels)) for x in fs) == [("heads", 4), ("neurons", 16)]


def test_fold_of_infinity():
    p = program(lambda m, x: F.linear(x, m.w), X, w=torch.full((3, W), -torch.inf))
    masks.put(p, next(x for x in p.graph.nodes if x.target == "w"), torch.zeros(3, W))
    masks.fold(p)
    assert (p.module.w == 0).all()


def test_negative_index():
    def f(m, x):
        return F.linear(F.linear(x, m.u).view(x.shape[0], x.shape[1], 4, 8)[:, :, -2], m.d)

    p = program(f, X, u=normal(32, W), d=normal(4, 8))
    c = p.copy()
    cut(c, follow(c), range(24, 32))
    verify(c)
    assert_equal(p, c, inputs(p))
