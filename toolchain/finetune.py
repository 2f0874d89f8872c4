"""Fine-tuning: a pruned graph as a torch module goes to the user's own training loop, and its weights come back.

``train.py:loop`` is a function of one or two arguments::

    def loop(module):                  # a torch.nn.Module, in evaluation mode; trained in place
    def loop(module, round):           # with a Round: the dense model as a teacher, a place for checkpoints

The graph is not exported again: nodes and names stay, initializers get the trained numbers. Masked weights stay zero.

``prune_in_rounds`` goes to a high ratio in steps, each followed by training, with the cubic schedule of Zhu & Gupta
(2017, arXiv 1710.01878): much at first, when there is much to spare, and little at the end. What a round made is on
disk when the next one begins; a run that was interrupted goes on from there, and a loop that saves checkpoints, within
the round.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import onnx_ir as ir

from toolchain import user_code
from toolchain.batch_norm import fold_back, with_batch_norm
from toolchain.cache import digest_of
from toolchain.errors import DataError, GraphError, SourceError, StorageError
from toolchain.evaluate import Feeds
from toolchain.observation import graph_digest
from toolchain.onnx_file import read_onnx, write_onnx
from toolchain.storage import reported, write_bytes, write_text

if TYPE_CHECKING:
    from toolchain.torch_module import GraphModule

_VERSION = 2
_CHECKPOINT, _STATE = "checkpoint.pt", "state.json"

#: trains a module in place
Loop: TypeAlias = "Callable[[GraphModule, Round], None]"


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Round:
    """What a training loop may want to know.

    Attributes:
        number: of this round, from 1.
        of: how many there are.
        amount: share that is pruned in this round; 0 where the caller did not say.
        teacher: the dense model, in evaluation mode and not to be trained, to distil from; None where there is none.
        folder: for checkpoints; None where nothing is kept.
    """

    number: int = 1
    of: int = 1
    amount: float = 0.0
    teacher: GraphModule | None = None
    folder: Path | None = None

    def save(self, module: GraphModule, **state: Any) -> None:
        """Keeps the module's weights and what else is needed to go on: tensors, numbers, text, lists and dicts of
        them, such as ``optimizer=optimizer.state_dict(), epoch=7``. Does nothing without a folder.

        Raises:
            StorageError: the disk is full or not writable.
        """
        if self.folder is None:
            return
        import io

        import torch

        buffer = io.BytesIO()
        torch.save({"round": self.number, "weights": module.state_dict(), "state": state}, buffer)
        write_bytes(self.folder / _CHECKPOINT, buffer.getbuffer())

    def restore(self, module: GraphModule) -> Mapping[str, Any] | None:
        """Puts the weights of this round's last checkpoint into the module; None where there is none.

        Returns:
            The other things that were saved.

        Raises:
            DataError: the checkpoint is damaged, or another module's.
        """
        path = None if self.folder is None else self.folder / _CHECKPOINT
        if path is None or not path.is_file():
            return None
        import torch

        try:
            found = torch.load(path, weights_only=True, map_location="cpu")
            if found["round"] != self.number:
                return None
            module.load_state_dict(found["weights"])
            state: Mapping[str, Any] = found["state"]
        except Exception as error:  # torch raises whatever the bytes lead it to
            raise DataError(f"the checkpoint cannot be used: {error}", where=str(path), hint="delete it") from error
        return state


@dataclasses.dataclass(frozen=True, slots=True)
class FineTuned:
    """What training did: how many tensors changed, and how many weights were held at zero."""

    changed: int
    masked: int


def load_loop(text: str) -> Loop:
    """The user's training loop, ``path/train.py:loop``. What it raises comes as a SourceError with file and line.

    Raises:
        SourceError: not spelled like that, no such file or function, it fails, or takes neither one nor two arguments.
    """
    path, name = _split(text)
    function = user_code.load(path, name, error=SourceError)
    try:
        required, most = _arguments(function)
    except ValueError:  # a builtin tells nothing: it is called with both
        required, most = 2, 2
    if most < 1 or required > 2:
        raise SourceError(
            f"{name} takes {required if required > 2 else most} arguments",
            where=str(path),
            hint="write loop(module) or loop(module, round)",
        )

    def loop(module: GraphModule, current: Round) -> None:
        arguments = (module, current) if most >= 2 else (module,)
        user_code.call(lambda: function(*arguments), path, error=SourceError)

    return loop


def _split(text: str) -> tuple[Path, str]:
    found = user_code.split(text)
    if found is None:
        raise SourceError(f"{text!r} is no training loop", hint="spell it FILE.py:FUNCTION, such as train.py:loop")
    return found


def _arguments(function: Callable[..., Any]) -> tuple[int, float]:
    """How many positional arguments a function needs, and takes at most."""
    parameters = inspect.signature(function).parameters.values()
    placed = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in placed if p.default is p.empty]
    keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    endless = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    return len(required) + 3 * len(keywords), math.inf if endless else len(placed)


def fine_tune(
    model: ir.Model,
    loop: Loop,
    *,
    dense: ir.Model | None = None,
    current: Round | None = None,
    samples: Iterable[Feeds] | None = None,
) -> FineTuned:
    """Trains a pruned graph in torch, in place.

    Args:
        model: float32, pruned; gets the trained weights. Zeros of its weights stay zero.
        loop: from ``load_loop``, or any function of module and Round.
        dense: the graph to distil from; it stays as it is.
        current: what the loop is told besides the teacher; None where there is one round and no folder.
        samples: inputs; where they are given, convolutions are trained with BatchNormalization behind them
            (``batch_norm.py``), which takes the learning rates of a network that has it. None: as the graph is.

    Raises:
        DataError: there are no samples in ``samples``.
        SourceError: torch is not installed, or the loop fails.
        GraphError: torch cannot compute the graph, or the trained weights are not finite; the model is as it was then.
    """
    try:
        from toolchain.torch_module import to_torch, write_back
    except ImportError as error:
        raise SourceError(
            f"fine-tuning needs torch: {error}", hint="pip install torch, or recover by reconstruction alone"
        ) from error
    trained = model if samples is None else with_batch_norm(model, samples)
    module = to_torch(trained)
    teacher = None if dense is None else to_torch(dense).requires_grad_(False)
    loop(module, dataclasses.replace(current or Round(), teacher=teacher))
    changed = write_back(module, trained)
    if trained is not model:
        fold_back(trained, model)
    return FineTuned(changed, module.masked)


def trainer(text: str) -> Callable[[ir.Model, ir.Model, Round], FineTuned]:
    """Trains a graph in place with the user's loop, given the graph to distil from, itself and the round.

    Raises:
        As ``load_loop``; and when it is called, as ``fine_tune``.
    """
    loop = load_loop(text)
    return lambda dense, model, current: fine_tune(model, loop, dense=dense, current=current)


def loop_digest(text: str, *, data: bool = False) -> str:
    """SHA-256 over the source of a training loop and, with ``data``, the files that it names: its data, or its logs
    (``user_code.digest``). Raises SourceError."""
    path, name = _split(text)
    try:
        return digest_of({"files": user_code.digest(path, named=data), "name": name})
    except OSError as error:
        raise SourceError(f"the training loop cannot be read: {error.strerror}", where=str(path)) from error


def schedule(rounds: int, final: float, *, start: float = 0.0) -> tuple[float, ...]:
    """How much is pruned after each round: final + (start - final) * (1 - t / rounds) ** 3 (arXiv 1710.01878, eq. 1).

    Raises:
        GraphError: no round, or shares that are not 0 <= start < final < 1.
    """
    if rounds < 1 or not 0 <= start < final < 1:
        raise GraphError(
            f"{rounds} rounds from {start} to {final} make no schedule",
            hint="wanted: 1 or more, 0 <= start < final < 1",
        )
    between = [final + (start - final) * (1 - t / rounds) ** 3 for t in range(1, rounds)]
    return (*between, final)


def prune_in_rounds(
    model: ir.Model,
    step: Callable[[ir.Model, Round], ir.Model],
    *,
    final: float,
    rounds: int,
    folder: Path,
    key: str = "",
    on_round: Callable[[Round, bool], None] = lambda current, resumed: None,
) -> ir.Model:
    """Prunes and trains in several rounds; goes on where an earlier run in the same folder was interrupted.

    Args:
        model: the dense graph; it stays as it is.
        step: a round: gets what the round before made, of which it may make use, and gives it pruned to
            ``Round.amount`` of the dense model, and trained.
        final: share that is pruned in the end.
        rounds: how many.
        folder: of the state; made if it is not there, and taken away again where the first round fails.
        key: what else decides the result, such as a digest of the loop's file and data: another key is refused.
        on_round: is called before each round, and for rounds that an earlier run did.

    Raises:
        GraphError: such rounds make no schedule. And whatever ``step`` raises.
        StorageError: the folder cannot be written, or holds something else.
    """
    amounts = schedule(rounds, final)
    asked = digest_of({"graph": graph_digest(model), "amounts": list(amounts), "key": key, "v": _VERSION})
    with reported(folder, "the state of pruning"):
        folder.mkdir(parents=True, exist_ok=True)
    done = _done(folder, asked)
    current = read_onnx(folder / f"round{done}.onnx") if done else model.clone()
    for number, amount in enumerate(amounts, start=1):
        this = Round(number, rounds, amount, None, folder)
        on_round(this, number <= done)
        if number <= done:
            continue
        try:
            current = step(current, this)
        except BaseException:
            if number == 1 and not (folder / _CHECKPOINT).exists():  # nothing to go on from
                forget_rounds(folder)
            raise
        write_onnx(current, folder / f"round{number}.onnx")
        write_text(folder / _STATE, json.dumps({"version": _VERSION, "asked": asked, "done": number}))
        (folder / _CHECKPOINT).unlink(missing_ok=True)
    return current


def forget_rounds(folder: Path) -> None:
    """Takes away the state of ``prune_in_rounds``, once its result is written. A folder without one stays as it is.

    Raises:
        StorageError: it cannot be removed.
    """
    if (folder / _STATE).is_file():
        with reported(folder, "the state of pruning"):
            shutil.rmtree(folder)


def _done(folder: Path, asked: str) -> int:
    """How many rounds an earlier run finished. Raises StorageError where it was another's."""
    path = folder / _STATE
    if not path.is_file():
        strange = sorted(each.name for each in folder.iterdir() if each.name != _CHECKPOINT)
        if strange:
            raise StorageError(
                f"the folder for the state of pruning holds something else: {strange[0]}",
                where=str(folder),
                hint="give a folder that is empty, or not there",
            )
        # Claimed before the first checkpoint: one of another model must not be taken for ours.
        (folder / _CHECKPOINT).unlink(missing_ok=True)
        write_text(path, json.dumps({"version": _VERSION, "asked": asked, "done": 0}))
        return 0
    try:
        state = json.loads(path.read_text())
        done, same = int(state["done"]), state["version"] == _VERSION and state["asked"] == asked
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"the state of pruning is damaged: {error}", where=str(path), hint="delete the folder"
        ) from error
    if not same:
        raise StorageError(
            "the folder holds rounds of another model, schedule or loop",
            where=str(path),
            hint="delete the folder to begin anew",
        )
    return done
