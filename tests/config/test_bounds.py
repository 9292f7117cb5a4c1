"""Bounds of flags: refused outside, shown in help and in the page of flags."""

import argparse
import dataclasses
import math
import re

import pytest
from conftest import ROOT

from mocov3.config import EmbedConfig, FinetuneConfig, KnnConfig, LinclsConfig, PretrainConfig
from mocov3.config.fields import Bounds, add_flags, check_bounds, flag_name
from mocov3.errors import UserError

CONFIGS = (PretrainConfig, LinclsConfig, FinetuneConfig, KnnConfig, EmbedConfig)
BOUNDED = [(c, f) for c in CONFIGS for f in dataclasses.fields(c) if str(f.metadata["bounds"])]


@pytest.mark.parametrize("config", CONFIGS)
def test_numbers_outside_are_refused_by_their_flag(config):
    fields = [f for c, f in BOUNDED if c is config]
    assert len(fields) >= 4
    check_bounds(config())
    for field in fields:
        low, high, above, below = field.metadata["bounds"]
        kind = float if field.metadata["kind"] is float else int
        outside = [low - 1 if low is not None else above, high + 1 if high is not None else below]
        outside = [kind(v) for v in outside if v is not None] + ([math.nan, math.inf] if kind is float else [])
        refusal = re.escape(f"{flag_name(field)} must be {field.metadata['bounds']}, not")
        for value in outside:
            with pytest.raises(UserError, match=refusal):
                check_bounds(dataclasses.replace(config(), **{field.name: value}))
        for value in (kind(v) for v in (low, high) if v is not None):
            check_bounds(dataclasses.replace(config(), **{field.name: value}))


@pytest.mark.parametrize("config", CONFIGS)
def test_help_and_the_page_of_flags_show_them(config):
    parser = argparse.ArgumentParser()
    add_flags(parser, config, {})
    help = {name: action.help or "" for action in parser._actions for name in action.option_strings}
    page = (ROOT / "docs" / "flags.md").read_text().splitlines()
    for field in (f for c, f in BOUNDED if c is config):
        bounds, name = str(field.metadata["bounds"]), flag_name(field)
        assert f"({bounds}" in help[name], name
        assert any(f"`{name}`" in row and f"({bounds})" in row for row in page), name


def test_the_words_of_bounds():
    assert str(Bounds(1, None, None, None)) == "at least 1"
    assert str(Bounds(0, 0.5, None, None)) == "0 to 0.5"
    assert str(Bounds(None, 1, 0, None)) == "above 0 and at most 1"
    assert str(Bounds(0, None, None, 2**63)) == "at least 0 and below 2**63"
    assert str(Bounds(None, None, None, None)) == ""
    assert Bounds(None, None, None, None).hold(math.nan)
    assert Bounds(0, None, None, None).hold("auto")
    assert Bounds(0, None, None, None).hold(None)
