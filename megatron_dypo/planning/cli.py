"""The commands ``megatron-dypo plan`` and ``megatron-dypo plan-refit``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_dypo.config.reading.command_line import ConfigFile, Overrides, Quantization

if TYPE_CHECKING:
    from megatron_dypo.planning.setting import Setting


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    model: Annotated[
        str | None,
        typer.Option(help="A published model in place of model.hf_path.", show_default="the config's folder"),
    ] = None,
    gpu: Annotated[str, typer.Option(help="A row of megatron_dypo.planning.devices.")] = "h100-80gb",
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Nodes of the trainer.", show_default="as many as the config needs")
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a node.")] = 8,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Mean length of a prompt.", show_default="a quarter of the limit")
    ] = None,
    response_tokens: Annotated[
        int | None, typer.Option(min=1, help="Mean length of a response.", show_default="a quarter of the limit")
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(metavar="METRICS", help="metrics.jsonl of a run of this config: find and use its constants."),
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Propose layouts and say why; --nodes counts trainer and servers together.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: bytes and seconds.")] = False,
) -> None:
    """Estimate without a GPU whether a run fits, how long a step takes, and how to divide the GPUs.

    Exit status 1: the run does not fit, or the GPU cannot run it.
    """
    from megatron_dypo.config.reading.load import load_config
    from megatron_dypo.planning.calibration import as_dict, calibrated, render_calibration
    from megatron_dypo.planning.devices import find_gpu
    from megatron_dypo.planning.plan import as_data, make_plan
    from megatron_dypo.planning.report import render
    from megatron_dypo.planning.setting import make_setting
    from megatron_dypo.planning.shipped import shipped_architecture

    named = [] if model is None else [f"model.hf_path={json.dumps(model)}"]
    setting = make_setting(
        load_config(config, [*(overrides or []), *named]),
        find_gpu(gpu),
        nodes=None if search else nodes,
        gpus_per_node=gpus_per_node,
        prompt_tokens=prompt_tokens,
        response_tokens=response_tokens,
        arch=None if model is None else shipped_architecture(model),
    )
    calibration = None
    if calibrate is not None:
        setting, calibration = calibrated(setting, calibrate, keep_lengths=bool(prompt_tokens or response_tokens))
    if search:
        typer.echo(_search(setting, nodes, as_json=as_json))
        return
    made = make_plan(setting)
    if as_json:
        typer.echo(json.dumps(as_data(made) | (as_dict(calibration) if calibration else {}), indent=2))
    else:
        found = f"{render_calibration(calibration)}\n" if calibration else ""
        typer.echo(found + render(made).rstrip("\n"))
    if made.problems():
        raise typer.Exit(1)


def _search(setting: Setting, nodes: int | None, *, as_json: bool) -> str:
    """Return the proposals for a number of nodes; None: the config's, of trainer and servers together."""
    from megatron_dypo.planning.proposals import proposals_as_data, render_proposals
    from megatron_dypo.planning.search import search

    per_node = setting.gpus_per_node
    own = -(-setting.trainer_gpus // per_node) + -(-setting.rollout_gpus // per_node)
    found = search(setting, nodes or own)
    return json.dumps(proposals_as_data(found), indent=2) if as_json else render_proposals(found).rstrip("\n")


def plan_refit(
    config: ConfigFile,
    overrides: Overrides = None,
    bandwidth_gbs: Annotated[float, typer.Option(help="GB/s at which a rank sends and receives.")] = 50.0,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="Trainer ranks.", show_default="as `train` starts")
    ] = None,
    ep_size: Annotated[
        int | None, typer.Option(min=1, help="SGLang's --ep-size.", show_default="extra_args, or 1")
    ] = None,
    quantization: Annotated[
        Quantization, typer.Option(help="Format in which linear weights are sent.")
    ] = Quantization.NONE,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: every rank, every link.")] = False,
) -> None:
    """Show the cost of a refit (weight sync): bytes of ranks and links, the lower bound of the time, the planned time.

    Reads the config and MODEL/config.json; needs neither weights nor servers.
    """
    from megatron_dypo.config.reading.load import load_config
    from megatron_dypo.planning.refit import RefitOptions, plan_of_config, refusal_of_training
    from megatron_dypo.refit.plan.summary import summarize, to_json, to_text

    resolved = load_config(config, overrides or [])
    options = RefitOptions(world_size=world_size, ep_size=ep_size, quantization=quantization.value)
    made = plan_of_config(resolved, options)
    summary = summarize(made, bandwidth_gbs * 1e9)
    typer.echo(json.dumps(to_json(summary)) if as_json else to_text(made, summary))
    if refusal := refusal_of_training(resolved):
        typer.echo(f"note: `train` refuses this layout: {refusal}", err=True)
