"""What the README promises in its first screen is what the gate runs."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMANDS = ("pip install uv && uv run vpdeploy run recipes/quickstart.toml", "uv run --group dev pytest")


def test_readme_and_gate_quote_the_same_commands():
    gate = (ROOT / ".ci" / "run").read_text().splitlines()
    first_screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:30])
    for command in COMMANDS:
        assert command in first_screen
        assert command in gate
