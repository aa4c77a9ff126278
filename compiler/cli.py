"""The command line: `fxpress compile | inspect | bench | demo | families`.

Exit status: 0; 2 with one line for bad input; 1 with one line for any other failure; a traceback only with --debug.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..ir.errors import ArtifactError, FxpressError, InputError, one_line

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from ..ir.rewrite import Pass
    from .calibration_files import CalibrationFile

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compile PyTorch Transformer models: trace, rewrite, lower to ONNX, verify.",
)
out = Console()

ModelDir = Annotated[
    Path, typer.Argument(help="Folder of a Hugging Face model: config.json and model.safetensors.", show_default=False)
]
Passes = Annotated[
    str | None,
    typer.Option(help="Passes, e.g. 'canonicalize, fuse'; '' for none; left out: exact optimisation (fuse)."),
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads inside one operator; left out: one a core.")]
Backend = Annotated[str, typer.Option(help="What runs it: onnx (ONNX Runtime) or openvino.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="bfloat16, with --backend openvino: what matmuls are computed in, where the processor has it."),
]
Cache = Annotated[
    bool, typer.Option("--cache", help="As a step with its key/value cache, for fxpress.load(OUT).generate(...).")
]
Batch = Annotated[int, typer.Option(min=1, help="Batch size of the example (it stays dynamic).")]
Calibration = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Typical inputs, for passes that fit or measure something on data: .txt, one text a line, read by the "
        "tokenizer in MODEL_DIR; or .safetensors, a tensor for each input, its first axis counting samples.",
    ),
]
RECORD = Path("docs/families.jsonl")
Length = Annotated[int, typer.Option(min=1, help="Length in tokens of the example (it stays dynamic).")]


@contextmanager
def _stage(text: str) -> Iterator[None]:
    """A spinner on a terminal while something takes longer than a second."""
    with out.status(text) if out.is_terminal else _nothing():
        yield


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _say(text: str) -> None:
    """A line as it is: names of files are neither markup nor broken."""
    out.print(text, markup=False, highlight=False, soft_wrap=True)


@app.command("compile")
def compile_command(
    model_dir: ModelDir,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make for the compiled model.")],
    passes: Passes = None,
    calibration: Calibration = None,
    heatmap: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw what pruning left of each layer, as .png or .svg; needs matplotlib."),
    ] = None,
    batch: Batch = 2,
    length: Length = 16,
    threads: Threads = None,
    backend: Backend = "onnx",
    dtype: Dtype = None,
    cache: Cache = False,
) -> None:
    """Compile a pretrained model to a folder that fxpress.load() reads, and print the report."""
    from . import artifact, hf
    from .driver import compile

    chosen = _passes(passes)
    data = _calibration(calibration, chosen)
    _check_backend(backend, dtype)
    artifact.check_new(output)
    if heatmap is not None:
        _check_heatmap(heatmap, output, chosen)
    with _stage("loading the model"):
        model = hf.load_model(model_dir)
    inputs = hf.example_inputs(model, batch, length)
    batches = _batches(data, model_dir, model, inputs)
    with _nothing() if batches else _stage("compiling"):  # a bar shows how far calibration is
        compiled = compile(
            model, chosen, inputs, backend=backend, calibration=batches, threads=threads, dtype=dtype, cache=cache
        )
        compiled.save(output)
    if compiled.encoder is not None:
        out.print("The encoder, which reads a source once:")
        out.print(compiled.encoder.report)
        out.print("The decoder, a step:")
    out.print(compiled.report)
    _say(f"saved to {output}")
    if heatmap is not None:
        compiled.report.save_heatmap(heatmap)
        _say(f"heatmap in {heatmap}")


@app.command()
def inspect(
    model_dir: ModelDir,
    passes: Passes = None,
    calibration: Calibration = None,
    explain: Annotated[
        str | None,
        typer.Option(
            metavar="PASS", help="Print what this pass matched, and each near miss and refusal with its reason."
        ),
    ] = None,
    batch: Batch = 2,
    length: Length = 16,
) -> None:
    """Print a model's graph after the passes (none with --passes ''), or why a pass did not rewrite."""
    from ..ir.printer import print_program
    from . import hf
    from .driver import compile
    from .pipeline import check_name
    from .report import explain as explained

    chosen = _passes(passes)
    if explain is not None:
        check_name(explain)
        if not any(item.pass_name() == explain for item in chosen):
            raise InputError(f"--explain {explain}: that pass does not run; name it in --passes, too")
    data = _calibration(calibration, chosen)
    model = hf.load_model(model_dir)
    inputs = hf.example_inputs(model, batch, length)
    batches = _batches(data, model_dir, model, inputs)
    with _nothing() if batches else _stage("tracing"):
        compiled = compile(model, chosen, inputs, backend="eager", calibration=batches, verify=False)
    if explain is None:
        out.print(print_program(compiled.program), markup=False, highlight=False, soft_wrap=True, end="")
        return
    for item in compiled.report.passes:
        if item.name.partition("(")[0] == explain:
            out.print(explained(item), highlight=False)


@app.command()
def bench(
    model_dir: ModelDir,
    passes: Passes = None,
    calibration: Calibration = None,
    batch: Batch = 2,
    length: Length = 128,
    threads: Threads = 1,
    backend: Backend = "onnx",
    dtype: Dtype = None,
) -> None:
    """Measure a model's latency compiled and in eager PyTorch, in turn, and the error beside it."""
    from . import hf
    from .demo import race
    from .driver import compile

    chosen = _passes(passes)
    data = _calibration(calibration, chosen)
    _check_backend(backend, dtype)
    model = hf.load_model(model_dir)
    inputs = hf.example_inputs(model, batch, length)
    batches = _batches(data, model_dir, model, inputs)
    with _nothing() if batches else _stage("compiling"):
        compiled = compile(model, chosen, inputs, backend=backend, calibration=batches, threads=threads, dtype=dtype)
    with _stage("measuring"):
        eager, ours = race([lambda: model(**inputs), lambda: compiled(**inputs)], threads)
    out.print(compiled.report.summary(), highlight=False)
    out.print(f"batch {batch}, length {length}: eager {eager:.2f} ms, fxpress {ours:.2f} ms ({eager / ours:.2f}x)")


@app.command()
def demo(
    threads: Threads = 1,
    model_dir: Annotated[Path | None, typer.Option(help="Another sentence encoder than all-MiniLM-L6-v2.")] = None,
) -> None:
    """Compile a pretrained sentence encoder, verify it, and compare size, speed and search results."""
    from .demo import run

    run(out, model_dir, threads)


@app.command()
def families(
    names: Annotated[list[str] | None, typer.Argument(help="Families to try; left out: all.")] = None,
    write_readme: Annotated[bool, typer.Option("--write-readme", help="Write the table into ./README.md.")] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Every family that transformers knows, in processes of their own.")
    ] = False,
    write: Annotated[Path | None, typer.Option(help="With --all: the Markdown file to write.")] = None,
    record: Annotated[Path, typer.Option(help="With --all: the outcomes so far, as JSON lines.")] = RECORD,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="With --all: keep the outcomes recorded so far; families named are retried."),
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="With --all: families at a time.")] = 2,
) -> None:
    """Compile a tiny model of each family and compare it with eager PyTorch at several sizes."""
    if everything:
        if write_readme:
            raise InputError("--write-readme is for the table of a few families; give --write FILE with --all")
        _survey(names or [], write, record, resume, workers)
        return
    if write is not None or resume:
        raise InputError(f"{'--resume' if write is None else '--write'} is for every family; give it with --all")
    from . import families as table

    table.check_names(names or [])
    results = []
    for name in table.names(names or []):
        with _stage(f"compiling {name}"):
            results.append(table.try_named(name))
    out.print(table.as_table(results))
    if write_readme:
        table.write_readme(Path("README.md"), results)
    if not all(result.equal for result in results):
        raise FxpressError(f"not equal: {', '.join(result.name for result in results if not result.equal)}")


def _survey(names: list[str], write: Path | None, record: Path, resume: bool, workers: int) -> None:
    from rich.progress import Progress

    from . import survey, survey_models, survey_table

    survey_models.check_names(names)
    record.parent.mkdir(parents=True, exist_ok=True)
    if not resume:
        record.unlink(missing_ok=True)
    done = survey.recorded(record)
    waiting = names or [name for name in survey_models.families() if name not in done]
    try:
        with Progress(console=out, auto_refresh=False) as progress:  # no thread may run where processes are forked
            task = progress.add_task("families", total=len(waiting))
            for outcome in survey.run(waiting, record, workers):
                done[outcome.family] = outcome
                state = "ok" if outcome.stage == "ok" else f"{outcome.stage}: {outcome.reason}"
                progress.console.print(f"{outcome.family}: {state}", markup=False, highlight=False, soft_wrap=True)
                progress.update(task, advance=1, refresh=True)
    finally:  # also what an interrupted run has seen
        survey.keep(record, done.values())
        if write is not None:
            survey_table.write(write, done.values())
    wrong = [outcome.family for outcome in done.values() if outcome.stage in ("equal", "bug")]
    if wrong:
        raise FxpressError(f"wrong results or bugs: {', '.join(sorted(wrong))}")


def _check_heatmap(path: Path, output: Path, passes: Sequence[Pass]) -> None:
    """Refuse a heatmap that cannot be drawn, before any work is done."""
    from ..passes import MaskWeights
    from .heatmap import check

    check(path)
    if path.resolve() == output.resolve():
        raise InputError(f"--heatmap and --output are both {str(path)!r}; give two paths")
    if not any(isinstance(item, MaskWeights) for item in passes):
        raise InputError("--heatmap draws what pruning left: give --passes with mask_weights")


def _check_backend(backend: str, dtype: str | None) -> None:
    """Refuse what cannot run here, before the model is loaded."""
    from .precision import inner_dtype
    from .runners import check_installed

    if backend not in ("onnx", "openvino"):
        raise InputError(f"--backend is onnx or openvino, found {backend!r}")
    if dtype is not None and backend != "openvino":
        raise InputError("--dtype is for --backend openvino: ONNX Runtime's CPU kernels are of float32")
    check_installed(backend)
    inner_dtype(dtype, backend)


def _calibration(path: Path | None, passes: Sequence[Pass]) -> CalibrationFile | None:
    """What a file holds, checked before the model is loaded; passes that need data and get none are refused."""
    from .calibration_files import read

    needed = next((item for item in passes if item.needs_calibration), None)
    if path is not None:
        if all(item.exact for item in passes):
            raise InputError("--calibration is for passes that fit something on data: give --passes with one of them")
        return read(path)
    if needed is not None:
        raise InputError(f"pass {needed}: {needed.needs_calibration} needs calibration data; give --calibration FILE")
    return None


def _batches(data: CalibrationFile | None, folder: Path, model: Module, example: Any) -> list[dict[str, Tensor]]:
    """The calibration data as inputs of the model; says what they are made of."""
    if data is None:
        return []
    made = data.batches(folder, model, example)
    out.print(f"calibration: {made.summary}", highlight=False)
    return made.batches


def _passes(given: str | None) -> Sequence[Pass]:
    """The passes of an option, checked before any work is done."""
    from .pipeline import parse_passes

    return parse_passes([] if given is not None and not given.strip() else given)


def main() -> None:
    """Run the command line and exit."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for name in ("torchao", "torch.utils._pytree"):  # where torchao is installed, transformers imports it
        logging.getLogger(name).setLevel(logging.ERROR)
    errors = Console(stderr=True)
    try:
        app(arguments, standalone_mode=True)
    except FxpressError as error:
        if debug:
            raise
        errors.print(f"fxpress: {one_line(error, 2000)}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2 if isinstance(error, InputError | ArtifactError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # the last resort: one line, and how to see more
        if debug:
            raise
        text = f"fxpress: {type(error).__name__}: {one_line(error)} (run again with --debug for the traceback)"
        errors.print(text, markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
