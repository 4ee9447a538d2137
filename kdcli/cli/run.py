"""``kdcli run``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kdcli import interrupts
from kdcli.cli import options as o
from kdcli.report.redact import redact

EXAMPLES = """
kdcli run recipe.yaml -o out/release
kdcli run recipe.yaml --dry-run
"""

RecipeArg = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file with the stages in order.")]


def command(
    ctx: typer.Context,
    recipe: RecipeArg,
    out: o.OutOpt = None,
    force: o.ForceOpt = False,
    dry_run: o.DryRunOpt = False,
    as_json: o.JsonOpt = False,
    quiet: o.QuietOpt = False,
    verbose: o.VerboseOpt = False,
    debug: o.DebugOpt = False,
) -> None:
    """A stage whose input and options have not changed is taken from the cache.

    \b
    data: reviews/
    stages:
      - distill: {teacher: minilm, student: tiny}
      - prune: {sparsity: 0.3}
      - quantize
      - evaluate: {max-drop: 0.02}
    """
    from kdcli.cli import stage

    argv = ("kdcli", *(redact(word) for word in ctx.obj["words"]))
    with stage.session("kdcli run", quiet=quiet, verbose=verbose) as (console, stdout):
        from kdcli.run import recipe as recipes

        if dry_run:
            plan = recipes.run(recipe, out, force, console, True, argv)
            stage.show_plan(console, stdout, plan, as_json=as_json)
        else:
            with stage.cached(console):
                outcome: Any = recipes.run(recipe, out, force, console, False, argv)
            interrupts.check()  # a run that was told to stop prints no path
            stage.finish(console, stdout, outcome, [outcome.report], as_json=as_json)
