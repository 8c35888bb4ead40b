"""Time ``megatron-dypo plan --search`` on one core, and print what it proposes.

    python benchmarks/plan_search.py

Llama-3-70B on 12 nodes of eight H100s and Qwen3-235B-A22B on 32, with the configs of ``tests/planning_configs``. The
last line has the seconds of processor time.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import measure

from megatron_dypo.config.reading.load import load_config
from megatron_dypo.planning.devices import find_gpu
from megatron_dypo.planning.proposals import render_proposals
from megatron_dypo.planning.search import search
from megatron_dypo.planning.setting import make_setting
from megatron_dypo.planning.shipped import shipped_architecture

CONFIGS = Path(__file__).resolve().parents[1] / "tests" / "planning_configs"
CASES = {"70b": ("llama3_70b", "llama3-70b", 12), "235b": ("qwen3_235b_a22b", "qwen3-235b-a22b", 32)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="fewer nodes: does it run?")
    args = parser.parse_args()
    measure.print_header()
    seconds = {}
    for name, (config, model, nodes) in CASES.items():
        setting = make_setting(
            load_config(CONFIGS / f"{config}.yaml"), find_gpu("h100-80gb"), arch=shipped_architecture(model)
        )
        if args.smoke:
            nodes = 8 if name == "70b" else 24
        start = time.process_time()
        proposals = search(setting, nodes)
        seconds[f"search_{name}_s"] = round(time.process_time() - start, 2)
        print(f"\n{model}, {seconds[f'search_{name}_s']} s of one core\n{render_proposals(proposals)}")
    measure.print_result(seconds)


if __name__ == "__main__":
    main()
