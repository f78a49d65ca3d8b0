"""All recipes, by name."""

from __future__ import annotations

import re

from cwpo.errors import ConfigError
from cwpo_trainer.reproduction.annotator_recipes import ANNOTATOR_RECIPES
from cwpo_trainer.reproduction.our_recipes import OUR_RECIPES
from cwpo_trainer.reproduction.policy_recipes import POLICY_RECIPES
from cwpo_trainer.reproduction.recipe import Recipe


def _place(recipe: Recipe) -> tuple[bool, bool, int, str]:
    """Tables before figures, by number, and the paper's before ours."""
    number = re.search(r"\d+", recipe.name)
    is_figure = recipe.name.startswith("figure")
    return not recipe.is_the_papers, is_figure, int(number[0]) if number else 0, recipe.name


RECIPES = {
    recipe.name: recipe
    for recipe in sorted([*ANNOTATOR_RECIPES, *POLICY_RECIPES, *OUR_RECIPES], key=_place)
}


def recipe_named(name: str) -> Recipe:
    """Raises: ConfigError naming all recipes."""
    if name not in RECIPES:
        raise ConfigError(f"no recipe {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]
