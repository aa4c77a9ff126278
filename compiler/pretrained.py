"""A compiled transformers model written back as config.json and model.safetensors, where its config can express it.

Nothing is known about any architecture. The model's class is built without memory (on the meta device) from configs in
which one number is changed, which shows what that number decides. What is written is read again and compared.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils import _pytree as pytree

from ..ir.equality import compare, run_float64
from ..ir.errors import InputError, one_line
from ..ir.graph import Program, arguments, identifier, module_path, shape
from ..ir.ops import integer, quantize
from ..ir.ops.attention import attention
from ..ir.ops.linear import split_linear
from ..ir.ops.table import OPERATORS
from ..ir.pruning.masks import masked, stored
from . import artifact, hf

# What configs call the sizes that pruning changes, and the numbers of layers.
SIZES = (
    "intermediate_size", "ffn_dim", "n_inner", "d_ff", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_inner",
    "ffn_hidden_size", "mlp_dim", "moe_intermediate_size", "num_attention_heads", "n_head", "n_heads", "num_heads",
    "encoder_attention_heads", "decoder_attention_heads", "num_key_value_heads", "num_kv_heads", "n_head_kv",
)  # fmt: skip
COUNTS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_encoder_layers",
    "num_decoder_layers",
)  # fmt: skip
ELSE = "or save() the compiled model"


def write(model: Any, program: Program, traced: Program | None, example: Sequence[Tensor], path: Path) -> None:
    """Write a program's weights as a folder that the model's class reads; all of it appears at once, or nothing.

    Args:
        model: what the program was traced from; it is not changed.
        traced: the program before passes, if it is known: what it reads and `program` does not is gone.
        example: flat inputs of the program, on which the result is compared.
        path: the folder to make; it must not exist.

    Raises:
        InputError: the model is none of transformers, the program holds what its config cannot express, the model
            that is read back gives something else, or the folder cannot be written.
    """
    transformers = hf.import_transformers()
    if not isinstance(model, transformers.PreTrainedModel):
        raise InputError(f"{type(model).__name__} is no model of transformers and has no config.json; use save()")
    folder = artifact.new_folder(path)
    _check_plain(program)
    inputs = _named_inputs(program, example)
    with _quiet(transformers):
        new = _rebuilt(model, program, traced)
        with folder as temporary:
            _save(new, temporary)
            _compare(_reload(new, model, temporary), program, inputs, example)


def _check_plain(program: Program) -> None:
    """Refuse quantized programs."""
    modules = (integer.__name__, quantize.__name__)
    quantized = [target for target, entry in OPERATORS.items() if entry.reference.__module__ in modules]
    for node in program.calls(*quantized):
        raise InputError(f"the program is quantized ({node.name}), which no config expresses; compile without, {ELSE}")


def _named_inputs(program: Program, example: Sequence[Tensor]) -> dict[str, Any]:
    """The example as named arguments of the model."""
    signature = program.signature
    paths = [tensor.path for tensor in signature.inputs]
    for path in (*paths, *(item.path for item in signature.constants)):
        if "." in path:
            raise InputError(
                f"the model that is read back cannot be compared on the nested input {path!r}; compile with an "
                f"example of tensors alone, {ELSE}"
            )
    return {**dict(zip(paths, example, strict=True)), **{item.path: item.value for item in signature.constants}}


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Within it, transformers shows no progress and no warnings, as about configs that are only tried."""
    logging = transformers.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hf.quiet(transformers)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# --- the program's weights under the model's names --------------------------------------------------------------


@dataclass
class _Weights:
    """What the program holds of the model's state.

    Attributes:
        tensors: by the model's names and laid out as the model keeps them; the model's own where nothing reads them.
        kept: of each list of layers of which some are gone, the indices of those that stay.
    """

    tensors: dict[str, Tensor]
    kept: dict[str, list[int]]

    def old_name(self, name: str) -> str:
        """The name in the model of a weight of the model to be, where layers are renumbered."""
        for path, kept in self.kept.items():
            if name.startswith(f"{path}."):
                index, _, rest = name.removeprefix(f"{path}.").partition(".")
                return f"{path}.{kept[int(index)]}.{rest}"
        return name


def _weights(model: Any, program: Program, traced: Program | None) -> _Weights:
    state = model.state_dict(keep_vars=True)
    tensors = _stored(program)
    _unpack(program, tensors, {identifier(name) for name in state})
    tied: dict[int, list[str]] = {}
    for name, tensor in state.items():
        tied.setdefault(id(tensor), []).append(name)
    own: dict[str, Tensor] = {}
    for find in (_under_its_name, _laid_out_anew):
        for names in tied.values():
            found = [find(tensors, name, state[name].detach()) for name in names if name not in own]
            for tensor in [item for item in found if item is not None][:1]:
                own.update(dict.fromkeys(names, tensor))
    trained = {name for name, _ in program.module.named_parameters()}
    for name in tensors:
        if name in trained:
            raise InputError(
                f"weight {name} is no weight of {type(model).__name__} any more; compile without 'fuse' or with it as "
                f"the last pass, {ELSE}"
            )
    before = set() if traced is None else {str(node.target) for node in traced.graph.nodes if node.op == "get_attr"}
    gone = {name for name in state if identifier(name) in before and name not in own}
    kept = _kept_layers(model, own, gone)
    return _Weights({name: own.get(name, tensor.detach()) for name, tensor in state.items()}, kept)


def _stored(program: Program) -> dict[str, Tensor]:
    """The program's weights by name, with their masks."""
    nodes = [node for node in program.graph.nodes if node.op == "get_attr"]
    tensors = {str(node.target): value for node in nodes if isinstance(value := program.tensor(node), Tensor)}
    tensors = {name: tensor.detach() for name, tensor in tensors.items()}
    for item in masked(program):
        tensors[str(item.weight.target)] = tensors[str(item.weight.target)] * tensors.pop(str(item.mask.target))
    return tensors


def _unpack(program: Program, tensors: dict[str, Tensor], known: set[str]) -> None:
    """Cut apart what `fuse` packed; each part says in which module it was."""
    for node in program.calls(split_linear):
        given = arguments(node)
        modules = {part.args[1]: module_path(part) for part in node.users}
        for kind in ("weight", "bias"):
            packed = stored(given[kind])
            names = [identifier(f"{modules.get(place, '')}.{kind}") for place in range(len(given["sizes"]))]
            if packed is None or len(set(names)) < len(names) or not known.issuperset(names):
                continue
            rows = tensors.pop(str(packed.target)).split(given["sizes"])
            tensors.update(zip(names, [part.clone() for part in rows], strict=True))


def _under_its_name(tensors: dict[str, Tensor], name: str, _: Tensor) -> Tensor | None:
    return tensors.pop(identifier(name), None)


def _laid_out_anew(tensors: dict[str, Tensor], name: str, old: Tensor) -> Tensor | None:
    """A weight that passes transposed, or of which they kept the rows that are read, as it was."""
    flat = identifier(name).replace(".", "_")
    if f"{flat}_transposed" in tensors:
        return tensors.pop(f"{flat}_transposed").T.contiguous()
    starts = sorted(int(key[len(flat) + 1 :]) for key in tensors if re.fullmatch(rf"{re.escape(flat)}_\d+", key))
    if not starts:
        return None
    parts = [tensors.pop(f"{flat}_{start}") for start in starts]
    ends = [start + len(part) for start, part in zip(starts, parts, strict=True)]
    whole = len(parts) > 1 and starts == [0, *ends[:-1]]
    if whole or parts[0].shape[1:] != old.shape[1:] or ends[-1] > len(old):
        return torch.cat(parts)
    result = old.clone()  # with the rows that nothing reads
    for start, part in zip(starts, parts, strict=True):
        result[start : start + len(part)] = part
    return result


def _kept_layers(model: Any, own: Mapping[str, Tensor], gone: Collection[str]) -> dict[str, list[int]]:
    """Of each list of layers of which some are gone, the indices of those that stay.

    Raises:
        InputError: part of a layer is gone.
    """
    found: dict[str, list[int]] = {}
    lists: list[str] = []
    for path, layers in model.named_modules():
        if not isinstance(layers, torch.nn.ModuleList) or any(path.startswith(f"{outer}.") for outer in lists):
            continue
        lists.append(path)
        inside = [[name for name, _ in layer.named_parameters()] for layer in layers]
        has = [{name for name in names if f"{path}.{place}.{name}" in own} for place, names in enumerate(inside)]
        for place, names in enumerate(inside):
            absent = [name for name in names if name not in has[place]]
            lost = [name for name in absent if f"{path}.{place}.{name}" in gone or any(name in other for other in has)]
            if has[place] and lost:
                raise InputError(
                    f"{type(model.config).__name__} has no layer without {lost[0]}, which is cut from {path}.{place} "
                    f"while {min(has[place])} stays; cut neurons, {ELSE}"
                )
        kept = [place for place, names in enumerate(inside) if has[place] or not names]
        read = any(has) or any(name.startswith(f"{path}.") for name in gone)  # else the inputs never came there
        if read and len(kept) < len(layers):
            found[path] = kept
    return found


# --- a config for them ------------------------------------------------------------------------------------------

Place = tuple[str, int]  # a weight of the model, and an axis


def _rebuilt(model: Any, program: Program, traced: Program | None) -> Any:
    """The model's class with the program's weights, from a config that fits them."""
    weights = _weights(model, program, traced)
    config = copy.deepcopy(model.config)
    for path, kept in weights.kept.items():
        config = _with_fewer_layers(model, config, path, kept)
    needed = _sizes(weights.tensors)
    new = _built(model, config)
    for _ in SIZES:
        misfits = [place for place, size in _sizes_of(new, weights).items() if needed.get(place) != size]
        if not misfits:
            break
        config = _resized(model, config, program, weights, misfits)
        new = _built(model, config)
    else:
        raise _inexpressible(config, program, misfits[0], needed)
    _fill(new, model, weights)
    return new


def _built(model: Any, config: Any) -> Any:
    """The model's class on the meta device, from a config as it is read from its file.

    Raises:
        InputError: config or class refuse it.
    """
    try:
        with torch.device("meta"):
            return type(model)(type(config).from_dict(config.to_dict())).eval()
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise InputError(f"{type(config).__name__}: {lines[-1] if lines else one_line(error)}; {ELSE}") from error


def _tried(model: Any, config: Any) -> Any:
    """`_built`, or None."""
    try:
        return _built(model, config)
    except InputError:
        return None


def _attributes(config: Any, names: Sequence[str], prefix: str = "") -> dict[str, Any]:
    """Those of `names` that a config has under that very name, also in configs of its parts: `text_config.n_head`."""
    found = {f"{prefix}{name}": vars(config)[name] for name in names if name in vars(config)}
    for name, value in vars(config).items():
        if hasattr(value, "attribute_map"):
            found |= _attributes(value, names, f"{prefix}{name}.")
    return found


def _changed(config: Any, values: Mapping[str, Any]) -> Any:
    """A copy with other values."""
    result = copy.deepcopy(config)
    for path, value in values.items():
        setattr(_owner(result, path), path.rpartition(".")[2], value)
    return result


def _owner(config: Any, path: str) -> Any:
    for part in path.split(".")[:-1]:
        config = getattr(config, part)
    return config


def _with_fewer_layers(model: Any, config: Any, path: str, kept: Sequence[int]) -> Any:
    """A config by which a list of layers is as short as it is to be."""
    total = len(model.get_submodule(path))

    def fits(found: Any) -> bool:
        new = _tried(model, found)
        return new is not None and len(new.get_submodule(path)) == len(kept)

    if fits(config):  # another list has the same number
        return config
    for name, value in _attributes(config, COUNTS).items():
        if value == total:
            prefix = name[: len(name) - len(name.rpartition(".")[2])]
            by_layer = {
                f"{prefix}{key}": [item[place] for place in kept]
                for key, item in vars(_owner(config, name)).items()
                if "layer" in key and isinstance(item, list | tuple) and len(item) == total
            }
            changed = _changed(config, {name: len(kept), **by_layer})
            if fits(changed):
                return changed
    raise InputError(f"{type(config).__name__} has no number of {path} that could be {len(kept)}; cut neurons, {ELSE}")


def _sizes(tensors: Mapping[str, Tensor]) -> dict[Place, int]:
    return {(name, axis): size for name, tensor in tensors.items() for axis, size in enumerate(tensor.shape)}


def _sizes_of(new: Any, weights: _Weights) -> dict[Place, int]:
    """The sizes of a built model's weights under the names that they had."""
    return _sizes({weights.old_name(name): tensor for name, tensor in new.state_dict().items()})


def _resized(model: Any, config: Any, program: Program, weights: _Weights, misfits: Sequence[Place]) -> Any:
    """A config with sizes changed so that fewer weights misfit.

    Raises:
        InputError: none is, or weights need different ones.
    """
    needed = _sizes(weights.tensors)
    freed = _with_head_sizes(config)
    rules = {
        path: _rule(model, freed, path, value, weights)
        for path, value in _attributes(config, SIZES).items()
        if value is None or type(value) is int
    }
    values: dict[str, int] = {}
    left = {path: rule for path, rule in rules.items() if rule}
    while left and not values:
        alone = {
            path: {place: rule[place] for place in rule if _decides(left, place) == 1} for path, rule in left.items()
        }
        for path, rule in alone.items():
            if not rule.keys().isdisjoint(misfits):
                values[path] = _number(config, program, path, rule, needed)
        # where nothing misfits that a number decides alone, it is right: the others decide the rest
        left = {path: rule for path, rule in left.items() if not alone[path]} if any(alone.values()) else {}
    if not values:
        raise _inexpressible(config, program, misfits[0], needed)
    return _changed(freed if any("head" in path for path in values) else config, values)


def _decides(rules: Mapping[str, Mapping[Place, Any]], place: Place) -> int:
    """How many numbers decide a size."""
    return sum(place in rule for rule in rules.values())


def _number(
    config: Any, program: Program, path: str, rule: Mapping[Place, tuple[int, int]], needed: Mapping[Place, int]
) -> int:
    """The value of a number in the config by which all that it decides has the sizes that are needed."""
    wanted: dict[int, Place] = {}
    for place, (step, offset) in rule.items():
        value, rest = divmod(needed[place] - offset, step) if place in needed else (0, 0)
        if rest or value < 1:
            raise _inexpressible(config, program, place, needed)
        wanted.setdefault(value, place)
    if len(wanted) > 1:
        (one, first), (other, second) = list(wanted.items())[:2]
        raise InputError(
            f"{type(config).__name__} has one {path}: {first[0]} needs {one}, {second[0]} needs {other}; cut all "
            f"layers alike (scope='layer') or other units, {ELSE}"
        )
    return next(iter(wanted))


def _with_head_sizes(config: Any) -> Any:
    """A config that says the size of heads, which else follows from their number, for classes that read it."""
    values: dict[str, int] = {}
    for prefix in dict.fromkeys(path.rpartition(".")[0] for path in _attributes(config, SIZES)):
        owner = _owner(config, f"{prefix}." if prefix else "")
        width, heads = getattr(owner, "hidden_size", None), getattr(owner, "num_attention_heads", None)
        if getattr(owner, "head_dim", None) is None and type(width) is int and type(heads) is int:
            values[f"{prefix}.head_dim" if prefix else "head_dim"] = width // heads
    return _changed(config, values)


def _rule(model: Any, config: Any, path: str, value: int | None, weights: _Weights) -> dict[Place, tuple[int, int]]:
    """What a number in the config decides: sizes that are `step` times that number + `offset`, as two tries show."""
    tries = (1, 2, 3) if value is None else (value, 1, 2 * value, value // 2, 3 * value)
    seen: list[tuple[int, dict[Place, int]]] = []
    for number in dict.fromkeys(tries):
        new = _tried(model, _changed(config, {path: number})) if number and len(seen) < 2 else None
        if new is not None:
            seen.append((number, _sizes_of(new, weights)))
    if len(seen) < 2:
        return {}
    (first, before), (second, after) = seen
    steps = {place: (after[place] - before[place]) // (second - first) for place in before if place in after}
    return {place: (step, before[place] - step * first) for place, step in steps.items() if step}


def _inexpressible(config: Any, program: Program, place: Place, needed: Mapping[Place, int]) -> InputError:
    kind, name = type(config).__name__, place[0]
    sizes = [size for (other, _), size in needed.items() if other == name]
    for node in program.calls(attention):
        _, heads, _, width = shape(arguments(node)["query"])
        if name.startswith(f"{module_path(node)}.") and any(size % (heads * width) == 0 for size in sizes):
            return InputError(
                f"{kind} ties the size of heads to their number and has no place for {heads} heads of {width} "
                f"({name}); cut neurons, {ELSE}"
            )
    return InputError(f"{kind} has no number by which {name} would be {sizes}; use save()")


def _fill(new: Any, model: Any, weights: _Weights) -> None:
    """Give a model on the meta device its weights; each is used."""
    state = {name: weights.old_name(name) for name in new.state_dict()}
    unused = sorted(set(weights.tensors).difference(state.values()))
    for name in unused:
        layer = next((path for path in weights.kept if name.startswith(f"{path}.")), None)
        if layer is None or int(name.removeprefix(f"{layer}.").partition(".")[0]) in weights.kept[layer]:
            raise InputError(f"{type(new.config).__name__} has no place for {name} any more; cut neurons, {ELSE}")
    new.load_state_dict({name: weights.tensors[old] for name, old in state.items()}, assign=True)
    new.tie_weights()
    if getattr(model, "generation_config", None) is not None:
        new.generation_config = copy.deepcopy(model.generation_config)


# --- written, read and compared ---------------------------------------------------------------------------------


def _save(new: Any, folder: Path) -> None:
    try:
        new.save_pretrained(folder, max_shard_size="1TB")
    except (ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise InputError(f"transformers cannot write this {type(new).__name__}: {one_line(error)}") from error


def _reload(new: Any, model: Any, folder: Path) -> Any:
    """The model as users will read it."""
    try:
        found, information = type(new).from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            attn_implementation=model.config._attn_implementation,
        )
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise InputError(f"transformers cannot read this {type(new).__name__} back: {one_line(error)}") from error
    for name in information["missing_keys"]:
        raise InputError(f"{type(new).__name__} does not read {name} back; use save()")
    return found.eval()


def _compare(model: Any, program: Program, inputs: Mapping[str, Any], example: Sequence[Tensor]) -> None:
    """Refuse a model that gives something else than the program."""
    device = example[0].device
    with torch.no_grad():
        found: Any = model.to(device)(**inputs)
        usual, judge = program.run(example), run_float64(program, example)
    names = program.signature.outputs
    places = range(len(names))
    if isinstance(found, Mapping):
        by_name = {key: pytree.tree_leaves(value) for key, value in found.items()}
        groups = [([at for at in places if names[at].partition(".")[0] == key], own) for key, own in by_name.items()]
    else:
        groups = [(list(places), pytree.tree_leaves(found))]
    groups = [(group, own) for group, own in groups if len(group) == len(own)]  # fewer layers have fewer states
    if not groups:
        raise InputError(f"{type(model).__name__} gives no output that the program gives; use save()")
    for group, own in groups:
        verdict = compare(own, [usual[at] for at in group], [judge[at] for at in group], [names[at] for at in group])
        if not verdict.equal:
            raise InputError(
                f"{type(model.config).__name__} cannot express this program: with its weights {type(model).__name__} "
                f"gives something else, {verdict.reasons[0]}; use save()"
            )
