"""The page of recipe keys says what the models say."""

from pathlib import Path

from vpdeploy.recipe_page import page

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_the_generated_one():
    assert (DOCS / "recipe.md").read_text(encoding="utf-8") == page()


def test_every_key_says_what_it_means():
    rows = [line for line in page().splitlines() if line.startswith("| `")]
    assert len(rows) > 50
    assert all(line.split(" | ")[-1].rstrip(" |") for line in rows)
