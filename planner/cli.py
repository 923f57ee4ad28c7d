"""The command line. Everything heavy is imported where it is used: starting up is part of the answer.

Exit status: 0 fits, 1 does not fit, 2 bad input, 3 no answer within the time limit.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from typer.core import TyperGroup

from planner import options as o

if TYPE_CHECKING:
    from planner.advice import Advice
    from planner.explaining import Explanation
    from planner.plan import Plan
    from planner.specs import ClusterSpec, ModelSpec

UsageError: Any = typer.BadParameter.__base__


COMMANDS = {
    "search": ("cli", "SEARCH"),
    "estimate": ("cli", "ESTIMATE"),
    "explain": ("cli", "EXPLAIN"),
    "compare": ("cli", "COMPARE"),
    "sweep": ("cli_sweep", "EXAMPLE"),
    "report": ("cli_report", "EXAMPLE"),
    "serve": ("cli_serve", "EXAMPLE"),
    "export": ("cli_launch", "EXPORT"),
    "audit": ("cli_audit", "EXAMPLE"),
    "preflight": ("cli_preflight", "EXAMPLE"),
    "alternatives": ("cli_alternatives", "EXAMPLE"),
    "diff": ("cli_plans", "DIFF"),
    "check": ("cli_plans", "CHECK"),
    "cluster": ("cli_cluster", "EXAMPLE"),
    "infer": ("cli_infer", "EXAMPLE"),
    "catalog": ("cli_catalog", "EXAMPLE"),
    "measure": ("cli_measure", "EXAMPLE"),
    "validate": ("cli_validate", "EXAMPLE"),
    "calibrate": ("cli_calibrate", "EPILOG"),
}
"""By name: the module that a command is a function of, and what is said below its help."""
SEARCH = "Example: planner search --model llama-2-70b --gpus 8x8xH100 --seq-length 4096 --headroom 10%"
ESTIMATE = "Example: planner estimate --model llama-65b --gpus 64x80G -tp 8 -pp 2 --global-batch-size 512"
EXPLAIN = "Example: planner explain --model llama-65b --gpus 64x80G -tp 8 -pp 2 --stage 0 --moment backward"
COMPARE = "Example: planner compare --model llama-2-7b --gpus 8x80G"


class Commands(TyperGroup):
    """The commands, each made when it is asked for: making one takes as long as importing its module.

    What is wrong with their options is said as JSON too, if JSON is asked for.
    """

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        for name in [cmd_name] if cmd_name in COMMANDS else COMMANDS:  # to say which is near
            if name not in self.commands:
                self.commands[name] = made(name)
        return super().get_command(ctx, cmd_name)

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def main(self, args: Sequence[str] | None = None, *rest: Any, **more: Any) -> Any:
        gc.set_threshold(100_000)  # a process of seconds leaves little garbage: looking for it takes a tenth
        if "--json" not in (sys.argv[1:] if args is None else args):
            return super().main(args, *rest, **more)
        try:
            status = super().main(args, *rest, **more | {"standalone_mode": False})
        except UsageError as error:
            print_json({"error": error.format_message()})
            status = error.exit_code
        sys.exit(status)


app = typer.Typer(
    name="planner",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help starts twice as fast
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Will this model fit on these GPUs, on which layout, and how fast?\n\n"
    "Example: planner search --model llama-65b --gpus 64x80G",
)


@app.callback()
def main(version: o.Version = False) -> None:
    """Nothing of its own: the commands are in ``COMMANDS``."""


def made(name: str) -> Any:
    """A command, from the function of its name."""
    from importlib import import_module

    module, example = COMMANDS[name]
    home = sys.modules[__name__] if module == "cli" else import_module(f"planner.{module}")
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    alone.command(name, epilog=getattr(home, example))(getattr(home, name))
    return typer.main.get_command(alone)


def fail(message: str, status: int, as_json: bool = False, **more: Any) -> NoReturn:
    """Says what is wrong on standard error (and as JSON, if asked) and exits."""
    if as_json:
        print_json({"error": message, **more})
    else:
        typer.secho("Error: ", fg="red", bold=True, nl=False, err=True)
        typer.echo(message, err=True)
    raise typer.Exit(status)


@contextmanager
def reported(as_json: bool = False) -> Iterator[None]:
    """Turns the planner's errors into a message and an exit status."""
    from planner.errors import InfeasibleError, PlannerError, SolverError

    try:
        yield
        sys.stdout.flush()
    except InfeasibleError as error:
        report_infeasible(error)
    except PlannerError as error:
        fail(str(error), 3 if isinstance(error, SolverError) else 2, as_json)
    except OSError as error:
        leave_output(error)


def leave_output(error: OSError) -> NoReturn:
    """Standard output is gone: say so, unless its reader simply went away, and stop writing to it."""
    without_reader()
    if isinstance(error, BrokenPipeError):
        raise typer.Exit(0)
    fail(f"the output cannot be written: {error.strerror}", 2)


def without_reader() -> None:
    """What is still to be written is written nowhere."""
    import os

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def report_infeasible(error: Any) -> NoReturn:
    """The nearest layout and the changes that would fit; exit status 1."""
    from planner.render import console_for
    from planner.render_advice import show_infeasible

    show_infeasible(console_for(), str(error), error.nearest, error.changes, error.tried)
    raise typer.Exit(1)


@contextmanager
def answered(model: ModelSpec, cluster: ClusterSpec, given: dict[str, Any]) -> Iterator[None]:
    """Where nothing fits and JSON is asked for, the document that says so; exit status 1."""
    from planner.errors import InfeasibleError

    try:
        yield
    except InfeasibleError as error:
        if not given["as_json"]:
            raise
        from planner.documents import document_of_failure

        print_json(document_of_failure(model, cluster, error, given["command"]()).to_json())
        raise typer.Exit(1) from None


def print_json(value: Any) -> None:
    """JSON on standard output."""
    import json

    try:
        sys.stdout.write(json.dumps(value, indent=1) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        without_reader()


@contextmanager
def progress(
    quiet: bool, words: str = "searching: {:,} solved, {:,} layouts left"
) -> Iterator[Callable[[int, int], None]]:
    """How far something is, on standard error, once it has taken a second; nothing when piped."""
    import time

    start, shown = time.monotonic(), False

    def report(done: int, left: int) -> None:
        nonlocal shown
        if not quiet and sys.stderr.isatty() and time.monotonic() - start > 1:
            shown = True
            sys.stderr.write("\r\x1b[K" + words.format(done, left))
            sys.stderr.flush()

    try:
        yield report
    finally:
        if shown:
            sys.stderr.write("\r\x1b[K")


@o.takes(
    o.JOB,
    o.INVENTORY,
    o.TRAINING,
    o.COST,
    o.CHOICES,
    {
        "objective": (o.Objective, "time"),
        "top": (o.Top, 5),
        "time_limit": (o.TimeLimit, 60.0),
        "save_job": (o.SaveJob, None),
        "trace": (o.Trace, None),
        "as_json": (o.Json, False),
        "verbose": (o.Verbose, False),
        "quiet": (o.Quiet, False),
    },
)
def search(given: dict[str, Any]) -> None:
    """Rank the layouts that fit, best first, with proof that no better one was missed."""
    with reported(given["as_json"]):
        from planner import api, reading
        from planner.errors import InputError
        from planner.layouts import Choices

        if given["quiet"] and given["verbose"]:
            raise InputError("--quiet and --verbose contradict each other: use one")
        choices = Choices(**reading.read_choices(given))
        training = reading.read_training(given)
        spec, (cluster, pool) = reading.read_model(given["model"]), cluster_asked(given)
        if choices.micro_batch_size and len(choices.micro_batch_size) == 1:
            unit = cluster.num_gpus * choices.micro_batch_size[0]
            training = reading.with_batch(spec, cluster, training, unit)
        if given["save_job"]:
            from pathlib import Path

            from planner.jobs import write_job

            write_job(given["asked"], "search", Path(given["save_job"]))
        with progress(given["quiet"] or given["as_json"]) as report, answered(spec, cluster, given):
            plans = api.search(
                spec,
                cluster,
                training,
                top=given["top"],
                objective=given["objective"],
                choices=choices,
                time_limit=given["time_limit"],
                progress=report,
            )
        if given["trace"]:
            write_trace(spec, cluster, plans[0], given["trace"])
        if given["as_json"]:
            from planner.documents import document_of

            return print_json(document_of(spec, cluster, plans, given["command"]()).to_json())
        from planner.render import console_for, show_search

        show_search(console_for(), plans, given["verbose"], given["quiet"])
        if pool:
            from planner.cli_cluster import show_where

            show_where(pool, spec, cluster, plans[0])


def cluster_of(given: dict[str, Any]) -> ClusterSpec:
    """The cluster that a command's options describe."""
    from planner import reading

    names = ("gpus", "memory_budget", "headroom", "nodes_per_leaf", "oversubscription")
    places = ("host_memory", "host_bandwidth", "nvme", "nvme_bandwidth")
    options: list[Any] = [given.get(name) for name in (*names, *places)]
    cluster = reading.read_cluster(*options)
    if all(given.get(name) is None for name in o.COST):
        return cluster
    from planner.cost_inputs import with_costs

    return with_costs(cluster, given)


def cluster_asked(given: dict[str, Any]) -> tuple[ClusterSpec, Any]:
    """The same, or what a scheduler lists, with the pool that it is of: for a command line alone."""
    if "from-" not in given["gpus"] and all(given.get(name) is None for name in o.INVENTORY):
        return cluster_of(given), None
    from planner.cli_cluster import discovered

    return discovered(given)


def write_trace(model: ModelSpec, cluster: ClusterSpec, plan: Plan, path: str) -> None:
    """Writes a plan's step as a timeline."""
    from pathlib import Path

    from planner import api
    from planner import trace as traces

    traces.write_trace(api.trace(model, cluster, plan), Path(path))


def one_layout(given: dict[str, Any]) -> tuple[Any, ...]:
    """Model, cluster, training and layout of a command that plans one given layout."""
    from planner import reading

    spec, (cluster, _) = reading.read_model(given["model"]), cluster_asked(given)
    training = reading.read_training(given)
    return spec, cluster, *reading.read_layout(spec, cluster, training, given)


def way_of(given: dict[str, Any]) -> dict[str, Any]:
    """How a given layout's layers are run and split."""
    from planner import reading

    layers = reading.numbers("--layers-per-stage", given["layers_per_stage"])
    return {"recompute": reading.read_way(given["recompute"], given["offload"]), "layers": layers}


def advice_on(job: tuple[Any, ...] | None, given: dict[str, Any], plan: Plan) -> Advice | None:
    """What binds where a plan does not fit, and what would fit in place of a given layout."""
    if plan.fits:
        return None
    if job is None:
        from planner.advice import Advice, Binding

        return Advice(Binding.of(plan), [], [])
    from planner import api

    with progress(given["as_json"], "looking for changes: {} tried, {} fit") as report:
        return api.whynot(*job, **way_of(given), progress=report)


@o.takes(
    o.JOB,
    o.INVENTORY,
    o.LAYOUT,
    o.TRAINING,
    o.COST,
    {"trace": (o.Trace, None), "as_json": (o.Json, False), "verbose": (o.Verbose, False)},
)
def estimate(given: dict[str, Any]) -> None:
    """One given layout, per stage, per component and per moment. Exit status 1 if it does not fit."""
    with reported(given["as_json"]):
        job = one_layout(given)
        from planner import api

        plan = api.estimate(*job, **way_of(given))
        if given["trace"]:
            write_trace(job[0], job[1], plan, given["trace"])
        if given["as_json"]:
            from planner.documents import document_of

            advice = advice_on(job, given, plan)
            print_json(document_of(job[0], job[1], [plan], given["command"](), advice).to_json())
        else:
            from planner.render import console_for, show_plan

            show_plan(console_for(), plan, given["verbose"])
            if advice := advice_on(job, given, plan):
                from planner.render_advice import show_advice

                show_advice(console_for(), advice)
        if not plan.fits:
            raise typer.Exit(1)


@o.takes(
    {"plan": (o.PlanFile, None)},
    o.JOB | {"model": (o.Model, None), "gpus": (o.Gpus, None)},
    o.INVENTORY,
    o.LAYOUT,
    o.TRAINING,
    {
        "stage": (o.Stage, None),
        "moment": (o.Moment, None),
        "term": (o.Term, None),
        "as_json": (o.Json, False),
        "verbose": (o.Verbose, False),
    },
)
def explain(given: dict[str, Any]) -> None:
    """Where every byte of a stage comes from, and what it sends; of a layout, or of a PLAN that was kept."""
    with reported(given["as_json"]):
        found = explanation(given)
        advice = None
        if given["term"] is None and not found.plan.fits:
            advice = advice_on(None if given["plan"] else one_layout(given), given, found.plan)
        if given["as_json"]:
            from planner.explaining import explanation_of

            shown = found if given["term"] is None else found.only(given["term"])
            print_json(explanation_of(shown) | (advice.document() if advice else {}))
        else:
            from planner.render import console_for
            from planner.render_explain import show_explanation

            show_explanation(console_for(), found, given["verbose"], given["term"])
            if advice:
                from planner.render_advice import show_advice

                show_advice(console_for(), advice)
        if not found.plan.fits:
            raise typer.Exit(1)


OF_EXPLAIN = ("plan", "stage", "moment", "term")


def explanation(given: dict[str, Any]) -> Explanation:
    """A kept plan's bytes, or those of a layout that the options describe."""
    from planner import api
    from planner.errors import InputError

    stage, when = given["stage"], given["moment"].lower() if given["moment"] else None
    if given["plan"]:
        from pathlib import Path

        from planner.documents import read_document

        if others := [name for name in given["asked"] if name not in OF_EXPLAIN]:
            named = ", ".join(f"--{name.replace('_', '-')}" for name in others)
            raise InputError(f"{named} beside a plan, which has its own: leave one of them out")
        document = read_document(Path(given["plan"]))
        job = document.model, document.cluster.spec, document.best
        found = api.explain_plan(*job, stage=stage, moment=when)
    elif given["model"] is None or given["gpus"] is None:
        raise InputError("explain takes --model and --gpus, or a plan that search or estimate --json wrote")
    else:
        found = api.explain(*one_layout(given), **way_of(given), stage=stage, moment=when)
    if given["term"] is not None:
        found.only(given["term"])  # is there such a term?
    return found


@o.takes(
    o.JOB,
    o.INVENTORY,
    {"micro_batch_size": (o.Micro, 1), "recompute": (o.Recompute, "auto")},
    o.TRAINING,
    o.COST,
    {"as_json": (o.Json, False)},
)
def compare(given: dict[str, Any]) -> None:
    """DDP, ZeRO-1/2/3, FSDP, TP and PP side by side for one model on the same GPUs."""
    with reported(given["as_json"]):
        from planner import api, reading
        from planner.errors import InputError

        spec, (cluster, _) = reading.read_model(given["model"]), cluster_asked(given)
        training = reading.read_training(given)
        if (micro := given["micro_batch_size"]) > 0:
            training = reading.with_batch(spec, cluster, training, cluster.num_gpus * micro)
        rows = api.compare(
            spec, cluster, training, micro_batch_size=given["micro_batch_size"], recompute=given["recompute"]
        )
        found = [plan for _, plan in rows if not isinstance(plan, str)]
        if not found:
            raise InputError(f"no strategy can be: {'; '.join(dict.fromkeys(str(why) for _, why in rows))}")
        if given["as_json"]:
            plans: list[dict[str, Any]] = [
                {"strategy": name, "reason": plan}
                if isinstance(plan, str)
                else {"strategy": name, "plan": plan.model_dump(mode="json")}
                for name, plan in rows
            ]
            print_json({"schema": "planner.compare/1", "rows": plans})
        else:
            from planner.render import console_for
            from planner.render_compare import show_compare

            show_compare(console_for(), rows)
        if not any(plan.fits for plan in found):
            raise typer.Exit(1)
