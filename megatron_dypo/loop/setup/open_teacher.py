"""How a run connects to a teacher's servers, if its objective reads their log-probs of rollouts."""

from __future__ import annotations

from megatron_dypo.loop.replica import Follower
from megatron_dypo.loop.setup.foundation import Foundation
from megatron_dypo.loop.setup.open_leader import OpenedLeader
from megatron_dypo.loop.teacher import NoTeacher, Teacher
from megatron_dypo.rollout.keys import read_api_key
from megatron_dypo.rollout.teacher.check import require_same_tokenizer
from megatron_dypo.rollout.teacher.client import TeacherClient


def open_teacher(base: Foundation, opened: OpenedLeader | Follower) -> Teacher | NoTeacher:
    """Return the teacher of this rank. Every leader checks that it reaches the right servers.

    Raises:
        ValueError: a server does not answer, or has another tokenizer than the policy.
    """
    objective, cfg = base.objective, base.config.teacher_servers
    if not objective.needs_teacher_logp() or isinstance(opened, Follower):
        return NoTeacher()
    api_key = read_api_key(cfg.api_key_env)
    require_same_tokenizer(cfg, api_key, opened.tokenizer, policy=base.config.model.hf_path)
    return Teacher(
        client=TeacherClient(cfg, api_key, vocab_size=opened.tokenizer.vocab_size),
        reads=objective.reads_teacher,
        show_progress=base.ranks.is_global_leader,
    )
