"""Compare a refit from TP2 trainer ranks to TP2 servers with two other ways to move the same model.

    python benchmarks/refit.py [--rounds 7]

The weights are random: a Llama-like model in bf16, 1.2 GB, sent between processes of this machine. Variants take turns
in the same processes:

- ``planned``: the trainer ranks send the slices of the plan by ``p2p``, over connections that exist already (TCP), with
  sampled checksums; the server ranks run the loader that SGLang runs. HTTP calls to a server are not included.
- ``raw``: gloo sends and receives the same number of bytes on each link, as one tensor, into memory that is discarded.
- ``broadcast``: rank 0 gathers each whole tensor, and broadcasts buckets of 512 MiB over gloo; each server rank copies
  its slices out.

``planned`` and ``broadcast`` end when every server rank holds all its weights in place; the two results are compared.
The last line is one JSON object; see README.md.

All ratios depend on the machine. With one server 4 processes copy at the same time, with two servers 6. ``raw`` is one
large message on each link. ``planned`` has about 140 of at most 16 MiB, most of them received in place, and checksums
of a sixteenth of the bytes. Over gloo the same messages take 1.5 times as long as one large one, whatever their size
and however many are in flight; so ``p2p`` has connections of its own. ``broadcast`` allocates new memory for each
tensor and bucket. A busy machine changes the variants by different factors: read every round.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--smoke", action="store_true", help="one round of a tiny model: does it run?")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        from refit_ranks import answer

        answer(json.loads(arguments.measure))
        return
    if arguments.smoke:
        arguments.rounds, arguments.layers, arguments.hidden = 1, 1, 512
    measure.print_header()
    one, two = (run(servers, arguments) for servers in (1, 2))
    for name, result in (("1 server", one), ("2 servers", two)):
        for variant, seconds in result["seconds"].items():
            rounds = " ".join(f"{value:.3f}" for value in seconds)
            rate = result["bytes"] / statistics.median(seconds) / 1e9
            print(f"{name}: {variant}: median {statistics.median(seconds):.3f} s, {rate:.2f} GB/s into place")
            print(f"    by round {rounds}")
    ratios = {
        "bandwidth_vs_raw": ratio(one, "raw", "planned"),
        "time_vs_broadcast": ratio(one, "planned", "broadcast"),
        "time_vs_broadcast_2_servers": ratio(two, "planned", "broadcast"),
    }
    measure.print_result({name: round(value, 3) for name, value in ratios.items()})


def run(num_servers: int, arguments: argparse.Namespace) -> Any:
    case = {"servers": num_servers, **{name: getattr(arguments, name) for name in ("rounds", "layers", "hidden")}}
    return measure.run_ranks(__file__, ["--measure", json.dumps(case)], ranks=2 + 2 * num_servers)


def ratio(result: Any, above: str, below: str) -> float:
    seconds = result["seconds"]
    return float(statistics.median(seconds[above]) / statistics.median(seconds[below]))


if __name__ == "__main__":
    main()
