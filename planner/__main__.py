"""``python -m planner``: the command line, where no script is installed."""

from planner.cli import app

app(prog_name="planner")
