"""Names of methods and detectors that are registered from outside, and their options."""

import pytest

import detdistill as dd
from detdistill.distill.method import METHODS, Method
from detdistill.registry import Registry


class Own(Method):
    """What `create_method` gave it stays in `given`."""

    weights = {"term": 1.0}

    def prepare(self, student, teacher):
        pass


class Bare(Own):
    def __init__(self, *, weight=1.0):
        super().__init__()
        self.given = weight


class Positional(Own):
    def __init__(self, weight: float = 1.0, *, power: int = 2):
        super().__init__()
        self.given = weight, power


class Needing(Own):
    def __init__(self, *, width: int):
        super().__init__()
        self.given = width


@pytest.fixture
def method(monkeypatch):
    monkeypatch.setattr(METHODS, "_entries", dict(METHODS._entries))
    for name, entry in (("bare", Bare), ("positional", Positional), ("needing", Needing)):
        METHODS.register(name)(entry)
    return dd.create_method


def test_options_without_a_type_are_taken_as_they_are(method):
    assert method("bare").given == 1.0
    assert method("bare", weight=0.5, start=3).given == 0.5
    with pytest.raises(dd.UserError, match="expected a number from 0 on"):
        method("bare", weight=-1)


def test_options_need_not_be_keyword_only(method):
    assert method("positional", weight=0.5).given == (0.5, 2)
    with pytest.raises(dd.UserError, match=r"option weight: .*found 'much'"):
        method("positional", weight="much")
    with pytest.raises(dd.UserError, match="no option 'wieght'; did you mean 'weight'"):
        method("positional", wieght=1.0)
    for word in ("self", "num_classes"):
        with pytest.raises(dd.UserError, match=f"no option '{word}'"):
            method("positional", **{word: 1})


def test_an_option_without_a_default_is_asked_for(method):
    assert method("needing", width=4).given == 4
    with pytest.raises(dd.UserError, match="method 'needing' needs the option 'width'"):
        method("needing")


def test_a_taken_name_is_refused():
    held = METHODS.get("crosskd")
    with pytest.raises(dd.UserError, match=r"method 'crosskd' is .*CrossKD already.*test_registry"):
        METHODS.register("crosskd")(Bare)
    assert METHODS.get("crosskd") is held


def test_a_class_that_is_defined_again_replaces_itself():
    registry = Registry("thing")

    def define():
        class Thing:
            pass

        return registry.register("thing")(Thing)

    first, second = define(), define()
    assert first is not second and registry.get("thing") is second
