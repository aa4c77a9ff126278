"""Masks that grow while a model is trained: a schedule of sparsity, and which numbers go at each of its steps."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..errors import InputError, nearest
from ..graph import Program, attribute, module_path
from ..rewrite import Sparsity
from ..signature import describe
from .masks import masked
from .select import Pattern, lowest, n_of_m

METHODS = ("magnitude", "movement", "random")
SCOPES = ("layer", "global")
AT_ONCE = ("blocks", "heads", "neurons", "heads+neurons", "layers", "branches")  # patterns of MaskWeights alone
_UPDATES = 100  # unless `every` is given: sorting a large weight takes as long as a training step
_LOWEST = float("-inf")


def ramp(step: int, sparsity: float, start: float, begin: int, end: int) -> float:
    """The sparsity after a number of steps: s + (s0 - s) (1 - (t - t0) / (t1 - t0))^3 (Zhu and Gupta, 2017).

    Many numbers go at first, when they are easily spared, and fewer and fewer towards the end.
    """
    left = (end - min(max(step, begin), end)) / (end - begin)
    return sparsity + (start - sparsity) * left**3


@dataclass(frozen=True)
class _Site:
    """A masked weight: the name of its layer, and where in the module the weight and its mask are, both [N, K]."""

    layer: str
    weight: str
    mask: str


class MaskScheduler:
    """Grows the masks that `MaskWeights(..., fold=False)` has left in a program, while its module is trained.

        scheduler = MaskScheduler(compiled.program, 0.8, end=1000)
        for batch in batches:
            loss(batch).backward()
            scheduler.observe()  # for "movement"; else it does nothing
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    What is masked once stays masked. Its gradient is zero, so from then on neither its magnitude nor its movement says
    anything about its use: only the optimizer's momentum and weight decay still change it. (With Zhu and Gupta masked
    weights are not trained either; Sanh et al. let them collect scores by a straight-through gradient, and come back.)
    What the masks hide before the first step counts and stays as well.

    That the optimizer moves masked parameters does not matter: the layers read weight times mask, which is exactly zero
    there, and `Fold` stores that product.

    Attributes:
        steps: how many steps of the optimizer were counted.
        history: (step, sparsity) of each update of the masks.
    """

    steps: int
    history: list[tuple[int, float]]

    def __init__(
        self,
        program: Program,
        sparsity: float | None,
        method: str = "magnitude",
        pattern: str = "unstructured",
        *,
        end: int,
        start: float = 0.0,
        begin: int = 0,
        every: int | None = None,
        scope: str = "layer",
        seed: int = 0,
    ) -> None:
        """Check all arguments; the masks are changed by `step` only.

        Args:
            program: of a compiled model, with masks.
            sparsity: the share of the masked weights' numbers that is zero at the end; None: what an n:m pattern says.
            method: "magnitude", the smallest numbers (Zhu and Gupta, 2017); "movement", those with the lowest sum of
                -weight * gradient over all steps until then, which the loss wants to shrink (Sanh et al., 2020);
                "random".
            pattern: "unstructured"; or "2:4" or any "n:m", n of m neighbours in a row stay at the end. On the way
                there, what goes is taken from what would go at the end by the scores of the moment.
            end: the step at which `sparsity` is reached, and after which nothing changes.
            start: the sparsity that the ramp starts from: that of the masks there are, if not 0.
            begin: the step that the ramp starts at.
            every: how many steps lie between two updates of the masks; None: a hundredth of the ramp.
            scope: "layer": every weight has the same share; "global": one threshold for all.
            seed: of "random".

        Raises:
            InputError: an argument is wrong, or the program has no masks, or such that do not fit.
        """
        _check_choice("method", method, METHODS)
        _check_choice("scope", scope, SCOPES)
        _check_steps(begin, end, every, seed)
        self._pattern = _pattern(pattern)
        if self._pattern.kind == "n:m" and scope == "global":
            raise InputError(f"every layer has its share of {pattern}; give scope='layer'")
        share = _sparsity(sparsity, self._pattern)
        if not _is_share(start) or start > share:
            raise InputError(f"start must lie between 0 and the sparsity of {share:g}, found {start!r}")
        if not isinstance(program, Program):
            raise InputError(f"program must be a Program, found {describe(program)}; give compiled.program")
        self.program, self.sparsity, self.method, self.pattern = program, share, method, pattern
        self.start, self.begin, self.end, self.scope, self.seed = float(start), begin, end, scope, seed
        self.every = every or max(1, (end - begin) // _UPDATES)
        self._sites = _sites(program)
        self._check_masks()
        self.steps, self.history = 0, []
        self._observed = False  # since the last step
        self._movement: dict[str, Tensor] = {}  # by weight, [N, K], the sum of -weight * gradient

    # --- while training ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def observe(self) -> None:
        """Take in the gradients, once a step, after its last backward and before the optimizer's step.

        Only "movement" needs it, until the schedule's end. Gradients should be those that the optimizer sees, divided
        by the loss scale. Where one is not finite the step counts for nothing, as torch's GradScaler skips it.

        Raises:
            InputError: a weight has no gradient, or the step was observed already.
        """
        if self.method != "movement" or self.steps >= self.end:
            return
        if self._observed:
            raise InputError(
                f"observe() was called twice in step {self.steps + 1}: call it once, after the last backward(), "
                "and step() after the optimizer's"
            )
        gradients = {site: self._tensor(site.weight).grad for site in self._sites}
        missing = [site for site, gradient in gradients.items() if gradient is None]
        if len(missing) == len(self._sites):
            raise InputError("there are no gradients: call observe() after backward() and before zero_grad()")
        if missing:
            raise InputError(
                f"weight {missing[0].weight} has no gradient, because the loss does not depend on it; "
                f"compile with MaskWeights(0.0, skip=[{missing[0].layer!r}], fold=False)"
            )
        self._observed = True
        if not all(bool(item.isfinite().all()) for item in gradients.values() if item is not None):
            return
        for site, gradient in gradients.items():
            assert gradient is not None
            weight = self._tensor(site.weight).detach().float()
            total = self._movement.get(site.weight, torch.zeros_like(weight)).to(weight.device)
            self._movement[site.weight] = total.addcmul_(weight, gradient.float(), value=-1)

    @torch.no_grad()
    def step(self) -> None:
        """Count a step of the optimizer, after it; on the schedule's steps, mask more.

        Raises:
            InputError: "movement" has not seen the gradients of this step, or of any.
        """
        step = self.steps + 1
        if self.method == "movement" and step <= self.end and not self._observed:
            raise InputError(
                f"movement has not seen the gradients of step {step}: call observe() after backward() and before the "
                "optimizer's step"
            )
        if self._is_due(step):
            # In place: the graph, its copies and the user's own modules share the buffer. Parameters stay as they are,
            # and so does the optimizer's state of them: what it does to a masked number, the product does not show.
            for site, keep in zip(self._sites, self._kept(self.sparsity_at(step)), strict=True):
                mask = self._tensor(site.mask)
                mask.mul_(keep.to(mask))
            self.history.append((step, self.sparsity_now))
        self.steps, self._observed = step, False

    def sparsity_at(self, step: int) -> float:
        """The share that the schedule asks for after a number of steps."""
        return ramp(step, self.sparsity, self.start, self.begin, self.end)

    @property
    def sparsity_now(self) -> float:
        """The share of all numbers of the scheduled weights that is masked."""
        layers = self.layers
        return sum(layer.zeros for layer in layers) / sum(layer.numbers for layer in layers)

    @property
    def layers(self) -> list[Sparsity]:
        """How much of each weight is masked."""
        return [Sparsity(site.layer, mask.numel(), _zeros(mask)) for site, mask in self._masks()]

    # --- resuming ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on later, for torch.save; the masks themselves are in the module's state_dict."""
        return {
            "options": self._options(),
            "steps": self.steps,
            "observed": self._observed,
            "history": [list(item) for item in self.history],
            "movement": {name: scores.clone() for name, scores in self._movement.items()},
            "zeros": {site.weight: _zeros(mask) for site, mask in self._masks()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; the module's state_dict has to be loaded before.

        Raises:
            InputError: the state is none, or of another schedule, or the module's masks are not those that it was
                taken with.
        """
        if not isinstance(state, Mapping) or set(state) != set(self.state_dict()):
            raise InputError("this is no state of a MaskScheduler; give what its state_dict() gave")
        for name, now in self._options().items():
            if (then := state["options"].get(name)) != now:
                raise InputError(f"the state is of another schedule: {name} was {then!r}, is {now!r}")
        shapes = {site.weight: self._tensor(site.weight).shape for site in self._sites}
        if state["zeros"].keys() != shapes.keys():
            raise InputError("the state is of another model: it has masks of other weights")
        for name, scores in state["movement"].items():
            if shapes.get(name) != scores.shape:
                raise InputError(f"the state is of another model: weight {name} has another shape there")
        for site, mask in self._masks():
            if (zeros := _zeros(mask)) != (then := state["zeros"][site.weight]):
                raise InputError(
                    f"{then} numbers of weight {site.weight} were masked when the state was taken, {zeros} are now; "
                    "load the module's state_dict first"
                )
        self.steps, self._observed = state["steps"], state["observed"]
        self.history = [(step, share) for step, share in state["history"]]
        self._movement = {name: scores.clone() for name, scores in state["movement"].items()}

    def _options(self) -> dict[str, Any]:
        names = ("sparsity", "method", "pattern", "end", "start", "begin", "every", "scope", "seed")
        return {name: getattr(self, name) for name in names}

    # --- which numbers go --------------------------------------------------------------------------------------

    def _is_due(self, step: int) -> bool:
        if not self.begin <= step <= self.end or ((step - self.begin) % self.every and step != self.end):
            return False
        # Nothing finite was seen yet, as in the first steps of a GradScaler: the next update makes up for this one.
        return self.method != "movement" or bool(self._movement) or step == self.end

    def _kept(self, share: float) -> list[Tensor]:
        """Booleans by weight, [N, K], True for what stays or is masked already."""
        scores = self._scores()
        for index, (_, mask) in enumerate(self._masks()):
            scores[index] = scores[index].masked_fill(mask == 0, _LOWEST)  # these count first
        if self._pattern.kind == "n:m":
            scores = [_candidates(item, self._pattern) for item in scores]
        if self.scope == "global":
            return lowest(scores, share)
        return [lowest([item], share)[0] for item in scores]

    def _scores(self) -> list[Tensor]:
        """By weight, [N, K], the lowest of which go."""
        weights = [self._tensor(site.weight).detach() for site in self._sites]
        if self.method == "magnitude":
            return [weight.float().abs() for weight in weights]
        if self.method == "random":  # the same at each update, so one mask lies within the next
            generator = torch.Generator().manual_seed(self.seed)
            return [torch.rand(weight.shape, generator=generator).to(weight.device) for weight in weights]
        if not any(bool(scores.any()) for scores in self._movement.values()):
            reason = "are zero; call observe() before zero_grad()" if self._movement else "have infinities or NaN"
            raise InputError(f"all gradients that movement has seen {reason}")
        return [
            self._movement[site.weight].to(weight.device) for site, weight in zip(self._sites, weights, strict=True)
        ]

    def _tensor(self, name: str) -> Tensor:
        """By name each time: moving a module to another device makes new buffers."""
        found: Tensor = attribute(self.program.module, name)
        return found

    def _masks(self) -> list[tuple[_Site, Tensor]]:
        return [(site, self._tensor(site.mask)) for site in self._sites]

    def _check_masks(self) -> None:
        """Refuse weights and masks that the schedule's end cannot be reached with."""
        for site, mask in self._masks():
            weight = self._tensor(site.weight)
            if self.method == "movement" and not weight.requires_grad:
                raise InputError(f"weight {site.weight} is frozen and has no gradient, which movement needs")
            if self._pattern.kind == "n:m":
                if misfit := self._pattern.misfit(*mask.shape):
                    raise InputError(
                        f"{site.layer} cannot have pattern {self.pattern!r}: {misfit}; "
                        f"compile with MaskWeights(0.0, skip=[{site.layer!r}], fold=False)"
                    )
                left = (mask != 0).reshape(-1, self._pattern.of).sum(1).min()
                if left < self._pattern.keep:
                    raise InputError(
                        f"the masks leave {left} of {self._pattern.of} neighbours of {site.layer}, and what is masked "
                        f"stays masked: pattern {self.pattern!r} cannot be reached"
                    )
        layers = self.layers
        if self.scope == "global":
            layers = [Sparsity("the model", sum(item.numbers for item in layers), sum(item.zeros for item in layers))]
        for layer in layers:
            if layer.zeros > round(self.sparsity * layer.numbers):
                raise InputError(
                    f"{layer.zeros / layer.numbers:.1%} of {layer.layer} are masked already, and stay masked: "
                    f"a sparsity of {self.sparsity:g} cannot be reached"
                )


def _candidates(scores: Tensor, pattern: Pattern) -> Tensor:
    """The scores [N, K] of the numbers that an n:m pattern masks; infinity for those that it leaves."""
    return scores.masked_fill(n_of_m(scores, pattern.keep, pattern.of), float("inf"))


def _zeros(mask: Tensor) -> int:
    return int((mask == 0).sum())


def _sites(program: Program) -> list[_Site]:
    """The masked weights of a program, in the order of their layers.

    Raises:
        InputError: there are none, or the masks are of whole heads or neurons.
    """
    places = {node: place for place, node in enumerate(program.graph.nodes)}
    found: list[tuple[int, _Site]] = []
    for item in masked(program):
        mask = program.tensor(item.mask)
        reader = next((user for user in item.product.users if user.target is torch.ops.aten.linear.default), None)
        name = str(item.weight.target)
        layer = (module_path(reader) if reader else "") or name.rpartition(".")[0] or name
        if mask.dim() != 2 or _is_structured(mask):
            raise InputError(
                f"{layer} has masks of whole rows or columns, as of heads, and a schedule of numbers cannot grow them; "
                "let MaskWeights cut them at once (fold=True), and mask what stays with MaskWeights(0.0, fold=False)"
            )
        site = _Site(layer, name, str(item.mask.target))
        found.append((min(places[user] for user in item.product.users), site))
    if not found:
        raise InputError("the program has no masks; compile the model with MaskWeights(0.0, fold=False)")
    return [site for _, site in sorted(found, key=lambda entry: entry[0])]


def _is_structured(mask: Tensor) -> bool:
    """Whether a mask [N, K] has zeros in whole rows and columns only, and leaves a block that is no accident."""
    keep = mask != 0
    rows, columns = keep.any(1), keep.any(0)
    block = rows.unsqueeze(1) & columns
    return bool((keep == block).all()) and not bool(keep.all()) and min(int(rows.sum()), int(columns.sum())) > 1


def _check_choice(option: str, value: Any, valid: Sequence[str]) -> None:
    if value not in valid:
        raise InputError(f"unknown {option} {value!r}: {nearest(str(value), valid)}")


def _check_steps(begin: Any, end: Any, every: Any, seed: Any) -> None:
    checks.seed(seed)
    for option, value, least in (("begin", begin, 0), ("end", end, 1), ("every", every, 1)):
        if option == "every" and value is None:
            continue
        if type(value) is not int or value < least:
            raise InputError(f"{option} must be a number of steps, {least} or more, found {value!r}")
    if end <= begin:
        raise InputError(f"the schedule must end after it begins, found begin={begin} and end={end}")


def _pattern(pattern: Any) -> Pattern:
    if pattern == "unstructured":
        return Pattern("unstructured")
    if pattern in AT_ONCE:
        raise InputError(
            f"{pattern} do not go by a schedule: let MaskWeights choose them at once, with pattern={pattern!r}"
        )
    named = re.fullmatch(r"(\d+):(\d+)", pattern) if isinstance(pattern, str) else None
    if named is None:
        raise InputError(f"unknown pattern {pattern!r}: {nearest(str(pattern), ('unstructured', '2:4', '4:8', 'n:m'))}")
    keep, of = int(named[1]), int(named[2])
    if not 0 < keep < of:
        raise InputError(f"pattern {pattern!r} must keep some, not all, of each group, as in '2:4'")
    return Pattern("n:m", keep, of)


def _is_share(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and 0 <= value <= 1


def _sparsity(sparsity: Any, pattern: Pattern) -> float:
    """The sparsity at the end: an n:m pattern's own."""
    if pattern.kind != "n:m":
        if not _is_share(sparsity):
            raise InputError(f"sparsity must lie between 0 and 1, found {sparsity!r}")
        return float(sparsity)
    own = 1 - pattern.keep / pattern.of
    if sparsity is not None and (not _is_share(sparsity) or abs(sparsity - own) > 0.005):
        raise InputError(f"pattern '{pattern.keep}:{pattern.of}' is a sparsity of {own:g}, found {sparsity!r}")
    return own
