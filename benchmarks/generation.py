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

MODELS, LENGTHS = ("gpt2", "llama"), (128, 896)  # tokens of prompts; GPT-2 has 1024 positions
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
    lengths: Sequence[int] = LENGTHS
    tokens: int = TOKENS


@dataclass
class Found:
    """By length, a number for each round: milliseconds of the prompt and of a token; and the stored megabytes."""

    prompt: dict[str, list[float]]
    token: dict[str, list[float]]
    sqnr_db: float = 0.0
    megabytes: float = 0.0


Results = dict[tuple[str, str], Found]


def measure(tell: Callable[[str], None], quick: bool) -> Results:
    """Everything, model after model."""
    results: Results = {}
    lengths, rounds, tokens = (LENGTHS[:1], 1, 4) if quick else (LENGTHS, ROUNDS, TOKENS)
    for model in MODELS[-1:] if quick else MODELS:
        with tempfile.TemporaryDirectory(prefix="fxpress-bench-") as folder:
            for name in CANDIDATES:
                tell(f"{model}: make {name}")
                said = _process(Run(model, name, folder, True))
                results[model, name] = Found({}, {}, said["sqnr_db"], said["megabytes"])
            for turn in range(rounds):
                for name in CANDIDATES:
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


def section(results: Results) -> str:
    """The section of RESULTS.md."""
    from report import environment

    lines = [
        environment(f"{ROUNDS} rounds of processes on one thread, {TOKENS} tokens each"),
        "",
        "GPT-2 and a small Llama (124M and 125M weights, random), batch 1, greedily by transformers' generate(), whose",
        "own time is in every figure. Prompt: until the first token. Token: each one after it. Medians of the rounds,",
        "and their largest less their smallest. SQNR: of the logits behind a prompt, against eager's; with random",
        "weights it tells roundings apart, not what a trained model loses.",
        "",
        "- torch.compile, static cache: model.forward compiled, with a StaticCache.",
        "- ONNX Runtime: torch.onnx.export(dynamo=True) of a step with its cache; quantize_dynamic with int8 weights a",
        "  channel; 4-bit weights by MatMulNBitsQuantizer, blocks of 32, accuracy_level=4.",
    ]
    for model, length in ((model, length) for model in MODELS for length in map(str, LENGTHS)):
        lines += [
            "",
            f"### {model}, behind a prompt of {length}",
            "",
            "| candidate | prompt, ms | token, ms | spread | times fxpress alike | SQNR | MB |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for name in CANDIDATES:
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
    file = stored / "model.safetensors" if run.candidate in OURS else stored.with_suffix(".onnx.data")
    size = file.stat().st_size / 1e6
    return {"sqnr_db": 10 * float(torch.log10(truth.double().square().mean() / noise)), "megabytes": size}


def _export(run: Run, model: Any, given: dict[str, Any]) -> None:
    """The plain export of a step, in fewer bits where asked for; the file in fp32 is made once."""
    import onnx
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    from fxpress.compiler.steps import step_inputs, step_of

    plain, stored = Path(run.folder) / f"{ONNX}.onnx", Path(run.folder) / f"{run.candidate}.onnx"
    if not plain.exists():
        inputs = step_inputs(model, given)
        sizes = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in inputs if name != "past"}
        pair = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
        inputs = {name: torch.cat([value, value]) if name != "past" else value for name, value in inputs.items()}
        inputs["past"] = [tuple(torch.cat([part, part]) for part in layer) for layer in inputs["past"]]
        sizes["past"] = [(pair, pair) for _ in inputs["past"]]
        torch.onnx.export(
            step_of(model), (), plain, kwargs=inputs, dynamic_shapes=sizes, dynamo=True, external_data=True,
            input_names=None, verbose=False,
        )  # fmt: skip
    if run.candidate == ONNX_INT8:
        quantize_dynamic(plain, stored, per_channel=True, weight_type=QuantType.QInt8, use_external_data_format=True)
    elif run.candidate == ONNX_INT4:
        quantizer = MatMulNBitsQuantizer(onnx.load(plain), block_size=32, is_symmetric=True, accuracy_level=4)
        quantizer.process()
        quantizer.model.save_model_to_file(str(stored), use_external_data_format=True)


def _generator(run: Run, model: Any) -> Any:
    """What has the candidate's `generate`."""
    import torch

    import fxpress

    stored = Path(run.folder) / run.candidate
    if run.candidate in OURS:
        return fxpress.load(stored, threads=1)
    if run.candidate == COMPILED:
        model.forward = torch.compile(model.forward)
    return model if run.candidate in (EAGER, COMPILED) else _Exported(model, stored.with_suffix(".onnx"))


class _Exported:
    """generate() on an exported step: the same way from transformers to a session as fxpress's own."""

    def __init__(self, model: Any, file: Path) -> None:
        from candidates import session_of

        from fxpress.compiler.steps import step_inputs

        self._model, self._session = model, session_of(file)
        self._names = [item.name for item in self._session.get_inputs()]
        self._past = step_inputs(model, _prompt(4))["past"]

    def __call__(self, **given: Any) -> dict[str, Any]:
        import torch

        flat = [part for layer in given.pop("past") for part in layer]
        values = [*given.values(), *flat]
        order = ["input_ids", "attention_mask", "position_ids"]
        named = dict(zip(order, (given[name] for name in order), strict=True))
        rest = [name for name in self._names if name not in named]
        named |= dict(zip(rest, flat, strict=True))
        assert len(named) == len(values)
        found = [torch.from_numpy(item) for item in self._session.run(None, {k: v.numpy() for k, v in named.items()})]
        return {"logits": found[0], "past": [*zip(found[1::2], found[2::2], strict=True)]}

    def generate(self, **options: Any) -> Any:
        from fxpress.compiler.generation import generate
        from fxpress.ir.signature import Signature, TensorInput

        past = [
            TensorInput(f"past.{layer}.{part}", "", "float32", tuple(value.shape))
            for layer, pair in enumerate(self._past) for part, value in enumerate(pair)
        ]  # fmt: skip
        ids = TensorInput("position_ids", "", "int64", (1, 1))
        self.signature = Signature((ids, *past), (), (), (), {})
        return generate(self._model, self)(**options)


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
