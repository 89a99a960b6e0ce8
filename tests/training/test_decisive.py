"""Which settings make another run, also against a run that lacks keys which came later."""

from __future__ import annotations

import copy

from deepspec.config.loading import load_config
from deepspec.config.schema import as_dict
from deepspec.training.decisive import changed


def test_a_key_that_an_older_run_lacks_had_its_default() -> None:
    now = as_dict(load_config("tiny"))
    before = copy.deepcopy(now)
    for name in ("date", "template_options"):
        del before["data"][name]
    for name in ("roles", "tools"):
        del before["data"]["fields"][name]
    assert changed(now, before) == {}
    now["data"]["date"] = "2026-07-26"
    now["data"]["template_options"] = {"reasoning_effort": "low"}
    assert changed(now, before) == {
        "data.date": "2026-07-26",
        "data.template_options": {"reasoning_effort": "low"},
    }


def test_options_of_the_template_that_were_taken_back_are_a_change() -> None:
    now = as_dict(load_config("tiny"))
    before = copy.deepcopy(now)
    before["data"]["template_options"] = {"reasoning_effort": "low"}
    assert changed(now, before) == {"data.template_options": {}}
