"""Composition, overrides and round trips. Expected values are those written into the recipe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from deepspec.config.keys import KEYS, is_group, is_mapping, unknown_key
from deepspec.config.loading import config_from, list_recipes, load_config
from deepspec.config.resources import resource
from deepspec.config.schema import MAPPINGS, RunConfig, as_dict, dotted
from deepspec.errors import ConfigError

SHIPPED = [name for name, _ in list_recipes()]
RAW = {"recipe": "test", "target": {"path": "t"}, "data": {"path": ["d"]}}
OWN = """\
defaults: [{parent}, _self_]
target: {{path: ./mine}}
data: {{path: mine.jsonl}}
training: {{learning_rate: 1e-3}}
"""


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_compose(name: str) -> None:
    config = load_config(name)
    assert config.recipe == name
    assert config.out == f"runs/{name}"
    assert config.description
    assert config_from(yaml.safe_load(yaml.safe_dump(as_dict(config)))) == config


def test_qwen3_has_the_released_hyperparameters() -> None:
    # the table in the issue and the config.json of the released Qwen3-4B drafter
    config = load_config("qwen3")
    assert config.target.layer_ids == [1, 9, 17, 25, 33]
    drafter = config.drafter
    assert (drafter.num_layers, drafter.block_size, drafter.markov_rank) == (5, 7, 256)
    assert drafter.mask_token_id == 151669
    training, objective = config.training, config.objective
    assert (training.epochs, training.batch_size, training.learning_rate) == (10, 512, 6e-4)
    assert training.anchors_per_sample == 512
    assert (objective.ce_weight, objective.l1_weight, objective.confidence_weight) == (0.1, 0.9, 1)
    assert objective.decay == 4


@pytest.mark.parametrize(
    ("name", "layers", "rank"),
    [
        ("deepseek_v4", [40, 41, 42], 256),
        ("deepseek_v4_flash", [40, 41, 42], 256),
        ("deepseek_v4_pro", [58, 59, 60], 512),
    ],
)
def test_v4_recipes_have_the_published_shape(name: str, layers: list[int], rank: int) -> None:
    config = load_config(name)
    drafter = config.drafter
    assert config.target.layer_ids == layers
    assert (drafter.kind, drafter.num_layers, drafter.block_size) == ("dspark_v4", 3, 5)
    assert (drafter.markov_rank, drafter.mask_token_id) == (rank, 128799)
    assert config.export.format == "deepseek_v4"


def test_tiny_reads_what_is_embedded() -> None:
    config = load_config("tiny")
    assert config.target.path == str(resource("data/tiny_target"))
    for path in (*config.data.path, *config.evaluation.benchmarks):
        assert Path(path).is_file()


# --------------------------------------------------------------------------------- own recipes


@pytest.mark.parametrize("parent", ["base", "tiny"])
def test_own_recipe_anywhere(parent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "it's (my) folder, [1]"
    folder.mkdir()
    (folder / "own=1.yaml").write_text(OWN.format(parent=parent))
    monkeypatch.chdir(folder)
    config = load_config("own=1.yaml", ["training.epochs=5"])
    assert config == load_config(str(folder / "own=1.yaml"), ["training.epochs=5"])
    assert config.recipe == "own=1"
    assert config.target.path == "./mine"
    assert config.data.path == ["mine.jsonl"]  # one path needs no brackets
    assert (config.training.learning_rate, config.training.epochs) == (1e-3, 5)
    rest = load_config("tiny") if parent == "tiny" else config_from(RAW)
    assert (config.regenerate, config.decoding) == (rest.regenerate, rest.decoding)


def test_dollars_in_an_own_recipe(tmp_path: Path) -> None:
    """They lead to other keys, whatever words set these to; escaped ones stay, saved too."""
    path = tmp_path / "a${b}.yaml"
    path.write_text(
        "defaults: [tiny, _self_]\nout: out/${recipe}/${seed}\n"
        r"data: {system_prompt: 'costs \${5}'}"
    )
    config = load_config(str(path), ["seed=7"])
    assert (config.recipe, config.out) == ("a${b}", "out/a${b}/7")
    assert config.data.system_prompt == "costs ${5}"
    assert config_from(as_dict(config)) == config
    assert config.target.path == load_config("tiny").target.path


def test_recipes_build_on_each_other_and_bring_group_files(tmp_path: Path) -> None:
    (tmp_path / "first.yaml").write_text(OWN.format(parent="base"))
    (tmp_path / "second.yaml").write_text("defaults: [first, _self_]\nseed: 7\n")
    (tmp_path / "drafter").mkdir()
    (tmp_path / "drafter" / "deep.yaml").write_text("defaults: [dspark, _self_]\nnum_layers: 9\n")
    config = load_config(str(tmp_path / "second.yaml"), ["drafter=deep"])
    assert (config.seed, config.drafter.num_layers, config.target.path) == (7, 9, "./mine")
    assert config.drafter == replace(load_config("qwen3").drafter, num_layers=9, mask_token_id=None)


def test_resources_may_lie_in_a_folder_of_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "Deep's (copy), [2]"
    home.mkdir()
    for name in ("configs", "recipes", "data"):
        (home / name).symlink_to(resource(name))
    monkeypatch.setattr("deepspec.config.resources.PACKAGE", home / "deepspec")
    (tmp_path / "own.yaml").write_text(OWN.format(parent="tiny"))
    assert load_config(str(tmp_path / "own.yaml")).drafter.num_layers == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("defaults: [bsae, _self_]\n", "bsae"),
        ("defaults: [base, _self_]\ntraining:\n", "training holds"),
        ("defaults: [base, _self_]\ntraining:\n\tepochs: 1\n", "line 3"),
        ("defaults: [tiny, _self_]\ntraining: {epoch: 3}\n", "did you mean training.epochs"),
        ("defaults: [tiny, override drafter: dflsh, _self_]\n", "own.yaml"),
        ("defaults: [tiny, {override drafter: dflsh}, _self_]\n", "dflash dspark dspark_v4 eagle3"),
        ("defaults: [own, _self_]\n", "another file name"),
        ("- a\n", "own.yaml"),
        ("", "data.path is not set"),
        ("defaults: [tiny, _self_]\nout: ${target.pth}\n", "target.pth"),
        ("defaults: [tiny, _self_]\nseed: ${recipe}\n", "seed=own must be a whole number"),
    ],
)
def test_mistakes_in_an_own_recipe(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    assert expected in str(caught.value)
    assert "hydra.conf" not in str(caught.value)


def test_a_recipe_must_be_utf8(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_bytes("description: caf\xe9\n".encode("latin1"))
    with pytest.raises(ConfigError, match=r"own\.yaml.*utf-8"):
        load_config(str(tmp_path / "own.yaml"))


def test_choosing_a_group_needs_the_groups(tmp_path: Path) -> None:
    (tmp_path / "bare.yaml").write_text("target: {path: t}\ndata: {path: d}\n")
    assert load_config(str(tmp_path / "bare.yaml")).drafter.kind == "dspark"
    with pytest.raises(ConfigError, match="must begin with base"):
        load_config(str(tmp_path / "bare.yaml"), ["drafter=dflash"])


# ----------------------------------------------------------------------------------- overrides


def plain_texts() -> SearchStrategy[str]:
    """Any text but those with a meaning: null, ???, and YAML in brackets or quotes."""
    special = ("[", "{", "'", '"')
    anything = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1)
    dollars = st.text("\\${}: 5", min_size=1)  # what OmegaConf would look into
    return (anything | dollars).filter(
        lambda text: text not in ("null", "???") and not text.startswith(special)
    )


@settings(deadline=None, max_examples=20)
@given(
    text=plain_texts(),
    rate=st.floats(1e-30, 1e30),
    seed=st.integers(0, 2**63 - 1),
    flag=st.booleans(),
    ids=st.none() | st.lists(st.integers(-1, 90), min_size=1, unique=True).map(sorted),
    temperatures=st.lists(st.just(0.0) | st.floats(1e-6, 9), min_size=1, unique=True),
)
def test_values_arrive_and_survive_yaml(
    text: str,
    rate: float,
    seed: int,
    flag: bool,
    ids: list[int] | None,
    temperatures: list[float],
) -> None:
    config = config_from(
        RAW,
        [
            f"data.system_prompt={text}",
            f"data.path={text}",
            f"training.learning_rate={rate}",
            f"seed={seed}",
            f"data.thinking={flag}",
            f"target.layer_ids={'null' if ids is None else ids}",
            f"evaluation.temperatures={temperatures}",
        ],
    )
    assert config.data.system_prompt == text
    assert config.data.path == [text]
    assert config.training.learning_rate == rate
    assert (config.seed, config.data.thinking, config.target.layer_ids) == (seed, flag, ids)
    assert config.evaluation.temperatures == temperatures
    saved = yaml.safe_dump(as_dict(config), allow_unicode=True)
    assert config_from(yaml.safe_load(saved)) == config


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("training.learning_rate=1e-3", "training.learning_rate", 0.001),
        ("data.limit=null", "data.limit", None),
        ("data.path=[a=b.jsonl, c d.jsonl]", "data.path", ["a=b.jsonl", "c d.jsonl"]),
        ("data.system_prompt='null'", "data.system_prompt", "null"),
        ('data.system_prompt="two\\nlines"', "data.system_prompt", "two\nlines"),
        ("drafter={kind: dflash}", "drafter.kind", "dflash"),
        ("out=~/runs/a", "out", str(Path.home() / "runs" / "a")),
        ("out=${target.path}/x", "out", "${target.path}/x"),
        ("data.system_prompt='${5}: ${'", "data.system_prompt", "${5}: ${"),
        ("data.path=[0123, 2024-13-45, yes]", "data.path", ["0123", "2024-13-45", "yes"]),
        ("data.path=['null', '${x}']", "data.path", ["null", "${x}"]),
        ("drafter={head_dim: null}", "drafter.head_dim", None),
        ("evaluation.seeds=3", "evaluation.seeds", [3]),
    ],
)
def test_how_values_are_written(word: str, key: str, value: object) -> None:
    config = as_dict(config_from(RAW, [word]))
    for part in key.split("."):
        config = config[part]
    assert config == value


def test_a_later_word_wins_and_a_saved_config_is_changed_by_key() -> None:
    before = load_config("tiny", ["drafter=dflash", "seed=1", "seed=2"])
    assert (before.drafter.kind, before.seed) == ("dflash", 2)
    after = config_from(as_dict(before), ["decoding.batch_size=8"])
    assert after == replace(before, decoding=replace(before.decoding, batch_size=8))
    with pytest.raises(ConfigError, match=r"drafter\.kind=\.\.\."):
        config_from(as_dict(before), ["drafter=dspark"])


# ------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("training.learning_rate=fast", "training.learning_rate=fast must be a number"),
        ("training.learning_rate=", "training.learning_rate= must be a number"),
        ("training.batch_size=1.5", "training.batch_size=1.5 must be a whole number"),
        ("training.batch_size=null", "training.batch_size=null must be a whole number"),
        ("regenerate.enabled=maybe", "regenerate.enabled=maybe must be true or false"),
        ("target.layer_ids=[1,b]", "target.layer_ids[1]=b must be a whole number"),
        ("target.layer_ids=1,2", "lists are written [a, b]"),
        ("target.layer_ids=[1,2", "target.layer_ids=[1,2 is not readable"),
        ("data.path={a: b}", "data.path={'a': 'b'} must be a list of texts"),
        ("seed=[1]", "seed=['1'] must be a whole number"),
        ("out=[a]", "out=['a'] must be text"),
        ("data.path=[[a]]", "data.path[0]=['a'] must be text"),
        ("data.fields=x", "data.fields.messages=..."),
        ("data.template_options=low", "options=low must be a mapping, written {a: b}"),
        ("data.template_options=null", "=null must be a mapping, written {a: b}"),
        (
            "data.template_options={a:b}",
            "{a:b} is not readable: put a space after the colon: {a: b}",
        ),
        ("data.fields.roles={c:user}", "{c:user} is not readable: put a space after the colon"),
        ("data.template_options={a: [}", "data.template_options={a: [} is not readable"),
        ("data.fields.roles=[a]", "data.fields.roles=['a'] must be a mapping of texts"),
        ("data.fields.roles={critic: judge}", "a mapping to system, developer, user, assistant"),
        ("seed=${recipe}", "seed=${recipe} must be a whole number"),
        ("evaluation.seeds=['${x}']", "evaluation.seeds[0]=${x} must be a whole number"),
        ("data.path=['\x01']", "is not readable: unacceptable character #x0001"),
        ("out=???", "out=??? sets nothing"),
        ("data.path=[a, '???']", "data.path=??? sets nothing"),
        ("drafter={head_dim: '???'}", "drafter.head_dim=??? sets nothing"),
        ("=3", "'=3' is not key=value"),
        ("epochs", "'epochs' is not key=value"),
    ],
)
def test_wrong_types(word: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from(RAW, [word])
    assert expected in str(caught.value)


def test_mappings_are_values(tmp_path: Path) -> None:
    """Roles are added to those that are known; options of templates have the types of YAML, but for
    dates, in a word as in a recipe; both are one setting to whoever compares settings."""
    options = {"reasoning_effort": "low", "strict": False, "depth": 3, "today": "2026-01-02"}
    text = "{reasoning_effort: low, strict: false, depth: 3, today: 2026-01-02}"
    words = [f"data.template_options={text}", "data.fields.roles={Critic: user}"]
    recipe = tmp_path / "own.yaml"
    recipe.write_text(
        "defaults: [tiny, _self_]\ndata:\n  date: 2026-01-02\n  fields: {roles: {Critic: user}}\n"
        f"  template_options: {text}\n"
    )
    for config in (config_from(RAW, words), load_config(str(recipe))):
        assert config.data.template_options == options
        assert config.data.fields.roles["Critic"] == config.data.fields.roles["human"] == "user"
        flat = dotted(as_dict(config))
        assert flat["data.template_options"] == options
        assert flat["data.fields.roles"] == config.data.fields.roles
        assert config_from(as_dict(config)) == config
    assert config.data.date == "2026-01-02"
    assert {key for key, hint in KEYS.items() if is_mapping(hint)} == set(MAPPINGS)


def test_groups_and_their_files() -> None:
    with pytest.raises(ConfigError, match=r"drafter=dsprk must be one of dflash, dspark,"):
        load_config("tiny", ["drafter=dsprk"])
    with pytest.raises(ConfigError, match=r"such as target\.path=\.\.\."):
        load_config("tiny", ["target=./my-model"])


@pytest.mark.parametrize("missing", ["target", "data"])
def test_what_has_no_default_must_be_given(missing: str) -> None:
    raw = {key: value for key, value in RAW.items() if key != missing}
    with pytest.raises(ConfigError, match=rf"{missing}\.path is not set"):
        config_from(raw)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("learning_rate", "did you mean training.learning_rate?"),
        ("epoch", "did you mean training.epochs?"),
        ("trainig.epochs", "did you mean training.epochs?"),
        ("drafter.layers", "did you mean drafter.num_layers?"),
        ("data.fields.mesage", "did you mean data.fields.messages?"),
        ("batch_size", "regenerate.batch_size or training.batch_size or decoding.batch_size or "),
        ("training.lr", "training has epochs, max_steps"),
        ("training.epochs.x", "did you mean training.epochs?"),
        ("hydra.run.dir", "a recipe has recipe, description"),
        ("+seed", "did you mean seed?"),
    ],
)
def test_unknown_keys(key: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from(RAW, [f"{key}=1"])
    assert str(caught.value).startswith(f"unknown key {key}; ")
    assert expected in str(caught.value)


def test_a_dropped_letter_names_the_key_that_was_meant() -> None:
    meant: dict[str, set[str]] = {}
    for key, kind in KEYS.items():
        group, dot, name = key.rpartition(".")
        if len(name) > 3 and not is_group(kind):
            for place in range(len(name)):
                meant.setdefault(f"{group}{dot}{name[:place]}{name[place + 1 :]}", set()).add(key)
    # regenerate.top_ may be top_k and top_p; data.fields.role(s) are both keys
    for typo, keys in ((typo, keys) for typo, keys in meant.items() if typo not in KEYS):
        assert any(f"did you mean {key}?" in str(unknown_key(typo)) for key in keys), typo


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("tinny", "recipe=tinny is unknown; did you mean tiny?"),
        ("foo", "; choose from "),
        ("./foo", "a path that ends with .yaml"),
        ("foo.yaml", "recipe=foo.yaml: no such file"),
        ("", "recipe= is unknown"),
    ],
)
def test_unknown_recipes(recipe: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(recipe)
    assert expected in str(caught.value)


def test_schema_has_no_key_that_can_not_be_set() -> None:
    assert set(as_dict(config_from(RAW))) == {key for key in KEYS if "." not in key}
    assert isinstance(config_from(RAW), RunConfig)
