"""Run folders for the tests of the report."""

from pathlib import Path

from megatron_dypo.config.run import LoggingConfig
from megatron_dypo.metrics.samples import RolloutRow, SampleLog, SampleRow
from megatron_dypo.metrics.writer import MetricsWriter

HOSTILE = "</script><script>document.title='owned'</script><!-- <img src=x onerror=\"document.title='owned'\"> & \u2028"


def make_run(run_dir: Path, num_steps: int, num_prompts: int = 2, text: str = "so it is 4") -> Path:
    """Write a run with metrics, and for each step ``num_prompts`` samples in which every text is ``text``."""
    log = SampleLog(run_dir)
    with MetricsWriter(run_dir, LoggingConfig(tensorboard=False)) as writer:
        for step in range(num_steps):
            writer.write(step, step_metrics(step))
            log.write(step, [sample(step, f"p{index}", text) for index in range(num_prompts)])
    return run_dir


def step_metrics(step: int) -> dict[str, float]:
    return {
        "rollout/reward": 0.1 * step,
        "gate/easy": 0.25,
        "gate/mid": 0.5,
        "gate/hard": 0.25,
        "train/grad_norm": 1.0 + step,
        "eval/held_out/accuracy": 0.5,
        "eval/held_out/num_samples": 100,
        "teacher/terse/share": 1.0,
    }


def sample(step: int, prompt_id: str, text: str) -> SampleRow:
    rollouts = [
        RolloutRow(
            text=text,
            is_correct=index == 0,
            reward=float(index == 0),
            finish="stop",
            num_tokens=5,
            policy_version=step,
            error=None,
        )
        for index in range(2)
    ]
    return SampleRow(
        step=step,
        prompt_id=prompt_id,
        source="sums",
        prompt=text,
        answer="4",
        tier="mid",
        treatment="mix",
        teacher="terse",
        dropped=None,
        policy_version=step,
        rollouts=rollouts,
        trace=text,
        trace_verdict={"is_correct": False, "reward": -0.25, "error": None},
    )
