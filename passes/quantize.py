"""Quantize: weights, and where asked activations, as numbers of few bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch

from ..ir import checks
from ..ir.calibration.lockstep import Lockstep, blaming
from ..ir.calibration.statistics import Nothing, Statistics, fingerprints
from ..ir.calibration.target import Metric, Target
from ..ir.errors import InputError, RewriteError
from ..ir.expand import expand
from ..ir.graph import Program, shape
from ..ir.layers import check_finite, check_patterns, name_of
from ..ir.ops.attention import attention
from ..ir.ops.padding import packed_attention
from ..ir.pattern import Refusal
from ..ir.pruning.masks import masked
from ..ir.quantization import grid as grids
from ..ir.quantization import tables
from ..ir.quantization.absorb import absorb
from ..ir.quantization.attention import attentions, in_integers, ranges
from ..ir.quantization.attention import name_of as module_of
from ..ir.quantization.choice import UNTOUCHED, Choice
from ..ir.quantization.fold import fold
from ..ir.quantization.insert import Insertion
from ..ir.quantization.method import IMPROVEMENTS, RANGES, check_method, check_use, words_of
from ..ir.quantization.options import Data, Way, options, plain, refined, rounded
from ..ir.quantization.precision import Place, applied, closest, search, split
from ..ir.quantization.record import FORMAT, Record
from ..ir.quantization.requantize import requantize
from ..ir.quantization.sites import Site, least, linear_sites, quantized_by
from ..ir.rewrite import Applied, Context, Pass, PassResult, Track

aten = torch.ops.aten
FLOAT8 = "float8_e4m3"
BITS = {"int8": 8, "int4": 4, FLOAT8: 8}
GROUP = 32  # numbers of 4 bits that share a scale
_NEAR = 1.1  # times the smallest noise
COSINE = 0.995  # of the outputs, where no target is given and layers are made finer by their sensitivity


@dataclass(frozen=True)
class Quantize(Pass):
    """Quantize linear layers and embeddings, and let matmuls of integers or of float8 compute the linear layers.

        before:  %y = aten.linear(%x, @w, @b)
        after:   %q, %s, %z = fxpress.dynamic_quantize(%x, 'token', stored=True)
                 %y = fxpress.int8_linear(%q, %s, %z, @integers, @scale, @b)

    What `fold=False` leaves in the graph, `quantize` and `dequantize` around activations and weights, gives the same
    numbers in eager PyTorch and can be trained; the pass `fold` makes integers of it.

    Attributes:
        weights: "int8" or "float8_e4m3", a scale for each output channel; "int4", for each group of a row.
        activations: "int8", for weights of "int8", or of "int4", which are integers of 8 bits as soon as the model is
            loaded; "float8_e4m3", for weights that are, a scale for each token; None: linear layers read floats;
            "auto": "int8" where the weights are, else None.
        mode: "dynamic": ranges of activations are taken at run time; "static": from calibration data, one for all of
            an activation; "auto": each layer's as the target allows, static ones being the fastest, and dynamic without
            calibration data.
        granularity: of dynamic ranges: "tensor", one for all of an activation, which then depends on what else is in
            the batch; "token", one for each row; "auto": with calibration data each layer's as the target allows,
            without any "token".
        group_size: numbers of a weight's row that share a scale, a power of two; None: 32 for "int4", else all.
        symmetric: no zero point; None: for int8 weights and activations by token.
        method: words joined by "+". One of "minmax", "average" (moving, over batches), "percentile", "entropy" and
            "mse" gives static ranges of activations; "minmax" alone rounds everything to nearest. "smoothquant":
            outliers of activations go to the weights, by a scale that is searched; "gptq" and "awq": weights that fit
            the calibration data; "bias": mean errors go to the bias. "auto": with calibration data
            minmax+smoothquant+gptq+bias, for weights alone gptq.
        embeddings: "int8", a scale for each row; "int4", for each group of 32 numbers of a row; None: they stay.
        attention: "int8": its two matmuls multiply integers, with a scale for each token, or with mode="static" fixed
            ones from calibration data; None: they stay.
        skip: names of modules, with * and ?, or of parts of them: those layers stay.
        sensitive: "auto": with calibration data, layers are made finer until the outputs reach the target; None: no
            layer is.
        min_cosine, min_sqnr_db: targets over the calibration data: mean cosine of the output vectors with the model's,
            or signal to noise in dB; the worst output counts; layers of 4 bits become finer by 8. Neither: 0.995, but
            with "int4" none: integers beside it have the fastest ranges within a tenth of each layer's least noise.
        metric, min_metric: instead, a score of (outputs, the model's outputs), and what it is to reach; None: 0.
        fold: whether integers are stored and multiplied, or quantize and dequantize left for training.
        requantize: with mode="static", integers become the integers of the next layer without floats between them where
            nothing else reads these; for processors without floats: ONNX Runtime does it in int64.
        statistics: a `.safetensors` file that keeps what calibration found: a run that was interrupted goes on where it
            stopped, one that is repeated calibrates no more. It is of one model, calibration data and options.
    """

    exact: ClassVar[bool] = False

    weights: str = "int8"
    activations: str | None = "auto"
    mode: str = "auto"
    granularity: str = "auto"
    group_size: int | None = None
    symmetric: bool | None = None
    method: str = "auto"
    embeddings: str | None = "int8"
    skip: Sequence[str] = ()
    sensitive: str | None = "auto"
    min_cosine: float | None = None
    min_sqnr_db: float | None = None
    metric: Metric | None = field(default=None, repr=False)
    min_metric: float | None = None
    fold: bool = True
    attention: str | None = None
    requantize: bool = False
    statistics: str | None = None

    def __post_init__(self) -> None:
        for option in ("fold", "requantize"):
            checks.of_kind(option, getattr(self, option), bool)
        checks.of_kind("statistics", self.statistics, str, None)
        checks.of_kind("symmetric", self.symmetric, bool, None)
        checks.of_kind("group_size", self.group_size, int, None)
        for option in ("min_cosine", "min_sqnr_db", "min_metric"):
            checks.of_kind(option, getattr(self, option), float, int, None)
        checks.one_of("weights", self.weights, BITS)
        checks.one_of("activations", self.activations, ("auto", "int8", FLOAT8, None))
        checks.one_of("mode", self.mode, ("auto", "dynamic", "static"))
        checks.one_of("granularity", self.granularity, ("auto", "tensor", "token"))
        checks.one_of("embeddings", self.embeddings, ("int8", "int4", None))
        checks.one_of("attention", self.attention, ("int8", None))
        checks.one_of("sensitive", self.sensitive, ("auto", None))
        checks.names("skip", self.skip)
        check_method(self.method)
        size = self.group_size
        if size is not None and (size < 16 or size & (size - 1)):
            raise InputError(f"group_size must be a power of two of 16 or more, found {size}")
        self._check_kinds()
        if size is not None and self._level != "float" and self.weights != "int4":
            raise InputError("int8 matmuls take one scale a row; give activations=None for a group_size")
        self._check_ranges()
        check_use(self.method, self._level, self.mode)
        if self.statistics is not None:
            place = Path(self.statistics)
            if place.suffix != ".safetensors" or not place.parent.is_dir():
                raise InputError(
                    f"statistics must be a .safetensors file in a folder that exists, found {self.statistics!r}"
                )
        self._check_targets()

    def _check_kinds(self) -> None:
        """Refuse activations that no kernel multiplies by the weights, and what float8 has not."""
        if (self.activations == FLOAT8 and self.weights != FLOAT8) or (
            self.activations == "int8" and self.weights == FLOAT8
        ):
            raise InputError(f"activations are {self.activations}, weights {self.weights}: give both alike, or None")
        if self.weights != FLOAT8:
            return
        if self.group_size is not None:
            raise InputError("weights of float8_e4m3 have one scale a row; leave group_size out")
        if self.symmetric is False:
            raise InputError("float8_e4m3 has no zero point; leave symmetric out")
        if self.activations == FLOAT8 and (self.mode == "static" or self.granularity == "tensor"):
            raise InputError("activations of float8_e4m3 have a scale for each token; leave mode and granularity out")

    def _check_ranges(self) -> None:
        """Refuse ranges of activations that there cannot be, or that nothing reads."""
        if self.mode == "static" and self.granularity == "token":
            raise InputError("static ranges are of the whole tensor; give granularity='tensor' or mode='dynamic'")
        if self.mode == "static" and self._level == "float" and self.attention is None:
            raise InputError(
                "static ranges are of activations, which stay floats; leave mode out, or quantize them too"
            )
        if self.symmetric and self._level == "tensor":
            raise InputError(
                "dynamic ranges of a whole tensor have a zero point; give granularity='token', or leave symmetric out"
            )
        if self.requantize and (self._level != "static" or not self.fold):
            raise InputError("requantize is for fixed scales that are folded: give mode='static', and leave fold out")

    def _check_targets(self) -> None:
        """Refuse targets for the outputs that there cannot be, or that nothing aims at."""
        checks.targets(self.min_cosine, self.min_sqnr_db)
        if self.metric is not None and not callable(self.metric):
            raise InputError(f"metric must be a function of (outputs, the model's outputs), found {self.metric!r}")
        if self.min_metric is not None and self.metric is None:
            raise InputError("min_metric is what a metric is to reach; give metric too")
        targets = [self.min_cosine, self.min_sqnr_db, self.metric]
        if sum(item is not None for item in targets) > 1:
            raise InputError("give one of min_cosine, min_sqnr_db and metric")
        if self.sensitive is None and self._has_target:
            raise InputError("a target needs sensitive='auto': layers are made finer until it is reached")

    @property
    def needs_calibration(self) -> str | None:
        """Why calibration data is needed; None: it is not."""
        if self.mode == "static":
            return "static ranges of activations"
        if self._has_target:
            return "a target for the outputs"
        used = [word for word in words_of(self.method) if word in IMPROVEMENTS]
        if used:
            return f"method {used[0]!r}"
        return "statistics" if self.statistics is not None else None

    def apply(self, program: Program, context: Context) -> PassResult:
        """Rewrite the program in place."""
        made = quantized_by(program)
        if made == "quantize":
            raise RewriteError("the program is quantized already; give one Quantize with all options")
        if made is not None:
            raise RewriteError(f"{made} has made integers of the program already; leave one of the two passes out")
        if masked(program):
            raise RewriteError("weights are masked for training; put the pass fold before quantize")
        if not context.calibration and self.needs_calibration is not None:
            raise InputError(f"{self.needs_calibration} needs calibration data; give compile() calibration=batches")
        original, result = program.copy() if self.attention is not None else program, PassResult()
        if context.max_rewrites != 0 and (count := expand(program)):
            result.rewrites["expand"] = count
        if context.max_rewrites != 0:  # fused layers have no names of their own
            names = [*map(name_of, program.calls(aten.linear.default, aten.embedding.default))]
            check_patterns(self.skip, [*names, *map(module_of, program.calls(attention))], context.elsewhere)
        self._attention(program, context, result)
        sites, refusals = linear_sites(program, self.skip)
        result.refusals += refusals
        check_finite(program, [node for site in sites for node in site.linears])
        lookups = self._tables(program)
        choices = self._choices(program, original, sites, lookups, context, result)
        insertion = Insertion(program)
        for site in sites:
            choice = choices[site]
            if choice is UNTOUCHED:
                result.refusals.append(Refusal("too sensitive: it stays in floats", "linear", site.linears[0].name))
            elif context.take():
                insertion.linears(site, choice)
                name = choice.name + ", 8 bits" * (choice.bits != BITS[self.weights])
                result.rewrites[f"linear ({name})"] += len(site.linears)
                result.matches.append(Applied("linear", site.name, f"{name}: {choice.sqnr_db:.1f} dB"))
        for table in lookups:
            reason = tables.refuses(table, choices[table])
            for lookup in table.lookups:
                if reason is not None:
                    result.refusals.append(Refusal(reason, "embedding", lookup.name))
                elif context.take():
                    result.rewrites["embedding"] += 1
                    result.matches.append(Applied("embedding", name_of(lookup), f"{shape(table.stored)[0]} rows"))
                    insertion.table(lookup, choices[table])
        program.clean()
        if self.fold:
            fold(program)
            if count := absorb(program):
                result.rewrites["smoothing into values"] = count
        if self.requantize:
            result.rewrites["requantize"], refusals = requantize(program)
            result.refusals += refusals
        return result

    # --- what is chosen ----------------------------------------------------------------------------------------

    @property
    def _level(self) -> str:
        """The level of activations that is asked for: "float", "float8", "static", "tensor", "token" or "auto"."""
        activations = self.activations
        if activations is None or (activations == "auto" and self.weights != "int8"):
            return "float"
        if activations == FLOAT8:
            return "float8"
        return "static" if self.mode == "static" else self.granularity

    def _way(self, level: str, calibrated: bool, bits: int | None = None) -> Way:
        """A way to quantize a site; `bits` of its weights, if others than asked for."""
        words = words_of(self.method)
        auto = words == ["auto"]
        bits = bits or BITS[self.weights]
        symmetric = self.symmetric if self.symmetric is not None else bits == 8
        group = self.group_size or (None if bits == 8 else GROUP)
        if level != "float" and bits == 8:  # integer matmuls take one scale a row
            symmetric, group = True, None
        return Way(
            level=level,
            grid=grids.Grid(bits, symmetric, group, self.weights == FLOAT8, nested=bits == 4 and level != "float"),
            clip="minmax" if bits == 8 else "mse",
            range=next((word for word in words if word in RANGES), "minmax"),
            symmetric=bool(self.symmetric),
            smooth=calibrated and level != "float" and ("smoothquant" in words or auto),
            awq="awq" in words,
            gptq=calibrated and ("gptq" in words or auto),
            correct=calibrated and ("bias" in words or (auto and level != "float")),
        )

    def _choices(
        self,
        program: Program,
        original: Program,
        sites: list[Site],
        lookups: Mapping[tables.Table, Choice],
        context: Context,
        result: PassResult,
    ) -> Mapping[Place, Choice]:
        """How each site and table is quantized; the outputs to come close to are those of the original."""
        batches, level = context.calibration, self._level
        if not batches:
            way = self._way("token" if level == "auto" else level, False)
            return {site: plain(way, _weights(program, site), least(site.source)) for site in sites} | {**lookups}
        statistics: AbstractContextManager[Statistics] = nullcontext(Nothing())
        if self.statistics is not None:
            statistics = context.statistics(self.statistics, fingerprints(program, batches, self._recorded))
        with statistics as kept:
            record = Record(kept, sites, lookups)
            return self._calibrated(program, original, sites, lookups, context, result, record)

    @property
    def _recorded(self) -> str:
        """The options that statistics depend on; a metric goes by its name."""
        metric = getattr(self.metric, "__qualname__", type(self.metric).__name__)
        wanted = "" if self.min_metric is None else f" of {self.min_metric}"
        options = replace(self, fold=True, requantize=False, statistics=None, metric=None, min_metric=None)
        return f"{options}, metric {metric}{wanted}, record {FORMAT}"

    def _calibrated(
        self,
        program: Program,
        original: Program,
        sites: list[Site],
        lookups: Mapping[tables.Table, Choice],
        context: Context,
        result: PassResult,
        record: Record,
    ) -> Mapping[Place, Choice]:
        level = self._level
        fitting, judging = split(context.calibration)
        coarse = "tensor" if self.mode == "dynamic" else "static"
        levels: tuple[str, ...] = (coarse, "token") if level == "auto" else (level,)
        if self.symmetric:
            levels = tuple(item for item in levels if item != "tensor")  # it has a zero point
        ways = [self._way(item, True) for item in levels]
        if self.weights == "int4" and self._has_target:
            ways += [self._way(item, True, 8) for item in levels]
        found = self._options(program, sites, fitting, ways, record, context.track)
        fitter = _Fitter(self, program, fitting, record, context.track)
        if self.sensitive is None or not ((level == "auto" and self.weights != "int4") or self._has_target):
            # Beside integers, weights of 4 bits make most of the noise themselves.
            most = _NEAR if self.weights == "int4" and level != "float" else 1.0
            return fitter({site: closest(site, choices, most) for site, choices in found.items()} | {**lookups})
        cosine = COSINE if self.min_sqnr_db is None and self.min_cosine is None else self.min_cosine
        target = Target(cosine, self.min_sqnr_db, self.metric, self.min_metric or 0.0)
        finest: dict[Place, list[Choice]] = {site: [*choices, UNTOUCHED] for site, choices in found.items()}
        finest |= {table: [own, UNTOUCHED] for table, own in lookups.items()}
        outcome = search(program, finest, judging, target, fitter, context.track, record.error, original)
        detail = f"{target}: error {outcome.error:.2g} on the calibration data"
        if outcome.reached:
            result.matches.append(Applied("target", "output", detail))
        else:
            result.refusals.append(Refusal(f"not reached: {detail}", "target", "output"))
        return outcome.choices

    @property
    def _has_target(self) -> bool:
        return self.min_cosine is not None or self.min_sqnr_db is not None or self.metric is not None

    def _options(
        self,
        program: Program,
        sites: list[Site],
        batches: Sequence[Sequence[torch.Tensor]],
        ways: Sequence[Way],
        record: Record,
        track: Track,
    ) -> dict[Site, list[Choice]]:
        """Every way in which each site may be quantized, on what it reads in the model as it is."""
        lockstep = Lockstep(program, batches, track, "calibrating")
        found: dict[Site, list[Choice]] = {}
        known = {(way.level, way.grid.bits): way for way in ways}

        def choose(site: Site) -> Choice:
            weights, low = _weights(program, site), least(site.source)

            def make() -> list[Choice]:
                data = Data(lockstep.rows_as_read(site.source))
                return [choice for way in ways for choice in options(_for(way, site), weights, low, data)]

            with blaming(site.name):
                found[site] = [
                    *record.options(
                        site,
                        make,
                        lambda choice: rounded(
                            choice, _for(known[choice.activation.level, choice.bits], site), weights
                        ),
                    )
                ]
            return UNTOUCHED

        if record.has_options(sites):
            for site in sites:
                choose(site)
        else:
            lockstep.run(applied(program, lockstep, choose, dict.fromkeys(sites, UNTOUCHED)))
        return found

    def _attention(self, program: Program, context: Context, result: PassResult) -> None:
        """Let attention multiply integers. It goes first: linear layers are then fitted to what it gives."""
        if self.attention is None:
            return
        nodes, refusals = attentions(program, self.skip)
        if not nodes and not refusals:
            why = "that of packed tokens stays; put remove_padding behind quantize"
            if not program.calls(packed_attention):
                why = "there is no attention; put canonicalize before quantize"
            refusals = [Refusal(why, "attention", "output")]
        result.refusals += refusals
        scales = {}
        if nodes and self.mode == "static":
            with blaming("attention"):
                scales = ranges(program, nodes, context.calibration, context.track)
        for node in nodes:
            if context.take():
                name = module_of(node)
                in_integers(program, node, scales.get(node))
                result.rewrites["attention"] += 1
                detail = "a scale for each token" if node not in scales else "fixed scales"
                result.matches.append(Applied("attention", name, detail))

    def _tables(self, program: Program) -> dict[tables.Table, Choice]:
        """The tables of embeddings, each with integers of its own."""
        if self.embeddings is None:
            return {}
        grid = grids.Grid() if self.embeddings == "int8" else grids.Grid(4, bool(self.symmetric), GROUP)
        found = tables.tables(program, self.skip)
        check_finite(program, [lookup for table in found for lookup in table.lookups])
        return {table: tables.rounded(program, table, grid) for table in found}


@dataclass
class _Fitter:
    """Fits the weights and biases of choices, each to what it reads behind the quantized layers before it.

    What was fitted for a choice before is used again: hardly anything changes with the other layers' choices.
    """

    rewrite: Quantize
    program: Program
    batches: Sequence[Sequence[torch.Tensor]]
    record: Record
    track: Track
    known: dict[int, Choice] = field(default_factory=dict)

    def __call__(self, chosen: Mapping[Place, Choice]) -> dict[Place, Choice]:
        lockstep = Lockstep(self.program, self.batches, self.track, "fitting weights")

        def choose(site: Site) -> Choice:
            choice = chosen[site]
            if id(choice) not in self.known:
                way = _for(self.rewrite._way(choice.activation.level, True, choice.bits), site)
                fits = choice is not UNTOUCHED and (way.gptq or way.correct)
                weights = _weights(self.program, site)
                with blaming(site.name):
                    self.known[id(choice)] = self._fitted(choice, way, weights, lockstep, site) if fits else choice
            return self.known[id(choice)]

        self.known |= {id(choice): choice for place, choice in chosen.items() if isinstance(place, tables.Table)}
        if any(id(choice) not in self.known for choice in chosen.values()):
            lockstep.run(applied(self.program, lockstep, choose, chosen))
        return {place: self.known[id(choice)] for place, choice in chosen.items()}

    def _fitted(
        self, choice: Choice, way: Way, weights: Sequence[torch.Tensor], lockstep: Lockstep, site: Site
    ) -> Choice:
        found = self.record.fitted(choice)
        if found is None:
            found = refined(choice, way, weights, Data(lockstep.rows_as_read(site.source)))
            self.record.put_fitted(choice, found)
        return found


def _weights(program: Program, site: Site) -> list[torch.Tensor]:
    return [program.tensor(linear.args[1]).detach() for linear in site.linears]  # type: ignore[arg-type]


def _for(way: Way, site: Site) -> Way:
    """A way as a site can have it: a weight that others read too is only rounded."""
    tied = any(len(linear.args[1].users) > 1 for linear in site.linears)  # type: ignore[union-attr]
    return replace(way, smooth=False, awq=False, gptq=False) if tied else way
