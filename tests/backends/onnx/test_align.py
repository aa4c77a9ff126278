"""align_tokens in ONNX."""

from pathlib import Path

from token_mixing import check_in_onnx
from torch import Tensor

from fxpress.ir.ops.align import align_tokens


def test_equals_the_reference_at_every_length(tmp_path: Path) -> None:
    def mix(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor) -> Tensor:
        moved = align_tokens(query, key_mask) * align_tokens(key_mask, key_mask)[:, None, :, None]
        return moved + align_tokens(query * 2, key_mask, True)

    check_in_onnx(mix, tmp_path, [(2, 6), (1, 1), (3, 40), (2, 101)])
