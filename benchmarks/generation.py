"""Generation: milliseconds of a prompt and of each token after it, fxpress's steps beside the peers', by generate().

Every candidate is made once, in a process of its own: compiled or exported with dynamic sizes, quantized, stored. Then
they take turns: in each round a process of each loads what was stored, on one thread, and transformers' generate()
writes greedily behind prompts of several lengths. `python generation.py '{"model": ..., ...}'` is such a process.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MODELS = {"generation": ("gpt2", "llama"), "translation": ("t5",)}  # by section
LENGTHS = {"gpt2": (128, 896), "llama": (128, 896), "t5": (128, 512)}  # tokens of prompts, of sources where one is read
EAGER, COMPILED, ONNX = "eager", "torch.compile, static cache", "ONNX Runtime"
ONNX_INT8, ONNX_INT4 = "ONNX Runtime, quantize_dynamic", "ONNX Runtime, 4-bit weights"
OURS = {
    "fxpress": None,
    "fxpress int8": "quantize(int8, granularity=token), fuse",
    "fxpress int4": "quantize(int4), fuse",
}
CANDIDATES = (EAGER, COMPILED, ONNX, *list(OURS)[:1], ONNX_INT8, "fxpress int8", ONNX_INT4, "fxpress int4")
GROUPS = {"fxpress": (EAGER, COMPILED, ONNX), "fxpress int8": (ONNX_INT8,), "fxpress int4": (ONNX_INT4,)}
ROUNDS, TOKENS = 3, 24


@dataclass(frozen=True)
class Run:
    """One process: it makes a candidate (`make`), or loads and times it."""

    model: str
    candidate: str
    folder: str  # of what was made
    make: bool
    lengths: Sequence[int] = ()
    tokens: int = TOKENS


@dataclass
class Found:
    """By length, a number for each round: milliseconds of the prompt and of a token; and the stored megabytes."""

    prompt: dict[str, list[float]]
    token: dict[str, list[float]]
    sqnr_db: float = 0.0
    megabytes: float = 0.0


Results = dict[tuple[str, str], Found]


def candidates(model: str) -> Sequence[str]:
    """The candidates for a model; those of one with an encoder are what is known to run."""
    return [name for name in CANDIDATES if model != "t5" or name not in (COMPILED, ONNX_INT4)]


def measure(tell: Callable[[str], None], quick: bool, name: str) -> Results:
    """Everything of a section, model after model."""
    results: Results = {}
    for model in MODELS[name][-1:] if quick else MODELS[name]:
        lengths, rounds, tokens = (LENGTHS[model][:1], 1, 4) if quick else (LENGTHS[model], ROUNDS, TOKENS)
        with tempfile.TemporaryDirectory(prefix="fxpress-bench-") as folder:
            for name in candidates(model):
                tell(f"{model}: make {name}")
                said = _process(Run(model, name, folder, True))
                results[model, name] = Found({}, {}, said["sqnr_db"], said["megabytes"])
            for turn in range(rounds):
                for name in candidates(model):
                    tell(f"{model}: round {turn + 1} of {rounds}, {name}")
                    said = _process(Run(model, name, folder, False, lengths, tokens))
                    for length in map(str, lengths):
                        results[model, name].prompt.setdefault(length, []).append(said[length][0])
                        results[model, name].token.setdefault(length, []).append(said[length][1])
    return results


def _process(run: Run) -> Any:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(Path(run.folder) / "inductor")}
    command = [sys.executable, __file__, json.dumps(asdict(run))]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"{run} failed: {ended.stderr[-2000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


ABOUT = {
    "generation": [
        "GPT-2 and a small Llama (124M and 125M weights, random), batch 1, greedily by transformers' generate(), whose",
        "own time is in every figure. Prompt: until the first token. Token: each one after it. Medians of the rounds,",
        "and their largest less their smallest. SQNR: of the logits behind a prompt, against eager's; with random",
        "weights it tells roundings apart, not what a trained model loses.",
        "",
        "- torch.compile, static cache: model.forward compiled, with a StaticCache.",
        "- ONNX Runtime: torch.onnx.export(dynamo=True) of a step with its cache; quantize_dynamic of matmuls, int8",
        "  weights a channel, after quant_pre_process; 4-bit weights by MatMulNBitsQuantizer, blocks of 32,",
        "  accuracy_level=4.",
    ],
    "translation": [
        "T5 of the small size (60M weights, random), batch 1, as in the section generation. Prompt: the encoder reads",
        "a source, and the first token is written. ONNX Runtime: torch.onnx.export(dynamo=True) of the encoder with",
        "the keys and values that the decoder makes of it, and of a step; quantize_dynamic of both, of matmuls alone",
        "and after quant_pre_process, without which the head, tied to the embedding, is turned at each token.",
    ],
}


def section(results: Results, title: str) -> str:
    """The section of RESULTS.md."""
    from report import environment

    lines = [environment(f"{ROUNDS} rounds of processes on one thread, {TOKENS} tokens each"), "", *ABOUT[title]]
    rows = [(name, str(length)) for name in MODELS[title] for length in LENGTHS[name]]
    for model, length in rows:
        lines += [
            "",
            f"### {model}, behind a {'source' if model == 't5' else 'prompt'} of {length}",
            "",
            "| candidate | prompt, ms | token, ms | spread | times fxpress alike | SQNR | MB |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for name in candidates(model):
            found = results[model, name]
            prompt, token = statistics.median(found.prompt[length]), statistics.median(found.token[length])
            spread = max(found.token[length]) - min(found.token[length])
            own = next(ours for ours, peers in GROUPS.items() if name == ours or name in peers)
            times = token / statistics.median(results[model, own].token[length])
            error = "-" if found.sqnr_db == 0 else f"{found.sqnr_db:.1f} dB"
            size = "-" if found.megabytes == 0 else f"{found.megabytes:.0f}"
            lines.append(f"| {name} | {prompt:.0f} | {token:.1f} | {spread:.1f} | {times:.2f} | {error} | {size} |")
    return "\n".join(lines)


# --- one process -------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> None:
    """Make or time a candidate, and print what was found as JSON."""
    run = Run(**json.loads(arguments[0]))
    import torch

    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    model = _model(run.model)
    with torch.no_grad():
        print(json.dumps(_make(run, model) if run.make else _time(run, model)))


def _model(name: str) -> Any:
    """The workload's model with its head."""
    import torch
    import transformers
    from workloads import LLAMA

    torch.manual_seed(0)
    rest = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    if name == "t5":
        sizes = {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "decoder_start_token_id": 0}
        return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **rest)).eval()
    config = transformers.GPT2Config(**rest) if name == "gpt2" else transformers.LlamaConfig(**LLAMA, **rest)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def _prompt(length: int) -> dict[str, Any]:
    import torch

    ids = torch.randint(2, 30000, (1, length), generator=torch.Generator().manual_seed(length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _make(run: Run, model: Any) -> dict[str, float]:
    """Make and store a candidate; gives its megabytes, and its error where it is not the model itself."""
    import torch

    import fxpress

    given, stored = _prompt(64), Path(run.folder) / run.candidate
    if run.candidate in (EAGER, COMPILED):
        return {"sqnr_db": 0.0, "megabytes": 0.0}
    if run.candidate in OURS:
        fxpress.compile(
            model, OURS[run.candidate], given, backend="onnx", cache=True, threads=1, verify=False
        ).save(stored)  # fmt: skip
    else:
        _export(run, model, given)
    step = _generator(run, model)
    found, truth = (
        item.generate(**_prompt(128), max_new_tokens=1, output_logits=True, return_dict_in_generate=True).logits[0]
        for item in (step, model)
    )
    noise = float((found - truth).double().square().mean())
    if run.candidate in OURS:
        files = [*stored.rglob("model.safetensors")]
    else:
        files = [Path(f"{file}.data") for file in _files(run) if file.exists()]
    size = sum(file.stat().st_size for file in files) / 1e6
    return {"sqnr_db": 10 * float(torch.log10(truth.double().square().mean() / noise)), "megabytes": size}


def _files(run: Run, candidate: str = "") -> tuple[Path, Path]:
    """The files of an exported step, and of an encoder if there is one."""
    step = Path(run.folder) / f"{candidate or run.candidate}.onnx"
    return step, step.with_suffix(".encoder.onnx")


def _export(run: Run, model: Any, given: dict[str, Any]) -> None:
    """The plain export of a step and of an encoder, in fewer bits where asked for; files in fp32 are made once."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from onnxruntime.quantization.shape_inference import quant_pre_process

    from fxpress.compiler.steps import encoder_of, has_encoder, step_inputs, step_of

    plain = _files(run, ONNX)
    if not plain[0].exists():
        _to_onnx(step_of(model), step_inputs(model, given), plain[0])
        if has_encoder(model):
            _to_onnx(encoder_of(model), given, plain[1])
    for file, stored in zip(plain, _files(run), strict=True):
        if not file.exists():
            continue
        if run.candidate == ONNX_INT8:
            ready = file.with_suffix(".ready.onnx")  # weights turned: else those of a tied head are, at each token
            quant_pre_process(file, ready, save_as_external_data=True, skip_symbolic_shape=True)
            options = {"per_channel": True, "weight_type": QuantType.QInt8, "use_external_data_format": True}
            quantize_dynamic(ready, stored, op_types_to_quantize=["MatMul", "Gemm"], **options)
        elif run.candidate == ONNX_INT4:
            quantizer = MatMulNBitsQuantizer(onnx.load(file), block_size=32, is_symmetric=True, accuracy_level=4)
            quantizer.process()
            quantizer.model.save_model_to_file(str(stored), use_external_data_format=True)


def _to_onnx(module: Any, inputs: dict[str, Any], file: Path) -> None:
    """With every batch and length dynamic, from a batch of two."""
    import torch

    dynamic = torch.export.Dim.DYNAMIC
    pair = {0: dynamic, 2: dynamic}
    nested = [name for name, value in inputs.items() if isinstance(value, list)]
    sizes: dict[str, Any] = {name: [(pair, pair) for _ in inputs[name]] for name in nested}
    sizes |= {name: {0: dynamic, 1: dynamic} for name in inputs if name not in nested}
    twice = torch.utils._pytree.tree_map(lambda part: torch.cat([part, part]), inputs)
    torch.onnx.export(
        module, (), file, kwargs=twice, dynamic_shapes={name: sizes[name] for name in inputs}, dynamo=True,
        external_data=True, verbose=False,
    )  # fmt: skip


def _generator(run: Run, model: Any) -> Any:
    """What has the candidate's `generate`."""
    import torch

    import fxpress

    stored = Path(run.folder) / run.candidate
    if run.candidate in OURS:
        return fxpress.load(stored, threads=1)
    if run.candidate == COMPILED:
        model.forward = torch.compile(model.forward)
    return model if run.candidate in (EAGER, COMPILED) else _Exported(model, *_files(run))


class _Program:
    """An exported program, called as one of fxpress's own."""

    def __init__(self, file: Path, inputs: dict[str, Any], outputs: Sequence[str]) -> None:
        from candidates import session_of

        from fxpress.ir.signature import Signature, TensorInput, leaves

        self._session, self._outputs = session_of(file), outputs
        named = [pair for name, value in inputs.items() for pair in leaves(value, name)]
        found = [TensorInput(path, "", str(leaf.dtype)[6:], tuple(leaf.shape)) for path, leaf in named]
        self.signature = Signature(tuple(found), (), (), (), {})
        self._names = list(inputs)

    def __call__(self, **given: Any) -> dict[str, Any]:
        """The first output by itself, the others as pairs of keys and values."""
        import torch

        names = [item.name for item in self._session.get_inputs()]
        flat = {name: value for name, value in given.items() if name in names}
        nested = [part for name in self._names if name not in flat for pair in given[name] for part in pair]
        flat |= dict(zip((name for name in names if name not in flat), nested, strict=True))
        found = self._session.run(None, {name: value.numpy() for name, value in flat.items()})
        first, *rest = map(torch.from_numpy, found)
        return {self._outputs[0]: first, self._outputs[1]: [*zip(rest[::2], rest[1::2], strict=True)]}


class _Exported:
    """generate() on exported programs: the same way from transformers to a session as fxpress's own."""

    def __init__(self, model: Any, step: Path, encoder: Path) -> None:
        from fxpress.compiler.steps import encoder_inputs, step_inputs

        given = _prompt(4)
        self._model, self._step = model, _Program(step, step_inputs(model, given), ("logits", "past"))
        inputs = encoder_inputs(model, given)
        self._encoder = _Program(encoder, inputs, ("states", "cross")) if encoder.exists() else None

    def generate(self, **options: Any) -> Any:
        from fxpress.compiler.generation import generate

        return generate(self._model, self._step, self._encoder)(**options)


def _time(run: Run, model: Any) -> dict[str, tuple[float, float]]:
    """By length: milliseconds of a prompt, and of a token."""
    from transformers import StaticCache

    step, found = _generator(run, model), {}
    for length in run.lengths:
        given, seconds = _prompt(length), []
        for tokens in (2, 1, run.tokens + 1):  # the first is not counted: what is made at first calls
            options = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens}
            if run.candidate == COMPILED:  # of one size, so that the timed calls are compiled already
                options["past_key_values"] = StaticCache(model.config, max_cache_len=length + run.tokens + 1)
            start = time.perf_counter()
            step.generate(**given, **options)
            seconds.append(time.perf_counter() - start)
        found[str(length)] = (1000 * seconds[1], 1000 * (seconds[2] - seconds[1]) / run.tokens)
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
