"""The command line: parses, calls, prints. Results go to stdout, notes to stderr.

Exit codes: 0 fine, 2 bad usage or refused (an ``AutoTPError``, its message on stderr).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import yaml
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from autotp.errors import AutoTPError


class _Refused(click.ClickException):
    exit_code = 2


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AutoTPError as error:
            raise _Refused(str(error)) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="autotp")
def main() -> None:
    """Automatic tensor parallelism for PyTorch."""


@main.command()
@click.argument("target")
@click.option(
    "--tp", type=click.IntRange(min=1), required=True, help="Tensor-parallel degree: the number of ranks."
)
@click.option(
    "--override",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="YAML file that fixes placements, by glob patterns over module names.",
)
@click.option(
    "--format", "form", type=click.Choice(["table", "yaml", "json"]), default="table", show_default=True
)
@click.option(
    "--diff", is_flag=True, help="Also print what would be changed in the model's source, as unified diffs."
)
@click.option("--strict", is_flag=True, help="Refuse if anything that could matter stays replicated.")
@click.option(
    "--trust-remote-code", is_flag=True, help="Run Python code that the config's directory brings along."
)
def plan(
    target: str, tp: int, override: Path | None, form: str, diff: bool, strict: bool, trust_remote_code: bool
) -> None:
    """Print how TARGET would be sharded. Needs no weights, no accelerator and no other process.

    TARGET is a transformers config (a config.json, a directory with one, or a model type such as llama), or
    package.module:factory, a function without arguments that returns a model, or a model and example inputs.
    """
    from autotp import api, report  # here, so that --help does not wait for torch
    from autotp.target import load_target

    start = time.monotonic()
    model, example_inputs = load_target(target, trust_remote_code=trust_remote_code)
    found = api.plan(model, tp=tp, example_inputs=example_inputs, plan=override, strict=strict)
    click.echo(f"planned in {time.monotonic() - start:.1f} s", err=True)
    if form == "yaml":
        click.echo(found.to_yaml(), nl=False)
    elif form == "json":
        click.echo(json.dumps(yaml.safe_load(found.to_yaml()), indent=2))
    elif sys.stdout.isatty():
        Console().print(report.render(found))
    else:
        click.echo(report.table(found), nl=False)
    if diff:
        click.echo(found.diff(), nl=False)


@main.command()
@click.argument("checkpoint")
@click.option(
    "--tp", type=click.IntRange(min=1), required=True, help="Tensor-parallel degree: one file for each rank."
)
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Directory to write.")
@click.option(
    "--override",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="YAML file that fixes placements, as for plan.",
)
@click.option("--dtype", help="Convert the weights (bfloat16, say); by default as the config says.")
def shard(checkpoint: str, tp: int, out: Path, override: Path | None, dtype: str | None) -> None:
    """Cut CHECKPOINT (a transformers checkpoint) into one file a rank, so that a machine reads only its own.

    Needs no process group, and memory for one slice at a time.
    """
    from autotp.checkpoint.offline import shard_checkpoint

    with _progress("sharding") as step:
        plan = shard_checkpoint(checkpoint, tp, out, plan=override, dtype=dtype, progress=step)
    click.echo(f"{out}: {tp} files, plan {plan.fingerprint}")


@main.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Directory to write.")
@click.option("--max-shard-size", default="50GB", show_default=True, help="Of a file; several get an index.")
def merge(directory: Path, out: Path, max_shard_size: str) -> None:
    """Write the ordinary checkpoint that DIRECTORY was cut from by the shard command."""
    from autotp.checkpoint.offline import merge_checkpoint

    with _progress("merging") as step:
        merge_checkpoint(directory, out, max_shard_size=max_shard_size, progress=step)
    click.echo(str(out))


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, which is gone at the end; nothing where stderr is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
