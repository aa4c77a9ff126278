"""ReplaceAttention: cheaper kinds of attention in the place of exact attention."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from ..ir import checks
from ..ir.calibration.lockstep import Lockstep
from ..ir.calibration.target import Target
from ..ir.errors import InputError, RewriteError, nearest
from ..ir.graph import Program, dtype, module_path
from ..ir.layers import fits
from ..ir.ops.int8_attention import int8_attention
from ..ir.ops.padding import packed_attention
from ..ir.ops.table import taking
from ..ir.pattern import Refusal
from ..ir.replacement.choose import Candidate, Chosen, faster, replacing, samples_of, within
from ..ir.replacement.kind import Kind
from ..ir.replacement.kinds.exact import Exact
from ..ir.replacement.lone import insert_weights, lone
from ..ir.replacement.site import Site, site_of, sites
from ..ir.replacement.table import KINDS
from ..ir.rewrite import Applied, Context, Pass, PassResult

RULE = "attention"


@dataclass(frozen=True, init=False)
class ReplaceAttention(Pass):
    """Compute attention in another, cheaper way.

        before:  %a = fxpress.attention(%q, %k, %v, key_mask=%m)
        after:   %a = fxpress.nystrom_attention(%q, %k, %v, %m, 64)        for ReplaceAttention("nystrom", landmarks=64)
                 %a = fxpress.attention(%q, %k, %v, key_mask=%m, left=127, right=127)        for ("sliding_window")

    Kinds: sliding_window, dynamic_sparse, random_sparse, graph, linformer, performer, nystrom, linear, lsh,
    depthwise_conv, funnel, exact; their options are those of the classes in ir/replacement/kinds. A kind refuses what
    it would not compute right, and says why.

    Attributes:
        kind: the name of a kind; several for layers="auto", each attention then gets the one that harms it least.
        layers: "all"; names of modules, with * and ?, or of parts of them, and numbers of attentions in their order;
            "auto": those that may be replaced so that the outputs stay as close as `min_cosine` or `min_sqnr_db` says,
            or so many that all attention together is `speedup` times as fast, measured on the calibration data.
        skip: names and numbers of attentions that stay.
        min_cosine, min_sqnr_db, speedup: the budget of "auto", one of them; the cosine 0.99 if none is given.
        force: replace attention even where that is slower at the example's sizes.
        options: of the kind.
    """

    exact: ClassVar[bool] = False
    more_options: ClassVar[bool] = True

    kind: str | tuple[str, ...]
    layers: str | tuple[str | int, ...] = "all"
    skip: tuple[str | int, ...] = ()
    min_cosine: float | None = None
    min_sqnr_db: float | None = None
    speedup: float | None = None
    force: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    def __init__(
        self,
        kind: str | Sequence[str],
        layers: str | Sequence[str | int] = "all",
        skip: Sequence[str | int] = (),
        min_cosine: float | None = None,
        min_sqnr_db: float | None = None,
        speedup: float | None = None,
        force: bool = False,
        **options: Any,
    ) -> None:
        given = {
            "kind": tuple(kind) if isinstance(kind, list) else kind,
            "layers": tuple(layers) if isinstance(layers, list) else layers,
            "skip": tuple(skip) if isinstance(skip, list) else skip,
            "min_cosine": min_cosine,
            "min_sqnr_db": min_sqnr_db,
            "speedup": speedup,
            "force": force,
            "options": tuple((name, _fixed(value)) for name, value in options.items()),
        }
        for name, value in given.items():
            object.__setattr__(self, name, value)
        self._check()
        self.kinds()  # refuses bad options

    def _check(self) -> None:
        names = (self.kind,) if isinstance(self.kind, str) else self.kind
        if not isinstance(names, tuple) or not names or not all(isinstance(name, str) for name in names):
            raise InputError(f"kind must be the name of a kind of attention, or several, found {self.kind!r}")
        for option in ("layers", "skip"):
            names = getattr(self, option)
            if option == "layers" and names in ("all", "auto"):
                continue
            if not isinstance(names, tuple) or not all(type(name) in (str, int) for name in names):
                raise InputError(f"{option} must be a list of names and numbers, found {names!r}")
        if type(self.force) is not bool:
            raise InputError(f"force must be True or False, found {self.force!r}")
        budgets = ("min_cosine", "min_sqnr_db", "speedup")
        given = [name for name in budgets if getattr(self, name) is not None]
        for name in given:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
                raise InputError(f"{name} must be a number, found {value!r}")
        if self.layers != "auto" and given:
            raise InputError(f"{given[0]} is a budget of layers='auto'; give that, or leave it out")
        if len(given) > 1:
            raise InputError(f"give one budget, found {' and '.join(given)}")
        checks.targets(self.min_cosine, self.min_sqnr_db)
        if self.speedup is not None and self.speedup <= 1:
            raise InputError(f"speedup must be more than 1, found {self.speedup}")

    def kinds(self) -> list[Kind]:
        """The kinds with their options.

        Raises:
            InputError: an unknown kind or option, or several kinds without layers="auto".
        """
        names = (self.kind,) if isinstance(self.kind, str) else self.kind
        for name in names:
            if name not in KINDS:
                raise InputError(f"unknown kind of attention {name!r}: {nearest(str(name), KINDS)}")
        if len(names) != 1 and self.layers != "auto":
            raise InputError("several kinds of attention need layers='auto', which chooses among them")
        if self.layers == "auto" and (fixed := next((name for name in names if not KINDS[name].local), None)):
            raise InputError(f"layers='auto' cannot try {fixed}, which changes more than the attention; name layers")
        known = {name: [entry.name for entry in dataclasses.fields(KINDS[name])] for name in names}
        every = sorted({option for found in known.values() for option in found})
        for option, _ in self.options:
            if option not in every:
                why = nearest(option, every) if every else "it has none"
                raise InputError(f"unknown option {option!r} of {', '.join(names)}: {why}")
        return [
            KINDS[name](**{option: value for option, value in self.options if option in known[name]}) for name in names
        ]

    @property
    def needs_calibration(self) -> str | None:
        """Why calibration data is needed; None: it is not."""
        if self.layers == "auto":
            return "layers='auto'"
        return next((found for kind in self.kinds() if (found := kind.needs_calibration)), None)

    def __str__(self) -> str:
        text = [repr(self.kind)]
        for entry in dataclasses.fields(self)[1:-1]:
            value = getattr(self, entry.name)
            if value != entry.default:
                text.append(f"{entry.name}={list(value) if isinstance(value, tuple) else value!r}")
        return f"{self.pass_name()}({', '.join([*text, *(f'{name}={value!r}' for name, value in self.options)])})"

    def apply(self, program: Program, context: Context) -> PassResult:
        """Rewrite the program in place."""
        if self.needs_calibration is not None and not context.calibration:
            raise InputError(f"{self.needs_calibration} needs calibration data; give compile() calibration=batches")
        if self.speedup is not None and context.seconds is None:
            raise InputError("speedup needs a backend that can be measured; compile with backend='onnx'")
        result = PassResult()
        candidates = self._candidates(program, context, result)
        if self.layers != "auto":
            candidates = [item for item in candidates if context.take()]
        if not candidates:
            return result
        chosen = None
        if self.layers == "auto":
            candidates = _calibrated(program, candidates, context, in_turn=False)
            chosen = self._chosen(program, candidates, context)
            _refuse_rest(candidates, chosen, result)
            if self.speedup is not None and (reached := _speedup(candidates, chosen)) < self.speedup:
                reason = f"all attention together is {reached:.3g} times as fast at most, {self.speedup:g} was asked"
                result.refusals.append(Refusal(reason, "speedup", "all"))
            candidates = [item for item in chosen.used if context.take()]
        else:
            candidates = _calibrated(program, candidates, context, in_turn=True)
        for candidate in candidates:
            _replace(program, candidate)
            result.rewrites[candidate.kind.kind_name()] += 1
            result.matches.append(Applied(RULE, candidate.site.name, _detail(candidate, chosen)))
        program.clean()
        return result

    def _sites(self, program: Program) -> list[Site]:
        """The attentions that are meant."""
        every = sites(program)
        if not every and program.calls(packed_attention):
            raise RewriteError("attention is of packed tokens already; put remove_padding behind replace_attention")
        if not every and program.calls(int8_attention):
            raise RewriteError("attention multiplies integers already; put replace_attention before quantize")
        if not every and program.calls(*taking("value", "key_mask")):
            return []  # all are replaced
        if not every:
            raise RewriteError("the program has no attention; fxpress inspect --explain canonicalize says why")
        replaced = [module_path(node) for node in program.calls(*taking("value", "key_mask"))]
        named = (self.layers if isinstance(self.layers, tuple) else (), self.skip)
        for wanted in (*named[0], *named[1]):
            known = isinstance(wanted, str) and any(fits(name, [wanted]) for name in replaced)
            if not known and not any(_is_meant(index, site, [wanted]) for index, site in enumerate(every)):
                close = difflib.get_close_matches(str(wanted), [site.name for site in every], n=3, cutoff=0.0)
                raise InputError(f"no attention is {wanted!r}; there are {len(every)}, as {', '.join(close)}")
        return [
            site
            for index, site in enumerate(every)
            if (isinstance(self.layers, str) or _is_meant(index, site, self.layers))
            and not _is_meant(index, site, self.skip)
        ]

    def _candidates(self, program: Program, context: Context, result: PassResult) -> list[Candidate]:
        """The kinds that the attentions can be of, where they pay; a refusal for each of the others."""
        found = []
        illegal = []
        meant = self._sites(program)
        for site in meant:
            for kind in self.kinds():
                if kind.is_done(site):
                    continue
                reason = kind.refusal(site)
                if reason is not None:
                    illegal.append(Refusal(reason, kind.kind_name(), site.name))
                    continue
                candidate = Candidate(site, kind, kind.weights(site))
                if context.seconds is not None and not (self.force and self.speedup is None):
                    seconds = context.seconds(lone(program, site, kind, candidate.weights))
                    exact = context.seconds(lone(program, site, Exact(), {}))
                    if seconds >= exact and not self.force and not isinstance(kind, Exact):
                        reason = (
                            f"slower than exact attention at the example's sizes: {seconds * 1e3:.3g} ms, exact "
                            f"{exact * 1e3:.3g} ms; a longer example, or force=True, replaces it"
                        )
                        result.refusals.append(Refusal(reason, kind.kind_name(), site.name))
                        continue
                    candidate = dataclasses.replace(candidate, seconds=seconds, exact_seconds=exact)
                found.append(candidate)
        result.refusals += illegal
        if illegal and not found and len(illegal) == len(meant) * len(self.kinds()):
            first = illegal[0]
            raise RewriteError(f"no attention can be replaced by {first.rule}; {first.node}: {first.reason}")
        return found

    def _chosen(self, program: Program, candidates: Sequence[Candidate], context: Context) -> Chosen:
        batches, track = context.calibration, context.track
        wanted = Target(self.min_cosine, self.min_sqnr_db)
        if self.speedup is not None:
            return faster(program, candidates, batches, self.speedup, wanted, track)
        if self.min_sqnr_db is None:
            wanted = Target(self.min_cosine or 0.99)
        return within(program, candidates, batches, wanted, track)


def _fixed(value: Any) -> Any:
    """Lists, nested ones too, as tuples, which can be hashed."""
    return tuple(map(_fixed, value)) if isinstance(value, list) else value


def _is_meant(index: int, site: Site, wanted: Sequence[str | int]) -> bool:
    return any(index == item if isinstance(item, int) else fits(site.name, [item]) for item in wanted)


def _calibrated(
    program: Program, candidates: Sequence[Candidate], context: Context, *, in_turn: bool
) -> list[Candidate]:
    """The candidates with weights fitted to data: `in_turn`, each on what those before it make of the data."""
    if not any(item.kind.needs_calibration for item in candidates):
        return list(candidates)
    by_node: dict[fx.Node, list[Candidate]] = {}
    for item in candidates:
        by_node.setdefault(item.site.node, []).append(item)
    found: list[Candidate] = []
    lockstep = Lockstep(program, context.calibration)

    def visit(node: fx.Node) -> list[Any] | None:
        if node not in by_node:
            return None
        samples = samples_of(by_node[node][0].site, lockstep)
        for item in by_node[node]:
            weights = item.kind.calibrate(item.site, dict(item.weights), samples, context.track)
            found.append(dataclasses.replace(item, weights=weights))
        return replacing(lockstep, found[-1:])(node) if in_turn else [item.output.to(dtype(node)) for item in samples]

    lockstep.run(visit)
    return found


def _replace(program: Program, candidate: Candidate) -> None:
    site, kind = candidate.site, candidate.kind
    prefix = f"{site.name}.{kind.kind_name()}_"
    weights = insert_weights(program, candidate.weights, kind, dtype(site.given["query"]), prefix)
    kind.replace(program, site_of(program, site.node), weights)


def _detail(candidate: Candidate, chosen: Chosen | None) -> str:
    text = str(candidate.kind)
    if candidate.seconds is not None and candidate.exact_seconds is not None:
        text += f"; {candidate.seconds * 1e3:.3g} ms, exact {candidate.exact_seconds * 1e3:.3g} ms"
    if chosen is not None:
        text += f"; alone an error of {chosen.errors[candidate]:.2g}"
    return text


def _speedup(candidates: Sequence[Candidate], chosen: Chosen) -> float:
    """How many times as fast all attention together is with what was chosen."""
    exact = sum({item.site: item.exact_seconds or 0.0 for item in candidates}.values())
    left = exact - sum(item.saved for item in chosen.used)
    return exact / left if left > 0 else math.inf


def _refuse_rest(candidates: Sequence[Candidate], chosen: Chosen, result: PassResult) -> None:
    """Say of each attention that stays what its best kind would have cost."""
    used = {item.site for item in chosen.used}
    for site in dict.fromkeys(item.site for item in candidates):
        if site not in used:
            best = min((item for item in candidates if item.site is site), key=chosen.errors.__getitem__)
            reason = f"the budget is spent: alone an error of {chosen.errors[best]:.2g}, the others {chosen.error:.2g}"
            result.refusals.append(Refusal(reason, best.kind.kind_name(), site.name))
