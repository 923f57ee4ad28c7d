"""An audit as text and tables for a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from planner.audit import Audit
from planner.export.imported import Finding
from planner.render import grid, show_plan
from planner.render_advice import of_before, show_settings
from planner.units import gib, human_count, human_seconds

WORDS = {"error": ("Wrong", "bold red"), "warning": ("Look at", "yellow"), "waste": ("Wasteful", "cyan")}
SHOWN = 8
"""Changes that pay which are shown, and settings that are not read."""


def show_audit(console: Console, audit: Audit, verbose: bool = False) -> None:
    """The verdict, what is wrong, where the memory goes, what would be better."""
    if audit.plan is None:
        console.print(Text(f"It cannot be judged: {audit.problem}", style="bold red"))
        console.print()
    for severity in ("error", "warning", "waste"):
        for finding in audit.findings:
            if finding.severity == severity:
                console.print(_line(finding))
    if audit.findings:
        console.print()
    if audit.plan is not None:
        model = audit.model
        console.print(
            Text(
                f"Read as {model.name}: {model.num_hidden_layers} layers of width {model.hidden_size:,}, "
                f"vocabulary {model.vocab_size:,}, {human_count(model.num_parameters)} parameters\n",
                style="dim",
            )
        )
        show_plan(console, audit.plan, verbose)
    if audit.advice:
        from planner.render_advice import show_advice

        show_advice(console, audit.advice, audit.settings)
    _show_gains(console, audit)
    _show_better(console, audit)
    if unread := audit.imported.unread:
        shown = ", ".join(unread if verbose else unread[:SHOWN])
        more = len(unread) - SHOWN
        rest = f" and {more} more (--verbose)" if more > 0 and not verbose else ""
        console.print(Text(f"\nNot read, or without effect on memory and time: {shown}{rest}", style="dim"))


def _line(finding: Finding) -> Text:
    word, style = WORDS[finding.severity]
    line = Text.assemble((f"{word}: ", style), (finding.setting, "bold"), f": {finding.text}")
    return line.append(f": {finding.fix}") if finding.fix else line


def _show_gains(console: Console, audit: Audit) -> None:
    if not audit.gains:
        if audit.plan and audit.plan.fits:
            console.print(Text("\nNo single change that was tried pays."))
        return
    console.print()
    console.print(Text("Single changes that pay, each estimated:", style="bold"))
    spoken = bool(audit.settings)
    left = ("change",) if spoken else ("change", "options")
    table = grid(*left, "step", "of before", "peak GiB", left=left, wrap=left, spare=("peak GiB",))
    assert audit.plan is not None
    for gain in audit.gains[:SHOWN]:
        step = human_seconds(audit.plan.step_time_s * gain.step_time_ratio)
        ratio = of_before(gain.step_time_ratio)
        words = (gain.what,) if spoken else (gain.what, gain.option)
        table.add_row(*words, step, ratio, gib(gain.peak_bytes))
    console.print(table)
    if spoken:
        show_settings(console, {gain.what: gain.option for gain in audit.gains[:SHOWN]}, audit.settings)


def _show_better(console: Console, audit: Audit) -> None:
    if audit.plan is None:
        return
    if audit.better is None:
        console.print(Text(f"\n{audit.none_better}"))
        return
    plan, ratio = audit.better.plan, audit.better.step_time_ratio
    gain = f"{1 / ratio:.2f} times as fast" if audit.plan.fits else "and it fits"
    console.print()
    console.print(
        Text(
            f"Best launchable layout on the same GPUs: {plan.layout.to_layout().describe()}, {gain}: "
            f"{human_seconds(plan.step_time_s)} a step, peak {gib(plan.peak_bytes)} GiB "
            f"({gib(plan.least_bytes)} to {gib(plan.most_bytes)})",
            style="bold",
        )
    )
    if why := audit.untold.get(audit.better.option):
        console.print(Text(f"  settings are not known: {why}"))
    if told := audit.settings.get(audit.better.option):
        console.print(Text("  as settings:"))
        for one in told:
            console.print(Text(f"    {one}"))
    console.print(Text(f"  as options of planner: {audit.better.option}"))
