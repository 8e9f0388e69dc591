"""Commands on the local stack and the machine: up, down, doctor, demo."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.cli.elsewhere import go_there, known_run_root, refuse_own_path
from jobs.cli.shared import AsJson, open_session
from jobs.terminal import print_json, say
from pipeline.access.places import normal

if TYPE_CHECKING:
    from jobs.cluster.session import Session

app = typer.Typer()


@app.command()
def up(
    s3_port: Annotated[int, typer.Option(help="Port of the S3 server; 0 for a free one.")] = 0,
    ray_port: Annotated[int, typer.Option(help="Port of the Ray head; 0 for a free one.")] = 0,
    dashboard_port: Annotated[int, typer.Option(help="Port of the Ray dashboard; 0 for a free one.")] = 0,
    prometheus_port: Annotated[int, typer.Option(help="Port of Prometheus; 0 for a free one.")] = 0,
    cpus: Annotated[int, typer.Option(help="Logical CPUs that Ray may use; 0 for all of the machine.")] = 0,
) -> None:
    """Start the local stack: an S3 server, a Ray head, and Prometheus if it is installed.

    Everything listens on the loopback address only, on free ports, with credentials made for this stack. Data and state
    are in `.convmae` (or $CONVMAE_HOME). If the stack is already up, nothing changes; services that died are restarted.
    """
    from jobs.cluster.session import home_folder
    from jobs.stack import local_stack

    started = local_stack.up(
        home_folder(os.environ),
        s3_port=s3_port,
        ray_port=ray_port,
        dashboard_port=dashboard_port,
        prometheus_port=prometheus_port,
        num_cpus=cpus or None,
        on_event=say,
    )
    for name, service in started.status().items():
        say(f"{name}: {service.detail}")
    say(f"state and data: {home_folder(os.environ)}")


@app.command()
def down() -> None:
    """Stop what `convmae up` started. Data is kept, and the next `up` finds it."""
    from jobs.cluster.session import home_folder
    from jobs.stack import local_stack

    local_stack.down(home_folder(os.environ), on_event=say)


@app.command()
def doctor(
    ctx: typer.Context,
    *,
    store: Annotated[
        str,
        typer.Option(
            help="URL that will hold the runs; default: $CONVMAE_RUN_ROOT, else the local stack's, else the last used.",
            show_default=False,
        ),
    ] = "",
    cache_dir: Annotated[str, typer.Option(help="The recipe's cache_dir, if it has one.", show_default=False)] = "",
    gpu: Annotated[bool, typer.Option("--gpu", help="Report a node without a GPU as a failure.")] = False,
    as_json: AsJson = False,
    asked_from: Annotated[
        str, typer.Option(hidden=True, help="File with the facts of the machine on which this was typed.")
    ] = "",
) -> None:
    """Check the machine, the cluster and the store, and say what to do about each finding.

    Checks versions and clocks of all nodes, reads, writes and conditional writes, the bandwidth of each node, disks,
    shared memory, GPUs, an all-reduce over all nodes, and the memory checkpoints that nodes hold. Exit code 1 if
    something failed.
    """
    from jobs.cluster.diagnosis import exit_code, finding_lines
    from jobs.cluster.doctor import CALLER_NAME, Caller, examine
    from jobs.control.memory_findings import memory_findings

    session = open_session()
    store = store or known_run_root(session)
    if _answers(session) and session.is_away:
        refuse_own_path("--store", store)
        files = {CALLER_NAME: Caller.here(session, store).to_text()}
        sys.exit(go_there(session, ctx, files=files, store=store, asked_from=CALLER_NAME))
    store, cache_dir = store and normal(store), cache_dir and normal(cache_dir)
    caller = Caller.of_text(Path(asked_from).read_text("utf-8")) if asked_from else None
    findings = []
    folders = [cache_dir] if cache_dir else []
    for finding in examine(session, store, folders, caller, wants_gpu=gpu, of_runs=memory_findings):
        findings.append(finding)
        if not as_json:
            for line in finding_lines([finding]):
                say(line)
    if as_json:
        print_json([finding.to_json() for finding in findings])
    if code := exit_code(findings):
        raise typer.Exit(code)


def _answers(session: Session) -> bool:
    """Whether the cluster answers; if it does not, that is a finding."""
    from jobs.errors import ClusterError

    try:
        session.cluster.check_answers()
    except ClusterError:
        return False
    return True


@app.command()
def demo(
    images: Annotated[
        str, typer.Option(help="Folder of your own photographs; default: those that come with Python packages.")
    ] = "",
) -> None:
    """Run the main job on this machine, from photographs to a report, in about five minutes (`make pretrain`)."""
    from jobs.cli.demo import run_demo

    run_demo(os.environ, images)
