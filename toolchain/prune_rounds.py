"""Pruning in rounds: a part is cut and trained, then the next, to the aim in the end; resumable."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from toolchain.as_json import dumps, from_json
from toolchain.cache import digest_of
from toolchain.errors import StorageError
from toolchain.finetune import Round, prune_in_rounds
from toolchain.prune_account import Given, GroupCut, PruneReport
from toolchain.recipe import Prune
from toolchain.storage import write_text

#: Cuts once, recovers and trains: see ``pruning.prune``.
Once = Callable[[ir.Model, Prune, Given], tuple[ir.Model, PruneReport]]


def in_rounds(model: ir.Model, asked: Prune, given: Given, once: Once) -> tuple[ir.Model, PruneReport]:
    """The pruned model after ``asked.rounds``, and one account of all of them.

    How much is gone after which round says ``finetune.schedule``. A round in which nothing more goes, since what is
    left is rounded, is not trained either. ``given.folder`` keeps what rounds made; of the accounts too, so that a run
    that goes on tells of those that were done before.

    Raises:
        As ``prune`` and ``prune_in_rounds``.
    """
    train, folder = given.fine_tune, given.folder
    assert train is not None
    assert folder is not None
    final = asked.ratio if asked.ratio is not None else 1 - (asked.target_macs or 0.0)

    def step(before: ir.Model, current: Round) -> ir.Model:
        share = asked
        if current.number < current.of:  # the last is what was asked, to the bit: a second run is to know it again
            key, value = ("ratio", current.amount) if asked.ratio is not None else ("target_macs", 1 - current.amount)
            share = asked.model_copy(update={key: value})
        # the teacher is the whole model, not that of the round before
        within = dataclasses.replace(given, fine_tune=lambda _, cut, __: train(model, cut, current))
        made, report = once(before, share, within)
        write_text(_account(folder, current.number), dumps(report))
        return made

    made = prune_in_rounds(
        model,
        step,
        final=final,
        rounds=asked.rounds,
        folder=folder,
        key=digest_of({"asked": asked.model_dump(), "given": given.key, "seed": given.seed, "dims": dict(given.dims)}),
        on_round=lambda current, done: given.on_status(f"prune: round {current.number} of {current.of}"),
    )
    return made, _together([_read(_account(folder, number)) for number in range(1, asked.rounds + 1)], asked)


def _account(folder: Path, number: int) -> Path:
    return folder / f"round{number}.json"


def _read(path: Path) -> PruneReport:
    try:
        return from_json(PruneReport, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"the account of a round is damaged: {error}", where=str(path), hint="delete the folder"
        ) from error


def _together(reports: list[PruneReport], asked: Prune) -> PruneReport:
    """One account: before the first round, after the last."""
    cut = [(number, report) for number, report in enumerate(reports, start=1) if report.changed]
    name, value = asked.aim
    if not cut:
        return reports[-1]
    last = cut[-1][1]
    groups: dict[str, GroupCut] = {}
    for report in reports:
        for each in report.groups:
            first = groups.get(each.name, each)
            groups[each.name] = dataclasses.replace(each, before=first.before, alone=first.alone)
    told = []
    for number, report in cut:
        told.append(f"round {number}, {report.asked}: the cut loses {report.drop_cut:.3g}, {report.drop:.3g} are left")
    idle = [str(number) for number in range(1, len(reports) + 1) if number not in dict(cut)]
    if idle:
        told.append(f"round {' and '.join(idle)}: nothing more went, and nothing was trained")
    proofs = [report.proof for _, report in cut if report.proof is not None]
    return dataclasses.replace(
        last,
        asked=f"{name} {value} in {len(reports)} rounds",
        groups=tuple(groups.values()),
        blocks=tuple(block for _, report in cut for block in report.blocks),
        whole=reports[-1].whole,
        remarks=(*told, *last.remarks),
        drop_cut=max(report.drop_cut for _, report in cut),
        recovery=tuple(dict.fromkeys(way for _, report in cut for way in report.recovery)),
        proof=max(proofs, default=None),
    )
