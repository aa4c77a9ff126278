"""compile(): model -> trace -> passes -> backend -> check, and the compiled model it gives."""

from __future__ import annotations

import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from ..ir.equality import Comparison, compare, run_float64
from ..ir.errors import FxpressError, InputError, VerifyError, one_line
from ..ir.graph import Program
from ..ir.padding import Padding, Real
from ..ir.rewrite import Context
from ..ir.signature import Signature, describe
from . import artifact, generation, hf, pretrained, steps
from .binding import Binder
from .calibration import check_batches, track
from .onnx_files import check_form, onnx_files, write_onnx
from .pipeline import has_masks, parameters, run_passes, zeros
from .precision import half_dtype, inner_dtype, keep_exact, narrow_inputs, narrowed, precision_loss
from .report import Report
from .runners import (
    Clock,
    OnnxRunner,
    OpenVinoRunner,
    Runner,
    best_backend,
    generated,
    make_runner,
    save_runner,
    without_collector,
)
from .settings import Settings, batches_of, checked
from .sizes import admit_ones, at_right_sizes, bound_by_tables, check_example, difference, in_order
from .statistics import statistics_file
from .trace import Arguments, bind_example, plain_attention, trace
from .verdict import judged, record


@dataclass
class _Product:
    flat: list[Tensor]  # the example
    program: Program
    traced: Program | None  # before the passes, for `verify`; its weights are shared
    runner: Runner
    report: Report
    padding: Padding | None = None  # of the canonical program, before the other passes

    def __post_init__(self) -> None:
        self.bind = Binder(self.program.signature)


@dataclass
class Compiled:
    """A compiled model. Call it like the model; without example inputs it is compiled at the first call."""

    _model: torch.nn.Module | ExportedProgram | Program
    _settings: Settings
    _origin: Any = None  # the model that the first program was traced from, in its own precision
    _decoder: Any = None  # with cache=True: the model of which it is a step
    encoder: Compiled | None = None  # with cache=True, of a model that has one: what reads the source, once
    _made: _Product | None = field(default=None, init=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the compiled model; takes and gives what the model does.

        Raises:
            InputError: inputs of another kind than the model was compiled for.
        """
        args, kwargs = narrow_inputs((args, kwargs), self._settings.dtype)
        if self._made is None:
            self._make((args, kwargs))
        made = self._product
        return pytree.tree_unflatten(made.runner.run(made.bind(args, kwargs)), made.program.out_spec)

    def generate(self, *args: Any, **options: Any) -> Any:
        """transformers' `generate` of the model, with every step computed by this one; compiled with cache=True.

        Raises:
            InputError: compiled without, or an option of generate that needs more of the model than a step gives.
        """
        return generation.generate(self._decoder, self, self.encoder)(*args, **options)

    def verify(self, inputs: Any) -> Comparison:
        """How far the compiled model is from the model on other inputs, judged by an fp64 run of the model.

        Where a pass removed padding, outputs are compared at tokens alone.

        Args:
            inputs: a dict of named or a tuple of positional inputs; with cache=True a prompt, or what a step takes.

        Raises:
            InputError: inputs that it was not compiled for or that its graph does not hold at, or it was compiled
                with verify=False.
        """
        made, traced = self._product, self.traced
        args = self._arguments(inputs)
        tensors = made.program.signature.bind(*args)
        module = self._model.module() if isinstance(self._model, ExportedProgram) else self._model
        eager = pytree.tree_leaves(_run_model(module, args))
        try:
            judge = run_float64(traced, tensors)
            with torch.no_grad():
                again = traced.run(tensors)
        except RuntimeError as error:  # torch.export may fix what depends on a size, such as a number of chunks
            raise InputError(f"the traced graph does not hold at these sizes: {one_line(error)}") from error
        real: Real = list
        if made.padding is not None and not all(item.keeps_padding for item in self._settings.passes):
            real = made.padding.left_out(tensors)
        found, usual, truth, graph = map(real, (made.runner.run(tensors), eager, judge, again))
        names = made.program.signature.outputs
        verdict = compare(found, usual, truth, names)
        # The judge is the graph's fp64 run: of a graph that is not the model's it would take eager for imprecise.
        problems = [(name, difference(*pair)) for name, *pair in zip(names, graph, usual, strict=True)]
        wrong = [f"the traced graph is not the model: {name} {problem}" for name, problem in problems if problem]
        return dataclasses.replace(verdict, reasons=(*wrong, *verdict.reasons))

    @property
    def report(self) -> Report:
        """What each pass changed, refused and why; size; error against the model; time."""
        made = self._product
        made.report.tuned = getattr(made.runner, "tuned", [])
        return made.report

    @property
    def program(self) -> Program:
        """The rewritten program; `program.module` is a trainable torch.fx.GraphModule."""
        return self._product.program

    @property
    def signature(self) -> Signature:
        """Its inputs and outputs: names, shapes, dtypes, and the sizes that may vary."""
        return self._product.program.signature

    @property
    def source(self) -> str:
        """The generated module of the triton backend: kernels, and a `forward` that launches them.

        Raises:
            InputError: another backend was chosen.
        """
        return generated(self._product.runner, "source")

    @property
    def plan(self) -> str:
        """What the triton backend launches after what, in Graphviz's language (`dot -Tsvg`).

        Raises:
            InputError: another backend was chosen.
        """
        return generated(self._product.runner, "plan")

    @property
    def traced(self) -> Program:
        """The program before the passes; its weights are those of `program`.

        Raises:
            InputError: the model was compiled with verify=False, which keeps none.
        """
        if self._product.traced is None:
            raise InputError("the model was compiled with verify=False, which keeps nothing to judge by")
        return self._product.traced

    def save(
        self, path: str | os.PathLike[str], archs: Sequence[int] | None = None, examples: Iterable[Any] = ()
    ) -> None:
        """Save as a new folder that `fxpress.load` reads.

        Args:
            archs: of GPUs (90: sm_90) for which the triton backend compiles the kernels, so that Triton does not do so
                when the model first runs there; none of them need be here. None: the GPU that is here, if there is one.
            examples: inputs of other sizes than the example's, for which it compiles kernels too.

        Raises:
            InputError: the folder exists or cannot be written, the backend is eager, or an option is of no use to it.
            LoweringError: a kernel cannot be compiled for one of the GPUs.
        """
        made = self._product
        examples = list(examples)
        bound = [made.program.signature.bind(*self._arguments(item)) for item in examples]
        write = functools.partial(
            save_runner, made.runner, program=made.program, report=self.report, example=made.flat, archs=archs,
            others=bound, dtype=self._settings.dtype, tune=self._settings.tune,
        )  # fmt: skip
        extra = generation.config_files(self._decoder)
        if self.encoder is None:
            write(Path(path), extra=extra)
            return
        with artifact.new_folder(Path(path)) as folder:
            self.encoder.save(folder / artifact.ENCODER, archs, steps.sources(self._decoder, examples))
            write(folder / artifact.DECODER, extra={**extra, artifact.PAIR: artifact.digest(folder / artifact.ENCODER)})

    def to_onnx(self, path: str | os.PathLike[str], form: str = "runtime") -> None:
        """Write the ONNX model as a file, with its weights beside it: `model.onnx`, `model.safetensors`.

        Args:
            form: "runtime": as it runs here, with the kernels of ONNX Runtime that were measured the fastest. "qdq":
                operators of the ONNX standard alone, for any runtime; integers between QuantizeLinear and
                DequantizeLinear. The backend may be eager then.

        Raises:
            InputError: one of the files exists or cannot be written, or the backend is not onnx.
            LoweringError: a node cannot be written in the standard.
        """
        check_form(form)
        if form == "runtime":
            write_onnx(self._onnx_runner().files, Path(path))
            return
        from ..backends.onnx.export import save, standard_form, to_standard_onnx

        for file in onnx_files(Path(path)):
            artifact.check_new(file)
        model = to_standard_onnx(standard_form(self.program))
        with tempfile.TemporaryDirectory(prefix="fxpress-") as folder:
            save(model, Path(folder) / artifact.MODEL)
            write_onnx(Path(folder), Path(path))

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write a new folder, config.json and model.safetensors, that the transformers model's class reads.

        Weights may be zero, trained, or cut alike in every layer: neurons, whole layers, heads where the config has a
        size for them. What is written is read back and must equal the program on the example. The backend may be any.

        Raises:
            InputError: the model is none of transformers, its config cannot express the program (names what), or the
                folder exists or cannot be written.
        """
        made = self._product
        pretrained.write(self._origin, made.program, made.traced, made.flat, Path(path))

    def _arguments(self, inputs: Any) -> Arguments:
        """Inputs like the example as arguments of the program: of a step with its cache, a prompt's or its own."""
        if self._decoder is not None and steps.PAST not in inputs:
            inputs = steps.step_inputs(self._decoder, inputs)
        narrow: Arguments = narrow_inputs(_as_arguments(inputs), self._settings.dtype)
        return narrow

    @property
    def _product(self) -> _Product:
        if self._made is None:
            raise InputError("the model is not compiled yet: call it once, or give compile() example_inputs")
        return self._made

    def _onnx_runner(self) -> OnnxRunner:
        runner = self._product.runner
        if not isinstance(runner, OnnxRunner):
            raise InputError(
                f"only the onnx backend has such a file, this is {runner.name!r}; give form='qdq', or backend='onnx'"
            )
        return runner

    def then(
        self,
        passes: Any,
        backend: str = "auto",
        calibration: Iterable[Any] = (),
        *,
        max_rewrites: int | None = None,
        threads: int | None = None,
    ) -> Compiled:
        """The program with more passes, as another compiled model: after training, or for another backend.

        What `verify` and the report compare with is then this program as it is now, not the model. Arguments and
        errors are those of `compile`.
        """
        made, old, encoder = self._product, self._settings, self.encoder
        if self._decoder is not None:
            calibration = batches_of(calibration)
            if encoder is not None:
                data = steps.sources(self._decoder, calibration)
                encoder = encoder.then(passes, backend, data, max_rewrites=max_rewrites, threads=threads)
            calibration = steps.prompts(self._decoder, calibration)
        settings = checked(passes, old.dynamic_shapes, backend, calibration, old.verify, max_rewrites, threads)
        settings.tune, settings.inside = old.tune, old.inside if backend == "openvino" else None
        settings.dtype, settings.elsewhere = old.dtype, old.elsewhere
        settings.calibration = [narrow_inputs(batch, old.dtype) for batch in settings.calibration]
        signature = made.program.signature
        paths = [tensor.path for tensor in signature.inputs]
        check_batches(
            settings.calibration,
            ((), dict(zip(paths, made.flat, strict=True))),
            lambda batch: ((), dict(zip(paths, signature.bind(*_as_arguments(batch)), strict=True))),
        )
        model = made.program.copy()
        found = Compiled(model, settings, self._origin, self._decoder, encoder)
        report = Report(made.report.model, fixed=made.report.fixed)
        with torch.no_grad(), without_collector():
            eager = list(model.run(made.flat))
            found._made = _rewritten(report, model.copy(), made.flat, eager, settings, Clock())
        return found

    def _make(self, example: Arguments) -> None:
        with without_collector():
            assert not isinstance(self._model, Program)  # it is made at once
            self._made = _compile(self._model, self._origin, self._settings, example)
            if self._settings.dtype is not None and self._settings.verify:
                loss = precision_loss(self._origin, self._made.program, self._made.flat, example)
                self._made.report.precision = {"dtype": str(self._settings.dtype).removeprefix("torch."), **loss}


def compile(
    model: torch.nn.Module | ExportedProgram,
    passes: Any = None,
    example_inputs: Any = None,
    dynamic_shapes: Any = "auto",
    backend: str = "auto",
    calibration: Iterable[Any] = (),
    *,
    verify: bool = True,
    max_rewrites: int | None = None,
    threads: int | None = None,
    dtype: str | None = None,
    tune: bool = True,
    cache: bool = False,
) -> Compiled:
    """Compile a model.

    Args:
        model: an nn.Module in evaluation mode, Hugging Face or plain, or torch.export's ExportedProgram. Not changed.
        passes: passes (objects, or texts as on the command line); None: exact optimisation; []: no rewrite.
        example_inputs: a dict of named or tuple of positional inputs; None: compile at the first call, on its inputs.
        dynamic_shapes: "auto": every axis that can vary stays dynamic; None: all sizes fixed; or torch.export's form.
        backend: "onnx" (ONNX Runtime), "openvino", "triton", "eager", or "auto": triton where the inputs are on CUDA,
            else onnx.
        calibration: inputs like `example_inputs`, for passes that fit or measure something on data.
        verify: measure the error of each pass and of the result on the example, and fail if exact passes changed it.
        max_rewrites: stop rewriting after so many rewrites, to find the one that breaks a model.
        threads: threads inside one operator; None: one a physical core.
        dtype: "bfloat16" or "float16": compile a copy of the model in half precision, for the triton or eager backend.
            Float inputs are cast; the report says what that lost against the model as it is. "bfloat16" with openvino:
            the model stays as it is, and matmuls are computed in bfloat16 if this processor has it.
        tune: measure the ways to run an operator and keep the fastest, on disk too; False: the first one runs.
        cache: compile a decoder of transformers as a step of `generate`, with the keys and values of earlier tokens
            (generation.py says what it takes). Examples and calibration are prompts.

    Raises:
        InputError, TraceError, RewriteError, VerifyError, LoweringError: one line: cause, place, next step.
    """
    if not isinstance(model, torch.nn.Module | ExportedProgram):
        raise InputError(f"model must be an nn.Module or ExportedProgram, found {describe(model)}")
    if isinstance(model, torch.nn.Module) and any(module.training for module in model.modules()):
        raise InputError("the model is in training mode, where dropout is random; call model.eval() first")
    settings = checked(passes, dynamic_shapes, backend, calibration, verify, max_rewrites, threads)
    settings.dtype, settings.tune = half_dtype(dtype, model, backend), tune
    settings.inside = inner_dtype(dtype, backend)
    decoder = model if cache else None
    encoder = None
    if cache:
        data, prompt = settings.calibration, example_inputs
        model, example_inputs, settings.calibration = steps.prepare(model, example_inputs, data)
        if steps.has_encoder(decoder):
            encoder = compile(
                steps.encoder_of(decoder), settings.passes, steps.encoder_inputs(decoder, prompt), dynamic_shapes,
                backend, steps.sources(decoder, data), verify=verify, max_rewrites=max_rewrites, threads=threads,
                dtype=dtype, tune=tune,
            )  # fmt: skip
    settings.elsewhere = steps.elsewhere(model)
    settings.calibration = [narrow_inputs(batch, settings.dtype) for batch in settings.calibration]
    compiled = Compiled(narrowed(model, settings.dtype), settings, model, decoder, encoder)
    if isinstance(model, ExportedProgram):
        compiled._make(model.example_inputs or ((), {}))
    elif example_inputs is not None:
        compiled._make(narrow_inputs(bind_example(model, example_inputs), settings.dtype))
    return compiled


def _compile(model: torch.nn.Module | ExportedProgram, origin: Any, settings: Settings, example: Arguments) -> _Product:
    clock = Clock()
    module = model.module() if isinstance(model, ExportedProgram) else model
    bind = _as_arguments if isinstance(model, ExportedProgram) else functools.partial(bind_example, model)
    check_batches(settings.calibration, example, bind)
    with clock("eager"):
        eager = _run_model(module, example)
    with clock("trace"):
        program = trace(model, example, settings.dynamic_shapes)
    fixed: dict[tuple[str, int], str] = {}
    if isinstance(model, torch.nn.Module):
        if settings.dtype is not None and keep_exact(program, model, origin):
            with clock("eager"):
                eager = _run_model(module, example)
        step = isinstance(model, steps.Step)
        again = functools.partial(trace, model, example) if settings.dynamic_shapes == "auto" and not step else None
        with clock("check sizes"):
            admit = steps.admit if step else admit_ones
            program, fixed = at_right_sizes(program, model, example, admit, again)
            if settings.verify:
                check_example(program, in_order(program, example), pytree.tree_leaves(eager))
    bound_by_tables(program)
    report = Report(type(module).__name__, fixed=[f"axis {at} of {path!r}: {why}" for (path, at), why in fixed.items()])
    return _rewritten(report, program, in_order(program, example), pytree.tree_leaves(eager), settings, clock)


def _rewritten(
    report: Report, program: Program, flat: list[Tensor], eager: list[Any], settings: Settings, clock: Clock
) -> _Product:
    """Passes, backend and check of a program whose weights it may take over; `eager` are its outputs on `flat`."""
    backend = best_backend(flat) if settings.backend == "auto" else settings.backend
    report.backend = backend
    report.ranges = dict(program.signature.ranges)
    report.bytes_before, report.parameters_before = weight_bytes(program), parameters(program)
    had_masks = has_masks(program)  # those of a program that was trained
    expected, traced = None, None
    if settings.verify:
        traced = program.copy()
        with clock("fp64 judge"):
            expected = (eager, run_float64(program, flat))
    with clock("passes"):
        calibration = [program.signature.bind(*_as_arguments(batch)) for batch in settings.calibration]
        context = Context(
            flat, calibration, settings.max_rewrites, track=track, statistics=statistics_file,
            elsewhere=settings.elsewhere,
        )  # fmt: skip
        if backend == "onnx":
            from ..backends.onnx.measure import seconds

            context.seconds = functools.partial(seconds, threads=settings.threads)
        passed = run_passes(program, settings.passes, context, expected)
    report.passes, report.reshaped = passed.reports, passed.reshaped
    report.ranges = dict(program.signature.ranges)  # passes may let sizes be larger
    report.macs_before, report.macs_after = passed.macs_before, passed.macs_after
    report.parameters_after = parameters(program)
    if had_masks or any(item.sparsity for item in report.passes):
        report.zeros, report.masked = zeros(program), has_masks(program)
    runner = make_runner(backend, program, settings.threads, clock, settings.tune, settings.inside)
    report.launches, report.memory = getattr(runner, "launches", []), getattr(runner, "memory", {})
    if isinstance(runner, OnnxRunner | OpenVinoRunner):
        report.choices = [asdict(item) for item in getattr(runner, "choices", ())]
        report.bytes_after = sum(file.stat().st_size for file in runner.files.iterdir())
    else:
        written = getattr(runner, "generated", None)  # the triton backend's weights may be compressed
        report.choices = [] if written is None else list(written.choices)
        report.bytes_after = weight_bytes(program if written is None else written.program)
    if expected is not None:
        with clock("verify"):
            whole = all(item.exact and item.keeps_padding for item in settings.passes)
            verdict = judged(runner.run(flat), *expected, program.signature.outputs, passed, whole)
        record(report, verdict)
        if settings.inside is not None:
            report.precision = {"dtype": settings.inside, "sqnr_db": verdict.sqnr_db, "cosine": verdict.cosine}
        elif not verdict.equal and all(item.exact for item in settings.passes):
            raise VerifyError(
                f"backend {backend}: the result is not that of the model: {verdict.reasons[0]}; "
                "try passes=[] and, if that is right, max_rewrites to find the rewrite"
            )
    report.seconds = clock.seconds
    return _Product(flat, program, traced, runner, report, passed.padding)


def _run_model(module: Callable[..., Any], example: Arguments) -> Any:
    """The model's own result; also shows that model and example fit before any work is done."""
    hf.register_caches()
    try:
        with torch.no_grad(), plain_attention():
            return module(*pytree.tree_map(_cloned, example[0]), **pytree.tree_map(_cloned, example[1]))
    except Exception as error:
        raise InputError(f"the model itself fails on the example inputs: {one_line(error)}") from error


def _cloned(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _as_arguments(batch: Any) -> Arguments:
    """Inputs as arguments; a mapping may be no dict, as what a tokenizer gives.

    Raises:
        InputError: neither named nor positional inputs.
    """
    if not isinstance(batch, Mapping | tuple | list):
        raise InputError(f"inputs must be a dict of named or a tuple of positional ones, found {describe(batch)}")
    return ((), dict(batch)) if isinstance(batch, Mapping) else (tuple(batch), {})


def weight_bytes(program: Program) -> int:
    """Bytes of a program's weights, tied ones counted once."""
    tensors = [*program.module.parameters(), *program.module.buffers()]
    return sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


__all__ = ["Compiled", "FxpressError", "compile"]
