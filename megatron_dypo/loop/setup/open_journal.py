"""How the journal of a replica is opened: which records of earlier attempts count, and where new ones go."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from megatron_dypo.config.tree import Config
from megatron_dypo.loop.journal.found import Found, folder_of, folders, number_of_folder, read_journals
from megatron_dypo.loop.journal.journal import Journal
from megatron_dypo.loop.journal.no_journal import NoJournal
from megatron_dypo.loop.journal.records import Decode, Start, dump
from megatron_dypo.loop.journal.weights import NoWeights, Weights
from megatron_dypo.loop.journal.writer import SegmentWriter
from megatron_dypo.loop.policy import Policy
from megatron_dypo.loop.ranks import Ranks
from megatron_dypo.loop.resume import RestoredState

log = logging.getLogger("megatron_dypo")

FOLDER = "journal"
"""Folder of a run that holds the journals of its replicas."""
_SAMPLING = ("group_size", "max_new_tokens", "temperature", "top_p", "top_k", "stop_token_ids")


def setting_of(config: Config, inputs: Mapping[str, Any]) -> str:
    """Return a digest of everything in the configuration and its inputs that decides a group.

    Args:
        inputs: those that a resume compares; see :func:`megatron_dypo.loop.setup.inputs.describe_inputs`.
    """
    rollout = asdict(config.rollout)
    decides = {
        "inputs": {name: part for name, part in inputs.items() if name != "reference"},
        "data": {name: value for name, value in asdict(config.data).items() if name != "prompts"},
        "sampling": {name: rollout[name] for name in _SAMPLING},
        "objective": asdict(config.objective),
        "seed": config.run.seed,
    }
    text = json.dumps(decides, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Restored(RestoredState, Protocol):
    """The part of a checkpoint that the digests of its weights are read from."""

    @property
    def step(self) -> int: ...


def open_weights(config: Config, policy: Policy, restored: Restored | None) -> Weights | NoWeights:
    """Return the digests of the versions that this run has had, up to the one of its checkpoint."""
    if not config.rollout.journal:
        return NoWeights()
    weights = Weights(digest=policy.weights_digest, keeps=config.batching.max_version_lag)
    if restored is not None:
        weights.restore(restored.trainer_state.get("weights", {}), restored.step)  # another version saved none
    return weights


def open_journal(
    config: Config, ranks: Ranks, weights: Weights | NoWeights, decode: Decode, inputs: Mapping[str, Any]
) -> Journal | NoJournal:
    """Read the journals in the run folder, and begin a new file of this replica's.

    Without ``run.resume`` what an earlier run left is not read.
    """
    if isinstance(weights, NoWeights):
        return NoJournal()
    root, setting = Path(config.run.dir) / FOLDER, setting_of(config, inputs)
    surplus = [folder for folder in folders(root) if number_of_folder(folder) >= ranks.replicas]
    found = Found()
    if config.run.resume:
        found = read_journals(root, replica=ranks.replica, replicas=ranks.replicas, setting=setting)
    journal = Journal(
        writer=SegmentWriter(
            folder_of(root, ranks.replica),
            start=dump(Start(setting=setting, replicas=ranks.replicas)),
            limit_bytes=config.rollout.journal_mib * 2**20,
        ),
        weights=weights,
        decode=decode,
        max_version_lag=config.batching.max_version_lag,
        replica=ranks.replica,
        replicas=ranks.replicas,
        found=found,
        surplus=surplus if ranks.replica == 0 else [],
    )
    journal.adopt()
    if found.entries:
        log.info("the journal holds %d finished groups of the run before", len(found.entries))
    return journal
