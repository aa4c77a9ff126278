"""The section of a workload in fewer bits: speed beside error at each shape, quality on the corpus, the targets."""

from __future__ import annotations

from batches import EVALUATION_SHAPE, SAMPLES
from corpus import CALIBRATION
from measure import Quality, Results, Row
from quality import NEIGHBOURS
from report import cell, opening, row_of
from report_quality import cosines, quality_table
from targets import target_table
from targets_int8 import PEERS, targets
from workloads import DYNAMIC, Shape, Workload

PLOT = "quantization.png"
INTRODUCTION = f"""Peers (benchmarks/peers_int8.py): quantize_dynamic with int8 weights a channel, of the default
export, of the opset-23 export and of what onnxruntime.transformers' optimizer makes; static QDQ by quantize_static;
torchao's int8 weights with int8 activations a token, under torch.compile(dynamic=False) and under max-autotune with
freezing; NNCF's post-training quantization for OpenVINO; OpenVINO on the default export in bfloat16, where the
processor has it. Static QDQ, NNCF and fxpress are calibrated on the same {CALIBRATION} texts. Ours:
benchmarks/points.py; those in OpenVINO are loaded for each shape's sizes, for which all peers are compiled.

Cosines are with eager fp32: of the states of tokens that are not padding, and of mean-pooled embeddings; mean and
smallest. Each table by shape judges {SAMPLES} rows of that shape or more. Texts are docstrings and functions of
Python's standard library (benchmarks/corpus.py), none in two parts; the evaluation's are cut to {EVALUATION_SHAPE[1]}
tokens.
"""
TARGETS = f"""Speed is over the fastest {DYNAMIC} at each shape, quality on the corpus; a loss is what is missing from 1
(Spearman, top {NEIGHBOURS}) or from fp32's (MRR)."""


def quantized_section(workload: Workload, results: Results, settings: str) -> str:
    """The section, without its heading."""
    lines = [*opening(workload, settings), INTRODUCTION]
    for shape, rows in results.rows.items():
        lines += speed_table(shape, rows, results)
    lines += quality_table(results)
    lines += target_table(targets(results), TARGETS)
    lines += [f"![speed against error]({PLOT})", ""]
    lines += [f"- {note}" for note in sorted(set(results.notes))]
    return "\n".join(lines)


def speed_table(shape: Shape, rows: list[Row], results: Results) -> list[str]:
    """Time and error of each candidate at one shape."""
    peers = [row for row in rows if row.measured and row.name in PEERS]
    default, best = row_of(rows, DYNAMIC), min(peers, key=lambda row: row.ms, default=None)
    lines = [
        f"### batch {shape[0]}, length {shape[1]}",
        "",
        f"| candidate | ms | spread | times {DYNAMIC} | times best {DYNAMIC} | token cosine | smallest "
        "| pooled cosine | smallest |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if not row.measured:
            lines.append(f"| {row.name} | failed: {cell(row.failure or 'not run')} | | | | | | | |")
            continue
        times = [f"{peer.ms / row.ms:.2f}" if peer else "-" for peer in (default, best)]
        near = results.quality.get(row.name, Quality()).shapes.get(shape)
        lines.append(f"| {row.name} | {row.ms:.2f} | {row.spread:.2f} | {' | '.join(times)} | {cosines(near)} |")
    lines.append(f"| *matmul floor in fp32* | {results.floors[shape]:.2f} | | | | | | | |")
    return [*lines, ""]
