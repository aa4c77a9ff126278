"""Every family of the table in the README compiles and equals eager at every size."""

import pytest

from fxpress.compiler.families import Family, families, try_family

pytest.importorskip("transformers")


# nn.TransformerEncoder packs padded rows into a nested tensor in eager evaluation
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_equals_eager(family: Family) -> None:
    result = try_family(family)
    assert result.equal, result.failure
