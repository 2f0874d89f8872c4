"""The options of the TensorRT targets, and from profiles in terms of named sizes to shapes of inputs."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from runtimes._options import bad_option, check_choice, check_switches, check_whole
from runtimes.base import InvalidInput

HardwareCompatibility = Literal["none", "ampere-plus", "same-compute-capability"]
#: smallest, most frequent and largest: of one size, or of a whole shape
Range = tuple[int, int, int] | tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

#: What a size that nobody gave is taken for: of the first axis, which is the batch as a rule, and of any other.
DEFAULT_BATCH = (1, 1, 32)
DEFAULT_SIZE = (1, 128, 512)
_MAX_SIZE = 2**31 - 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TensorRTOptions:
    """Options of ``tensorrt`` and ``tensorrt-rtx``.

    All but the last three are the builder's: they are fixed once the engine is built. There is no precision among them:
    networks are strongly typed, so it is the graph that says it.

    Attributes:
        profiles: optimisation profiles, each a mapping from the name of a size (``batch``) to its smallest, most
            frequent and largest value, or from the name of an input to three whole shapes (three lists of values
            where the input is itself a shape). An engine runs what is inside one of its profiles and is fastest at
            the middle value. With none, ``DEFAULT_BATCH`` and ``DEFAULT_SIZE`` are taken and that is remarked.
        workspace_mib: the most GPU memory that a layer may use beside its tensors, in MiB; all there is where None.
        optimization_level: how long the builder looks for faster kernels, 0 to 5.
        timing_cache: keep what kernels took, and start from what earlier builds on this GPU kept. Not of
            ``tensorrt-rtx``, which chooses kernels when an engine is loaded.
        sparsity: let kernels use weights with at most two of four neighbouring input channels not zero, where faster.
        refit: let the weights be replaced in the built engine.
        version_compatible: let later versions of TensorRT load the engine. Only ``tensorrt``.
        hardware_compatibility: let other GPUs load the engine: any since Ampere, or any of the same compute
            capability. Only ``tensorrt``: to ``tensorrt-rtx`` GPUs are named in the target.
        weight_streaming: let weights stay on the host and travel while the model runs.
        tf32: let float32 be multiplied with 10 bits of mantissa. Off, so that float32 means that.
        layer_information: keep the names and formats of layers in the engine, for looking into it.
        cuda_graph: record a run with the same shapes once and replay it.
        weight_streaming_budget: bytes of weights that stay on the GPU in an engine built with ``weight_streaming``;
            TensorRT's own choice where None.
        kernel_cache: keep the kernels that ``tensorrt-rtx`` compiles in the first runs for the next process.
    """

    profiles: tuple[Mapping[str, Range], ...] = ()
    workspace_mib: int | None = None
    optimization_level: int = 3
    timing_cache: bool = True
    sparsity: bool = False
    refit: bool = False
    version_compatible: bool = False
    hardware_compatibility: HardwareCompatibility = "none"
    weight_streaming: bool = False
    tf32: bool = False
    layer_information: bool = False
    cuda_graph: bool = False
    weight_streaming_budget: int | None = None
    kernel_cache: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "profiles", _profiles(self.profiles))
        check_choice("TensorRT", self, "hardware_compatibility", HardwareCompatibility)
        check_whole("TensorRT", self, "optimization_level", 0, 5)
        for name, least in (("workspace_mib", 1), ("weight_streaming_budget", 0)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not least <= value < 1 << 40):
                raise bad_option("TensorRT", name, value, f"a whole number from {least}, or none")
        check_switches("TensorRT", self)


#: Options that only say how a built engine is run.
SESSION_OPTIONS = ("cuda_graph", "weight_streaming_budget", "kernel_cache")
#: Options that do not change the engine that is built, only how fast it is.
_NOT_IN_ENGINE = (*SESSION_OPTIONS, "timing_cache")


def build_options(options: TensorRTOptions) -> dict[str, Any]:
    """The builder's options that are not the default, as JSON has them."""
    return {
        field.name: json.loads(json.dumps(getattr(options, field.name)))
        for field in dataclasses.fields(options)
        if field.name not in _NOT_IN_ENGINE and getattr(options, field.name) != field.default
    }


@dataclasses.dataclass(frozen=True, slots=True)
class NetworkInput:
    """An input of a parsed network.

    Attributes:
        name: its name.
        shape: -1 where a size is not fixed.
        dims: the graph's name of each size, "" where it has none.
        is_shape: whether its values are a shape that others depend on, so that profiles give values for it.
    """

    name: str
    shape: tuple[int, ...]
    dims: tuple[str, ...]
    is_shape: bool = False


#: Input -> its smallest, most frequent and largest shape, or values where the input is a shape.
Profile = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


def resolve_profiles(
    inputs: Sequence[NetworkInput], profiles: Sequence[Mapping[str, Range]]
) -> tuple[tuple[Profile, ...], tuple[str, ...]]:
    """From named sizes to whole shapes.

    Returns:
        A profile for each of ``profiles``, one where there is none but a size is not fixed, none where all are; and
        which sizes nobody gave, for a person.

    Raises:
        InvalidInput: a name that no input has, a shape that does not fit its input, or values that are missing for
            an input that is a shape.
    """
    dynamic = [one for one in inputs if one.is_shape or -1 in one.shape]
    if not dynamic:
        if profiles:
            raise InvalidInput(
                "profiles are for sizes that vary, and this model has none",
                where="option profiles",
                hint="leave it out, or export with dynamic sizes",
            )
        return (), ()
    names = [one.name for one in dynamic]
    dims = [dim for one in dynamic for dim, size in zip(one.dims, one.shape, strict=True) if size == -1 and dim]
    for number, profile in enumerate(profiles):
        for key, value in profile.items():
            known = names if isinstance(value[0], tuple) else dims
            if key not in known:
                what = "input with sizes that vary" if isinstance(value[0], tuple) else "size"
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
                has = ", ".join(sorted(set(known))) or "none with a name; give whole shapes of its inputs"
                raise InvalidInput(
                    f"the model has no {what} {key!r}",
                    where=f"option profiles, number {number}",
                    hint=f"{f'did you mean {near[0]}? ' if near else ''}it has: {has}",
                )
    assumed: dict[str, tuple[int, int, int]] = {}
    resolved = tuple({one.name: _shapes(one, profile, assumed) for one in dynamic} for profile in profiles or ({},))
    remarks = tuple(
        f"nobody gave {name}: the engine takes {low} to {high} and is fastest at {best}; "
        f"the option profiles says otherwise"
        for name, (low, best, high) in assumed.items()
    )
    return resolved, remarks


def _shapes(
    one: NetworkInput, profile: Mapping[str, Range], assumed: dict[str, tuple[int, int, int]]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The three shapes of an input; notes in ``assumed`` what nobody gave."""
    where = f"option profiles, input {one.name!r}"
    given = profile.get(one.name)
    if given is not None and isinstance(given[0], tuple):
        low, best, high = given[0], tuple(given[1]), tuple(given[2])
        if one.is_shape:
            return low, best, high
        for shape in (low, best, high):
            fits = len(shape) == len(one.shape) and all(
                fixed in (-1, size) for fixed, size in zip(one.shape, shape, strict=True)
            )
            if not fits:
                raise InvalidInput(
                    f"the shape {list(shape)} does not fit {_written(one)}", where=where, hint="write every size"
                )
        return low, best, high
    if one.is_shape:
        raise InvalidInput(
            f"{one.name!r} is a shape that others depend on, so its values have to be known",
            where=where,
            hint=f"profiles=[{{{one.name!r}: (smallest values, most frequent, largest)}}]",
        )
    columns: list[tuple[int, int, int]] = []
    for axis, (size, dim) in enumerate(zip(one.shape, one.dims, strict=True)):
        if size != -1:
            columns.append((size, size, size))
        elif dim and dim in profile:
            columns.append(cast(tuple[int, int, int], profile[dim]))  # a shape stands under an input's name
        else:
            label = f"size {dim!r}" if dim else f"axis {axis} of {one.name!r}"
            columns.append(assumed.setdefault(label, DEFAULT_SIZE if axis else DEFAULT_BATCH))
    low, best, high = (tuple(column[which] for column in columns) for which in range(3))
    return low, best, high


def _written(one: NetworkInput) -> str:
    sizes = (str(size) if size != -1 else dim or "?" for size, dim in zip(one.shape, one.dims, strict=True))
    return f"{one.name}[{', '.join(sizes)}]"


def _profiles(given: Any) -> tuple[Mapping[str, Range], ...]:
    """Checks and normalises what a recipe or a caller wrote."""
    if isinstance(given, Mapping):
        raise bad_option("TensorRT", "profiles", given, "a list of profiles, each a mapping")
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise bad_option("TensorRT", "profiles", given, "a list of profiles, each a mapping")
    found = []
    for profile in given:
        if not isinstance(profile, Mapping):
            raise bad_option("TensorRT", "profiles", profile, "a list of profiles, each a mapping")
        found.append({key: _range(key, value) for key, value in profile.items()})
    return tuple(found)


def _range(key: object, value: Any) -> Range:
    wanted = f"{key}: [smallest, most frequent, largest], of whole numbers from 1 or of whole shapes"
    if not isinstance(key, str) or not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 3:
        raise bad_option("TensorRT", "profiles", {key: value}, wanted)
    if all(isinstance(one, Sequence) and not isinstance(one, str) for one in value):
        shapes = tuple(tuple(one) for one in value)
        if len({len(shape) for shape in shapes}) == 1 and all(_rising(column) for column in zip(*shapes, strict=True)):
            return shapes[0], shapes[1], shapes[2]
    elif _rising(tuple(value)):
        return value[0], value[1], value[2]
    raise bad_option("TensorRT", "profiles", {key: value}, f"{wanted}, and not falling")


def _rising(sizes: tuple[Any, ...]) -> bool:
    whole = all(type(size) is int and 1 <= size <= _MAX_SIZE for size in sizes)
    return whole and list(sizes) == sorted(sizes)
