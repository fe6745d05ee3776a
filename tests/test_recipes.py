import tomllib

import pytest

from sightline.recipes import Recipe
from sightline.runs import Choice

PLAIN = {"data": "creatures?split=train", "model": {"name": "mini_resnet", "classes": 4}}


def test_a_recipe_is_read_and_written_as_it_is():
    recipe = Recipe.of({**PLAIN, "test": "creatures", "seed": 3, "settings": {"lr": 0.1}, "half": True})
    assert recipe.data == Choice("creatures", {"split": "train"})
    assert recipe.model == Choice("mini_resnet", {"classes": 4})
    assert (recipe.seed, recipe.half, recipe.settings) == (3, True, {"lr": 0.1})
    assert Recipe.of(recipe.plain()) == recipe
    assert "val" not in recipe.plain()


@pytest.mark.parametrize(
    ("entries", "kind", "message"),
    [
        ({"sed": 1}, LookupError, "no entry of a recipe called 'sed'; did you mean seed"),
        ({"seed": "1"}, TypeError, "seed: expected a whole number, got '1'"),
        ({"seed": True}, TypeError, "seed: expected a whole number, got True"),
        ({"settings": 3}, TypeError, "settings: expected a table, got 3"),
        ({"data": 3}, TypeError, "expected a name or a table"),
        ({"low": "abc"}, TypeError, "low: expected a number, got 'abc'"),
        ({"trials": -1}, ValueError, "expected trials >= 0"),
        ({"low": 0.1, "high": 0.01, "trials": 1, "val": "creatures"}, ValueError, "0 < low <= high"),
        ({"trials": 3}, ValueError, "trials are compared on images that nobody learns from"),
    ],
)
def test_what_is_no_recipe_is_told(entries, kind, message):
    with pytest.raises(kind, match=message):
        Recipe.of({**PLAIN, **entries})


def test_a_file_lacks_what_the_defaults_say(tmp_path):
    path = tmp_path / "casm.toml"
    path.write_text('seed = 2\n[settings]\nthinning = "FL"\n')
    recipe = Recipe.read(path, data="mnist", model="mini_vgg")
    assert (recipe.data.name, recipe.model.name, recipe.seed) == ("mnist", "mini_vgg", 2)
    assert recipe.settings == {"thinning": "FL"}


@pytest.mark.parametrize(
    ("text", "message"),
    [("seed = ", "casm.toml is not TOML"), ("seed = 'a'", "casm.toml: seed: expected a whole")],
)
def test_a_broken_file_is_named(tmp_path, text, message):
    path = tmp_path / "casm.toml"
    path.write_text(text)
    with pytest.raises((TypeError, ValueError), match=message):
        Recipe.read(path, **PLAIN)


def test_changes_keep_what_is_none_and_add_to_the_settings():
    recipe = Recipe.of({**PLAIN, "seed": 1, "settings": {"lr": 0.1, "batch": 4}})
    changed = recipe.changed(seed=None, half=True, settings={"lr": 0.2})
    assert (changed.seed, changed.half, changed.settings) == (1, True, {"lr": 0.2, "batch": 4})


def test_a_copy_holds_every_setting_and_names_those_without_a_value(tmp_path):
    recipe = Recipe.of({**PLAIN, "settings": {"lr": 0.2}})
    path = recipe.write(tmp_path / "mine.toml", "sightline train casm", {"lr": 0.1, "lam": None, "slow": ("a", "b")})
    text = path.read_text()
    assert text.startswith(
        "# sightline train casm --spec mine.toml --out DIR\n# Not set, and so left to their defaults: lam."
    )
    assert tomllib.loads(text)["settings"] == {"lr": 0.2, "slow": ["a", "b"]}
    with pytest.raises(ValueError, match="is there already, perhaps edited"):
        recipe.write(path, "sightline train casm", {})
    again = Recipe.read(path)
    assert again.changed(settings={}) == recipe.changed(settings={"slow": ["a", "b"]})
