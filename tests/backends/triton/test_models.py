"""Whole models through generated kernels, in the interpreter: equal to eager PyTorch."""

from __future__ import annotations

import re
from typing import Any

import pytest
import tiny
import torch
from kernels_agree import poisoned
from sampled import sampled

import fxpress
from fxpress.compiler.families import families
from fxpress.passes import MaskWeights, Quantize, ReplaceAttention

FAMILIES = {family.name: family for family in families()}
FEW = ("bert", "gpt2", "llama", "vit", "t5")
# nn.Transformer is of a size that takes the interpreter minutes.
TRIED = sampled(sorted(FAMILIES.keys() - {"nn.Transformer"}), FEW)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRIED)
def test_families_are_equal_at_every_size(name: str) -> None:
    family = FAMILIES[name]
    with poisoned():
        compiled = fxpress.compile(family.model().eval(), example_inputs=family.inputs(2, 12), backend="triton")
        assert compiled.report.equal
        for batch, length in ((3, 17), (1, 9), (1, 1)):
            if length >= family.shortest:
                assert compiled.verify(family.inputs(batch, length)).equal


def test_an_encoder_takes_what_the_model_does() -> None:
    model, given = tiny.encoder(), tiny.inputs()
    compiled = fxpress.compile(model, example_inputs=given, backend="triton")
    assert compiled.report.equal
    torch.testing.assert_close(compiled(**given), model(**given))


@pytest.mark.parametrize(
    "passes",
    [
        [Quantize("int8")],
        [Quantize("int4", group_size=16)],
        [Quantize("int4", activations="int8", group_size=16)],
        [MaskWeights(0.5, method="magnitude")],
        [ReplaceAttention("sliding_window", window=4, force=True)],
        [ReplaceAttention("performer", features=8, force=True)],
    ],
    ids=str,
)
def test_lossy_passes_lower_too(passes: list[Any]) -> None:
    """What a lossy pass made runs as the rewritten program itself does in PyTorch."""
    given = tiny.inputs()
    compiled = fxpress.compile(tiny.encoder(), passes=[*passes, "fuse"], example_inputs=given, backend="triton")
    torch.testing.assert_close(compiled(**given), compiled.program(**given), rtol=1e-4, atol=1e-4)


def test_calls_leave_no_trace() -> None:
    """A second call gives the same, and what the first gave stays."""
    given, more = tiny.inputs(), tiny.inputs(3, 9)
    compiled = fxpress.compile(tiny.encoder(), example_inputs=given, backend="triton")
    first = compiled(**given)
    kept = first.clone()
    compiled(**more)
    assert torch.equal(first, kept)
    assert torch.equal(compiled(**given), kept)


def test_equal_layers_share_their_kernels() -> None:
    import transformers

    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24
    )
    compiled = fxpress.compile(
        transformers.BertModel(config).eval(), example_inputs=tiny.text(), backend="triton", verify=False
    )
    assert len(re.findall(r"^def layer_norm\w*_kernel\(", compiled.source, flags=re.MULTILINE)) == 1
    assert compiled.source.count("launch_rows(layer_norm_kernel") == 6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit"])
def test_families_on_a_gpu(name: str, dtype: str) -> None:
    """With TRITON_INTERPRET=0. Twice each size, as the second call is captured in a CUDA graph."""
    family = FAMILIES[name]
    on_gpu = [{key: item.cuda() for key, item in family.inputs(*size).items()} for size in ((2, 12), (3, 17), (1, 9))]
    narrow = None if dtype == "float32" else dtype
    compiled = fxpress.compile(family.model().eval().cuda(), example_inputs=on_gpu[0], backend="triton", dtype=narrow)
    assert compiled.report.equal
    for given in on_gpu * 3:
        assert compiled.verify(given).equal


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"bert", "gpt2", "llama", "vit"}))
def test_other_families_on_a_gpu(name: str, dtype: str) -> None:
    """With TRITON_INTERPRET=0, and without measurements, of which the others have enough."""
    family = FAMILIES[name]
    given = {key: item.cuda() for key, item in family.inputs(2, 12).items()}
    narrow = None if dtype == "float32" else dtype
    model = family.model().eval().cuda()
    compiled = fxpress.compile(model, example_inputs=given, backend="triton", dtype=narrow, tune=False)
    assert compiled.report.equal
    other = {key: item.cuda() for key, item in family.inputs(3, max(17, family.shortest)).items()}
    for _ in range(3):
        assert compiled.verify(other).equal
