"""The command line: parse, call, print. All of it can be done from Python (``hsplit.launch`` and others)."""

from __future__ import annotations

from hsplit.shadowing import refuse_shadowed_modules

# Before any other import, which might find the wrong file.
refuse_shadowed_modules()
# ruff: noqa: E402

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from hsplit import __version__
from hsplit.errors import HsplitError, RunError
from hsplit.streams import outputs
from hsplit.waiting import status

_Command = TypeVar("_Command", bound=Callable[..., Any])

INTERRUPTED = 130
"""Exit code that shells report for a process ended by SIGINT."""


class _Group(click.Group):
    """Group that turns errors into one line on stderr and an exit code; tracebacks of unexpected ones are kept."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except HsplitError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt as error:
            click.echo("; ".join(["interrupted", *map(str, error.args)]), err=True)
            ctx.exit(INTERRUPTED)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            # Click handles these, and a closed pipe, itself.
            raise
        except Exception as error:
            from hsplit.tracebacks import unexpected

            failure = unexpected(error)
            click.echo(f"error: {failure}", err=True)
            ctx.exit(failure.exit_code)


def run() -> None:
    """Run the console command."""
    # Imports make a million lasting objects; collecting garbage after every 700 new ones would take a second.
    gc.set_threshold(100_000)
    outputs.protect()
    try:
        main()
    except SystemExit as end:
        if (loss := outputs.loss()) is not None:
            click.echo(f"error: standard output could not be written: {loss}", err=True)
            # For a run, the exit code is that of the training.
            end.code = end.code or (0 if outputs.runs else RunError.exit_code)
        raise


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="hsplit")
def main() -> None:
    """Fine-tune a large language model together, on devices that are nothing alike."""


def _cluster_options(command: _Command) -> _Command:
    options = [
        click.option("--cluster", required=True, metavar="FILE|NAME", help="Who takes part, and the job."),
        click.option("--policy", metavar="FILE|NAME", help="How: hsplitlora by default."),
        click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key; may be repeated."),
        click.option("--cpu", is_flag=True, help="Run a cluster file with GPUs on CPUs."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


_address_option = click.option(
    "--address", metavar="ADDRESS", help="A running Ray cluster (auto: the one on this machine); default: a local one."
)


_dashboard_option = click.option(
    "--dashboard-host",
    default="127.0.0.1",
    show_default=True,
    metavar="ADDRESS",
    help="Where a local Ray's dashboard listens; 0.0.0.0: at every address of this machine.",
)


@main.command()
@_cluster_options
@_address_option
@_dashboard_option
@click.option("--name", help="The run's name; made up from the time by default.")
@click.option("--runs-dir", type=click.Path(path_type=Path), default=Path("runs"), show_default=True)
def launch(
    cluster: str,
    policy: str | None,
    overrides: tuple[str, ...],
    cpu: bool,
    address: str | None,
    dashboard_host: str,
    name: str | None,
    runs_dir: Path,
) -> None:
    """Fine-tune, and leave the adapter, metrics and a report in the run's directory."""
    from hsplit.api import launch as start

    outputs.never_wait()
    run = start(
        cluster,
        policy,
        overrides,
        runs_dir=runs_dir,
        name=name,
        address=address,
        cpu=cpu,
        dashboard_host=dashboard_host,
    )
    if not run.complete:
        sys.exit(INTERRUPTED)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting: job.lr=1e-4.")
@_address_option
@_dashboard_option
def resume(run: Path, overrides: tuple[str, ...], address: str | None, dashboard_host: str) -> None:
    """Go on with a run from its last complete checkpoint, or from its start while it has none.

    --set changes job.lr, job.schedule, job.warmup, job.clip, job.weight_decay or job.faults from there on.
    """
    from hsplit.api import resume as go_on

    outputs.never_wait()
    if not go_on(run, overrides, address=address, dashboard_host=dashboard_host).complete:
        sys.exit(INTERRUPTED)


@main.command()
@click.option("--runs-dir", type=click.Path(path_type=Path), default=Path("runs"), show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the runs as JSON.")
def runs(runs_dir: Path, as_json: bool) -> None:
    """List the runs with their state: running, complete, stopped, failed or interrupted."""
    from hsplit.observe.run_list import list_runs, runs_table
    from hsplit.observe.wording import printable

    found = list_runs(runs_dir)
    if as_json:
        click.echo(json.dumps([run.to_json() for run in found], indent=2))
        return
    if not found:
        click.echo(f"no runs in {runs_dir}")
        return
    from rich.console import Console

    Console().print(runs_table(found))
    for run in found:
        if run.reason:
            click.echo(printable(f"{run.name}: {run.reason}"))


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
def watch(run: Path) -> None:
    """Follow a run, from any terminal that can read its directory, until it ends.

    Exit code 0 when it is complete, 1 when it failed, was stopped or was interrupted.
    """
    from hsplit.observe.watch import watch as follow

    try:
        state = follow(run)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("this ended the watching, not the run") from None
    if state.state != "complete":
        sys.exit(RunError.exit_code)


@main.command()
@_cluster_options
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def plan(cluster: str, policy: str | None, overrides: tuple[str, ...], cpu: bool, as_json: bool) -> None:
    """Show who would hold which layers at which ranks, without training."""
    from hsplit.api import explained_plan

    made, insight, job = explained_plan(cluster, policy, overrides, cpu=cpu)
    if as_json:
        from hsplit.api import plan_summary

        click.echo(json.dumps(plan_summary(made, insight, job), indent=2))
        return
    from rich.console import Console

    from hsplit.observe.plan_text import plan_table

    Console().print(plan_table(made, insight))


@main.command()
@_cluster_options
@click.option("--clients", "sizes", multiple=True, type=int, metavar="N", help="Scale the fleet to N; may be repeated.")
@click.option("--servers", multiple=True, type=int, metavar="N", help="Simulate N servers; may be repeated.")
@click.option("--rounds", type=click.IntRange(1, 100_000), help="Rounds; default: job.rounds.")
@click.option("--leave", type=float, default=0.0, show_default=True, help="Chance that a client is gone next round.")
@click.option("--return", "back", type=float, default=0.5, show_default=True, help="Chance that it is back next round.")
@click.option(
    "--link-variation",
    "variation",
    type=float,
    default=0.0,
    show_default=True,
    help="Coefficient of variation of links.",
)
@click.option("--trace", type=click.Path(path_type=Path), help="CSV: round,client,bandwidth_mbps (0: not there).")
@click.option("--to", type=click.Path(path_type=Path), help="Directory to write: CSV files and report.html.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
def simulate(
    cluster: str,
    policy: str | None,
    overrides: tuple[str, ...],
    cpu: bool,
    to: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Simulate a fleet of 10 to 100,000 clients without training: virtual time, server load, bytes, bottleneck."""
    from rich.console import Console

    from hsplit.simulation.results import sweep_table
    from hsplit.simulation.sweep import sweep

    with status("simulating") as update:
        found = sweep(cluster, policy, overrides, cpu=cpu, **options, progress=update)
    if to is not None:
        from hsplit.simulation.results import write_simulation

        write_simulation(found, to)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    else:
        Console().print(sweep_table(found))
        for line in found.findings():
            click.echo(line)
    if to is not None:
        click.echo(to / "report.html", err=as_json)


@main.command()
@click.option("--cluster", required=True, metavar="FILE|NAME", help="Who takes part; clients need no budgets.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key; may be repeated.")
@click.option("--cpu", is_flag=True, help="Measure a cluster file with GPUs on CPUs.")
@_address_option
@click.option("--to", required=True, type=click.Path(path_type=Path), help="The cluster file to write.")
@click.option("--repeats", type=int, default=5, show_default=True, help="Samples of each figure.")
@click.option(
    "--seconds", type=float, default=10.0, show_default=True, help="Time that clients, then the server, compute."
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def probe(cluster: str, overrides: tuple[str, ...], to: Path, as_json: bool, **options: Any) -> None:
    """Measure what each client and the server really have, and write a cluster file that is ready to launch.

    Compute on the model's own layers, free memory, and the link to the server, where each would run.
    """
    from rich.console import Console

    from hsplit.measuring.measured_budgets import budget_table, measure_budgets

    with status("looking for the model") as update:
        found = measure_budgets(cluster, to, overrides, **options, progress=update)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
        return
    Console().print(budget_table(found.machines, found.figures))
    click.echo(found.path)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("holder", metavar="CLIENT|server")
@click.argument("values", nargs=-1, required=True, metavar="FIELD=VALUE...")
def budget(run: Path, holder: str, values: tuple[str, ...]) -> None:
    """Change a budget of a run that is under way: memory_gb, tflops, bandwidth_mbps, latency_ms.

    It holds from the next round's end on; the run then makes another plan.
    """
    from hsplit.api import change_budget

    change_budget(run, holder, values)
    click.echo(f"{holder}: taken at the next round's end")


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--client", required=True, metavar="YAML|NAME", help="As in a cluster file; or who had left.")
def join(run: Path, client: str) -> None:
    """Let a client join a run that is under way: --client '{name: tablet, memory_gb: 0.2, data: /srv/tablet.csv}'.

    It takes part from the next round on; a client that has left or was set aside comes back by its name.
    """
    from hsplit.api import join as let_in

    click.echo(f"{', '.join(let_in(run, client))}: joins at the next round's end")


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("client")
def leave(run: Path, client: str) -> None:
    """Have a run that is under way go on without a client, whose layers go to the server."""
    from hsplit.api import leave as let_go

    let_go(run, client)
    click.echo(f"{client}: leaves at the next round's end")


@main.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--to", type=click.Path(path_type=Path), help="The file to write; default: report.html of the first run.")
def report(runs: tuple[Path, ...], to: Path | None) -> None:
    """Write one self-contained HTML page about one or several runs."""
    from hsplit.report.report import write_report
    from hsplit.run_directory import RunDirectory

    directories = [RunDirectory.open(run) for run in runs]
    click.echo(write_report([d.path for d in directories], to or directories[0].report))


@main.command("eval")
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--data", metavar="FILE", help="What to evaluate on; default: the test part of the run's own data.")
@click.option("--limit", type=int, metavar="N", help="Evaluate at most N inputs, chosen by the run's seed.")
@click.option("--beams", type=int, default=1, show_default=True, help="Beams of the search; 1 is greedy.")
@click.option("--max-new-tokens", type=int, default=64, show_default=True, help="Most tokens of an answer.")
@click.option("--batch-size", type=int, default=8, show_default=True, help="Examples computed at once.")
@click.option("--metrics", default="all", show_default=True, metavar="all|ppl,bleu,...", help="What to measure.")
@click.option("--client", metavar="NAME", help="Cut a run's model at this client's split; default: the deepest.")
@click.option("--json", "as_json", is_flag=True, help="Print the scores as JSON.")
def evaluate(target: Path, data: str | None, as_json: bool, **options: Any) -> None:
    """Perplexity, BLEU, NIST, METEOR, ROUGE-L and CIDEr of a run, an adapter or an exported model.

    A run is measured through its split model, and eval.json and generations.jsonl are written into its directory.
    """
    from rich.console import Console

    from hsplit.evaluation.evaluate import evaluate as measure

    with status("loading") as update:
        found = measure(target, data, **options, progress=update)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    else:
        Console().print(found.table())


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--to", type=click.Path(path_type=Path), help="Directory to write; default: adapter or model in the run.")
@click.option(
    "--format",
    type=click.Choice(["peft", "merged"]),
    help="A PEFT adapter, or one merged model; default: peft, but merged where every weight was trained.",
)
@click.option("--rank", type=int, metavar="R", help="peft: cut every weight's update to its R leading directions.")
@click.option(
    "--base",
    type=click.Choice(["run", "original"]),
    default="run",
    show_default=True,
    help="merged: add to the base values that the run trained on, or to the checkpoint's own.",
)
@click.option(
    "--dtype", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True, help="merged: type of the files."
)
def export(run: Path, to: Path | None, **options: Any) -> None:
    """Write what a run has learned by its last checkpoint, for PeftModel or AutoModelForCausalLM.from_pretrained."""
    from hsplit.exporting.export import ExportOptions, export_run

    with status("exporting"):
        written = export_run(run, to, ExportOptions(**options))
    for line in written.lines:
        click.echo(line, err=True)
    click.echo(written.path)


@main.command()
@click.argument("source", required=False)
@click.option("--model", metavar="DIR|ID", help="Whose tokenizer and chat template are used; as job.model.")
@click.option("--cluster", metavar="FILE|NAME", help="Whose job it is for, and whose clients would share it.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
def data(source: str | None, model: str | None, cluster: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show how a data source is read: its form, counts and lengths, what is learned of it, and what is skipped.

    SOURCE is a file, a folder, a pattern, or org/name:split of the hub; without it the data of the cluster's job are
    shown.
    """
    from hsplit.api import describe_data

    described, job = describe_data(source, model, cluster, overrides)
    if as_json:
        click.echo(json.dumps(described.to_json(), indent=2))
        return
    from rich.console import Console

    from hsplit.observe.data_text import data_view

    Console().print(data_view(described, job.max_length))


@main.command()
@click.option("--to", required=True, type=click.Path(path_type=Path), help="Directory to write.")
@click.option(
    "--ray-temp-dir",
    "ray_temp_dirs",
    multiple=True,
    default=["/tmp/ray"],
    show_default=True,
    metavar="DIR",
    help="Where a Ray cluster whose head is on this machine keeps its files; may be repeated.",
)
@click.option("--target", "targets", multiple=True, metavar="HOST:PORT", help="A metrics endpoint; may be repeated.")
@click.option("--every", "every_s", type=float, default=10.0, show_default=True, help="Seconds between two scrapes.")
@click.option("--prometheus", "prometheus_url", default="http://localhost:9090", show_default=True, metavar="URL")
def monitoring(to: Path, **options: Any) -> None:
    """Write what Prometheus and Grafana need to show runs; those of this user on this machine are found by themselves.

    prometheus.yml, and in grafana/ a dashboard with the data source and the provisioning that it needs.
    """
    from hsplit.observe.monitoring import write_monitoring

    next_steps = write_monitoring(to, **options)
    click.echo(f"{to} is written; start Prometheus and Grafana with:", err=True)
    for line in next_steps:
        click.echo(line)


@main.command()
@click.option("--cluster", metavar="FILE|NAME", help="A run to compare memory and cores with.")
@click.option("--policy", metavar="FILE|NAME", help="How: hsplitlora by default.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key; may be repeated.")
@click.option("--cpu", is_flag=True, help="Of a cluster file with GPUs: as on CPUs.")
@click.option("--runs-dir", type=click.Path(path_type=Path), default=Path("runs"), show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(cluster: str | None, as_json: bool, **options: Any) -> None:
    """Say what is wrong with this machine for a run, in one line each: ok, note (slower, or in danger) or bad.

    Memory, cores, open files, shared memory, disks, ports, versions of packages, Ray's token. Exit code 1 where
    something is bad: a run would not start.
    """
    from dataclasses import asdict

    from hsplit.doctor import examine, finding_line

    found = examine(cluster, **options)
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in found], indent=2))
    else:
        from rich.console import Console

        console = Console()
        for finding in found:
            console.print(finding_line(finding), soft_wrap=True)
    if any(finding.level == "bad" for finding in found):
        sys.exit(RunError.exit_code)


@main.group()
def bench() -> None:
    """Repeat an experiment of benchmarks/ on this machine."""


_EXPERIMENTS = {
    "convergence": "Perplexity and time of every policy as clients' budgets grow unequal (METHOD 9)",
    "planner": "How long planning takes as clients grow in number, and what it is worth",
    "policies": "Every policy of the papers on one cluster and the same number of tokens",
    "memory": "Predicted against measured peak memory of clients and of the server",
    "aggregation": "Time, memory and error of aggregation at size, and what merging an update loses",
    "throughput": "Examples a second against plain loops, the server phase, overlap, and start-up",
    "gpu": "Whether actors that share a GPU work, what they hold and how fast they are",
    "clients": "Time of a round and memory as the number of clients grows",
    "clock": "Time of a round as predicted, as emulated, and as measured under quotas of CPU time",
    "pace": "How near plans come to the speed that budgets allow, and what it costs in learning",
    "capacity": "Where ranks, depth and holders apart change the loss: the constants of the objective (METHOD 5)",
    "prediction": "Which importance metric predicts what ranks are worth (METHOD 3)",
    "ranks": "What holders of unequal ranks learn under each way to aggregate their adapters (METHOD 6)",
    "replicas": "What several servers give and cost as clients grow in number",
    "simulation": "Whether a simulation tells what emulated runs take, and what simulating itself costs",
    "wire": "What sending activations and gradients in bf16, int8 and int4 costs in perplexity",
    "privacy": "What a curious server reads out of activations, by split and noise, and what noise costs",
}


def _experiment(name: str, about: str) -> click.Command:
    # The experiment parses its own flags, --help included.
    @click.command(
        name,
        help=f"{about} (--help for its flags).",
        context_settings={"ignore_unknown_options": True},
        add_help_option=False,
    )
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def command(arguments: tuple[str, ...]) -> None:
        from hsplit.experiments import run_experiment

        run_experiment(name, arguments)

    return command


for _name, _about in _EXPERIMENTS.items():
    bench.add_command(_experiment(_name, _about))
