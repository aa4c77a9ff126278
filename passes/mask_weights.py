"""MaskWeights: weights, heads, neurons and layers that go, chosen by a criterion; masked for training, or cut."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ..ir import checks
from ..ir.errors import InputError, RewriteError, nearest
from ..ir.expand import expand, slices
from ..ir.graph import Program
from ..ir.layers import check_finite, check_patterns, fits, is_named, name_of
from ..ir.pattern import Refusal
from ..ir.pruning import head_dims, masks, ranking, structured, weights
from ..ir.pruning import layers as residual
from ..ir.pruning.channels import follow
from ..ir.pruning.select import Pattern
from ..ir.pruning.sensitivity import Loss, Reach, fisher, slopes
from ..ir.pruning.units import Family, cut_unread, families
from ..ir.quantization.sites import quantized_by
from ..ir.rewrite import Applied, Context, Pass, PassResult, Sparsity

aten = torch.ops.aten
METHODS = ("random", "magnitude", "wanda", "sparsegpt", "fisher", "movement")
CALIBRATED = ("wanda", "sparsegpt", "fisher", "movement")
UNIT_PATTERNS = ("heads", "neurons", "heads+neurons", "dims", "dims+neurons")
PATTERNS = ("unstructured", "n:m", "2:4", "4:8", "blocks", *UNIT_PATTERNS, "layers", "branches")


@dataclass(frozen=True)
class MaskWeights(Pass):
    """Set weights to zero; cut heads, neurons and layers that are zero altogether.

        before:  %h = aten.gelu(aten.linear(%x, @up, @b));  %y = aten.linear(%h, @down, @c)
        after:   the same with fewer rows in @up and @b and fewer columns in @down ("neurons"), or with zeros in @up and
                 @down; with fold=False  %up' = aten.mul(@up, @up_mask), which zeros survive when the model is trained

    Attributes:
        sparsity: the share that goes: of the numbers of each weight; of the multiplications of heads and neurons; of
            the layers. An n:m pattern says it itself.
        method: "random"; "magnitude", the smallest numbers, of layers those that turn their input the least (Men et
            al., 2024); "wanda", the smallest of |w| times the norm of its input, in each output row (Sun et al., 2024);
            "sparsegpt", what costs least once the others have made up for it (Frantar and Alistarh, 2023); "fisher",
            what the outputs depend on least (Kwon et al., 2022); "movement", what a `loss` wants to shrink (Sanh et
            al., 2020). All but the first two need calibration data, as layers by "magnitude" do.
        pattern: "unstructured"; "2:4", "4:8" or any "n:m", n of m neighbours in a row stay; "blocks" of `block` x
            `block`; "heads" of attention, with their query, key, value and output weights; "neurons" of feed-forward
            blocks, in multiples of 8; "heads+neurons"; "dims", the dimensions of all heads of an attention alike, in
            multiples of 8, of queries and keys and of values, once the heads have bases in which the last matter least
            (Lin et al., 2024, "MoDeGPT"), by "sparsegpt" alone; "dims+neurons"; "layers" with all their residual
            branches; "branches", each attention and feed-forward block by itself.
        scope: "layer": every layer loses the same share; "global": layers that matter less lose more; "auto": global
            for "fisher", and for heads and neurons by "sparsegpt"; else by layer.
        layers: names of modules, with * and ?, or of parts of them: only those are pruned. Empty: all linear layers but
            embeddings and those that make the model's outputs.
        skip: names of modules that are not pruned.
        seed: of "random".
        block: height and width of blocks.
        refit: whether the weights that stay make up for those that go, by least squares on the calibration data; with
            heads and neurons so that the residual streams are what they were (He et al., 2017). None: for "sparsegpt",
            and for heads and neurons by "fisher". Without it, what stays is as it was.
        loss: for methods that look at the outputs ("fisher", "movement", "sparsegpt" of heads and neurons), a number
            from the model's flat outputs that is to stay low; None: how far they are from what they are.
        fold: whether weights are zeroed for good and units cut, or masks left for training; the pass `fold` cuts then.
    """

    exact: ClassVar[bool] = False

    sparsity: float | None = None
    method: str = "magnitude"
    pattern: str = "unstructured"
    scope: str = "auto"
    layers: Sequence[str] = ()
    skip: Sequence[str] = ()
    seed: int = 0
    block: int = 16
    refit: bool | None = None
    loss: Loss | None = field(default=None, repr=False)
    fold: bool = True

    def __post_init__(self) -> None:
        checks.one_of("method", self.method, METHODS)
        checks.one_of("scope", self.scope, ("auto", "layer", "global"))
        checks.names("layers", self.layers)
        checks.names("skip", self.skip)
        checks.seed(self.seed)
        checks.of_kind("block", self.block, int)
        checks.of_kind("refit", self.refit, bool, None)
        checks.of_kind("fold", self.fold, bool)
        if self.block < 1:
            raise InputError(f"block must be 1 or more, found {self.block}")
        self._check_pattern()
        if self.method == "movement" and self.loss is None:
            raise InputError("movement needs a loss, or training: give loss=, or train with a MaskScheduler")
        if self.loss is not None and self.method not in ("fisher", "movement", "sparsegpt"):
            raise InputError(f"method {self.method!r} has no use for a loss; give 'fisher' or 'movement'")
        if self.loss is not None and not callable(self.loss):
            raise InputError(f"loss must be a function of the model's outputs, found {self.loss!r}")
        if self.loss is not None and self.method == "sparsegpt" and self.kind not in UNIT_PATTERNS:
            raise InputError(f"method 'sparsegpt' has no use for a loss with pattern {self.pattern!r}")
        if "dims" in self.kind and self.method != "sparsegpt":
            raise InputError(f"dims are chosen by 'sparsegpt', found {self.method!r}")
        if self.kind in ("layers", "branches") and (self.refit or self.scope == "global"):
            raise InputError(f"{self.kind} go as a whole; refit and scope are for weights, heads and neurons")
        if self.kind in ("layers", "branches") and self.method not in ("random", "magnitude"):
            raise InputError(f"{self.kind} are chosen by 'random' or 'magnitude', found {self.method!r}")
        if self.scope == "global" and self.method == "sparsegpt" and self.kind not in UNIT_PATTERNS:
            raise InputError("sparsegpt compares the numbers of one layer; give scope='layer' or another method")
        if self.scope == "global" and self.kind in ("n:m", "blocks"):
            raise InputError(f"every layer has its share of {self.pattern}; give scope='layer'")

    def _check_pattern(self) -> None:
        """Refuse a pattern or sparsity that there is not."""
        sparsity = self.sparsity
        number = isinstance(sparsity, float | int) and not isinstance(sparsity, bool)
        if sparsity is not None and not (number and 0 <= sparsity <= 1):
            raise InputError(f"sparsity must lie between 0 and 1, found {sparsity!r}")
        if isinstance(self.pattern, str) and re.fullmatch(r"(\d+):(\d+)", self.pattern):
            keep, of = map(int, self.pattern.split(":"))
            if not 0 < keep < of:
                raise InputError(f"pattern {self.pattern!r} must keep some, not all, of each group, as in '2:4'")
            if sparsity is not None and abs(sparsity - (1 - keep / of)) > 0.005:
                raise InputError(f"pattern {self.pattern!r} is a sparsity of {1 - keep / of:g}, found {sparsity}")
            return
        if self.pattern not in PATTERNS or self.pattern == "n:m":
            raise InputError(f"unknown pattern {self.pattern!r}: {nearest(str(self.pattern), PATTERNS)}")
        if sparsity is None:
            raise InputError(f"give a sparsity: the share of {self.pattern} that goes, between 0 and 1")

    @property
    def kind(self) -> str:
        """The pattern, "n:m" for all of that kind."""
        return "n:m" if ":" in self.pattern else self.pattern

    @property
    def needs_calibration(self) -> str | None:
        """Why calibration data is needed; None: it is not."""
        if self.method in CALIBRATED:
            return f"method {self.method!r}"
        if self.kind in ("layers", "branches") and self.method == "magnitude":
            return "how much each layer changes its input"
        return "refit" if self.refit else None

    @property
    def _refits(self) -> bool:
        if self.refit is not None:
            return self.refit
        return self.method == "sparsegpt" or (self.method == "fisher" and self.kind in UNIT_PATTERNS)

    @property
    def _scope(self) -> str:
        if self.scope != "auto":
            return self.scope
        units = self.kind in UNIT_PATTERNS
        return "global" if self.method == "fisher" or (units and self.method == "sparsegpt") else "layer"

    def apply(self, program: Program, context: Context) -> PassResult:
        """Rewrite the program in place."""
        if self.needs_calibration is not None and not context.calibration:
            raise InputError(f"{self.needs_calibration} needs calibration data; give compile() calibration=batches")
        if (made := quantized_by(program)) is not None:
            raise RewriteError(f"weights are quantized already; put mask_weights before {made}")
        result = PassResult()
        if context.max_rewrites != 0 and (count := expand(program)):
            result.rewrites["expand"] = count
        slices(program)
        linears = self._linears(program, context)
        if self.needs_calibration is not None:
            check_finite(program, linears)
        if self.kind in ("layers", "branches"):
            self._drop(program, context, result)
        elif self.kind in ("unstructured", "n:m", "blocks"):
            self._weights(program, linears, context, result)
        else:
            self._units(program, context, result)
        program.clean()
        if self.fold:
            masks.fold(program)
            cut_unread(program)
            head_dims.cut_unread(program)
            program.clean()
        return result

    def _linears(self, program: Program, context: Context) -> list[fx.Node]:
        """The linear layers that are meant."""
        every = program.calls(aten.linear.default)
        check_patterns([*self.layers, *self.skip], map(name_of, every), context.elsewhere)
        wanted = [node for node in every if not self.layers or is_named(node, self.layers)]
        return [node for node in wanted if not is_named(node, self.skip)]

    def _means(self, name: str) -> bool:
        """Whether a layer's name is meant."""
        return (not self.layers or fits(name, self.layers)) and not fits(name, self.skip)

    # --- numbers of weights ------------------------------------------------------------------------------------

    def _weights(self, program: Program, linears: Sequence[fx.Node], context: Context, result: PassResult) -> None:
        found, result.refusals = weights.targets(program, linears, bool(self.layers))
        keep, of = map(int, self.pattern.split(":")) if self.kind == "n:m" else (0, 0)
        pattern = Pattern(self.kind, keep, of, self.block)
        for target in found:
            misfit = pattern.misfit(*program.tensor(target.weight).shape)
            if misfit:
                raise RewriteError(f"{target.name} cannot have pattern {self.pattern!r}: {misfit}; name it in skip")
        found = [target for target in found if context.take()]
        if not found:
            return
        given = self._given(program, [target.weight for target in found], context)
        share = 1 - keep / of if self.kind == "n:m" else float(self.sparsity or 0)
        generator = torch.Generator().manual_seed(self.seed)
        criterion = weights.Criterion(self.method, share, pattern, self._refits, generator, given)
        batches, track = context.calibration, context.track
        decided = None
        if self._scope == "global" and self.kind == "unstructured":
            decided = weights.decide(program, found, criterion, batches, track)
        for target, pruned in weights.prune(program, found, criterion, batches, track, decided).items():
            old = program.tensor(target.weight)
            if self._refits:
                program.set_weight(target.weight, pruned.values.to(old))
            masks.put(program, target.weight, pruned.keep)
            report = pruned.report(target)
            result.rewrites["weight"] += 1
            result.matches.append(Applied("weight", target.name, _detail(report)))
            result.sparsity.append(report)

    def _given(self, program: Program, found: Sequence[fx.Node], context: Context) -> dict[fx.Node, Any]:
        """The scores of methods that look at the outputs."""
        names = [str(weight.target) for weight in found]
        if self.method == "fisher":
            scores = fisher(program, names, context.calibration, self.loss, context.track)
            return {
                weight: masks.value(program, weight).float().square() * scores[str(weight.target)] for weight in found
            }
        if self.method == "movement":
            assert self.loss is not None
            moved = slopes(program, names, context.calibration, self.loss, context.track)
            return {weight: -masks.value(program, weight).float() * moved[str(weight.target)] for weight in found}
        return {}

    # --- heads and neurons -------------------------------------------------------------------------------------

    def _units(self, program: Program, context: Context, result: PassResult) -> None:
        channels = follow(program)
        every, refused = families(channels)
        heads = head_dims.find(program) if "dims" in self.pattern else head_dims.Found()
        every = [*every, *(item.family for item in heads.dims)]
        kinds = self.pattern.split("+")
        spared = [item for item in every if any(fits(name, self.skip) for name in item.layers)]
        found = [item for item in every if item.kind in kinds and item not in spared]
        found = [item for item in found if any(map(self._means, item.layers))]
        named = {name_of(node) for node in self._linears(program, context)}
        for name, reason in refused.items():
            result.refusals.append(Refusal(f"its inputs cannot be cut: {reason}", self.pattern, name))
        result.refusals += [Refusal(reason, "dims", name) for name, reason in heads.refused.items()]
        if not found:
            reasons = [f"{name}: {refused[name]}" for name in sorted(named) if name in refused]
            inside = [f"{name}: {reason}" for name, reason in heads.refused.items()]
            reasons = [*reasons, *inside] if self.layers else [*inside, *reasons]
            raise RewriteError(f"there are no {self.pattern} that can be cut" + (f"; {reasons[0]}" if reasons else ""))
        found = [item for item in found if context.take()]
        if not found:
            return
        batches, track = context.calibration, context.track
        reaches = None
        if self.method == "sparsegpt":
            reaches = ranking.reader_reaches(program, found, batches, self.loss, track)
        worths = self._turn(program, heads, found, reaches or {}, context)
        rankings = ranking.rank(program, found, self.method, batches, self.loss, track, self.seed, reaches, worths)
        if self._scope == "layer":
            counts = ranking.counts_by_share(found, float(self.sparsity or 0))
        else:
            counts = ranking.counts_by_loss(program, channels, found, rankings, float(self.sparsity or 0))
        keeps = [ranking.chosen(item, count) for item, count in zip(rankings, counts, strict=True)]
        layers = structured.thinned(program, found, keeps, self._refits, batches, track, reaches)
        if self._refits:
            structured.write(program, layers)
        for family, keep in zip(found, keeps, strict=True):
            structured.put_masks(program, family, keep)
            if gone := int((~keep).sum()):
                result.rewrites[family.kind] += gone
            stays = f"{int(keep.sum())} of {len(keep)} {family.kind} stay"
            result.matches.append(Applied(family.kind, family.name, stays))
        errors = {name_of(node): layer.sqnr_db for node, layer in layers.items()}
        for node in program.calls(aten.linear.default):
            if masks.is_masked(node.args[1]):
                keep = program.tensor(node.args[1].args[1])  # type: ignore[union-attr, arg-type]
                name = name_of(node)
                result.sparsity.append(Sparsity(name, keep.numel(), int((keep == 0).sum()), errors.get(name)))

    def _turn(
        self,
        program: Program,
        heads: head_dims.Found,
        found: Sequence[Family],
        reaches: Mapping[fx.Node, Reach],
        context: Context,
    ) -> dict[int, Tensor]:
        """Give heads bases in which the last dimensions matter least; what those of queries are worth, by family."""
        dims = {id(item.family): item for item in heads.dims}
        places = [place for place, family in enumerate(found) if id(family) in dims]
        if not places:
            return {}
        batches, some = ranking.spread(context.calibration, reaches)
        turned = [dims[id(found[place])] for place in places]
        return dict(zip(places, head_dims.turn(program, turned, batches, context.track, some), strict=True))

    # --- layers ------------------------------------------------------------------------------------------------

    def _drop(self, program: Program, context: Context, result: PassResult) -> None:
        """Layers go one by one, each measured behind those that went before."""
        found = residual.branches(program)
        every = residual.grouped(found) if self.kind == "layers" else [residual.Layer(b.name, (b,)) for b in found]
        meant = [layer for layer in every if self._means(layer.name)]
        free = [layer for layer in meant if layer.fixed is None]
        result.refusals += [Refusal(str(item.fixed), self.kind, item.name) for item in meant if item.fixed]
        if not free:
            reason = f": {meant[0].name}: {meant[0].fixed}" if meant else ""
            raise RewriteError(f"there are no {self.kind} that can be cut{reason}")
        generator = torch.Generator().manual_seed(self.seed)
        before = _sizes(program)
        for _ in range(min(round(float(self.sparsity or 0) * len(meant)), len(free))):
            if not context.take():
                break
            if self.method == "random":
                layer = free[int(torch.randint(len(free), (), generator=generator))]
            else:
                layer = residual.least(free, program, context.calibration, context.track)
            residual.drop(program, layer)
            program.clean()
            free.remove(layer)
            result.rewrites[self.kind] += 1
            result.matches.append(Applied(self.kind, layer.name, "dropped"))
        after = _sizes(program)
        result.sparsity += [Sparsity(name, size, size - after.get(name, 0)) for name, size in before.items()]


def _sizes(program: Program) -> dict[str, int]:
    """How many numbers the weight of each linear layer has, by name."""
    weights = {name_of(node): masks.stored(node.args[1]) for node in program.calls(aten.linear.default)}
    return {name: program.tensor(weight).numel() for name, weight in weights.items() if weight is not None}


def _detail(report: Sparsity) -> str:
    text = f"{report.zeros / report.numbers:.1%} zero"
    return text if report.sqnr_db is None else f"{text}, {report.sqnr_db:.1f} dB"
