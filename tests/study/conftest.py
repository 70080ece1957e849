import pytest

from detdistill.data import open_dataset
from tests.study.fabricated_study import World, make_recipe, write_folder


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture
def recipe(data_folder):
    return make_recipe(data_folder)


@pytest.fixture
def reported_world(recipe, monkeypatch):
    """Training and loading replaced by fakes; see `fabricated_study`."""
    fake = World(open_dataset(recipe, "test"))
    fake.install(monkeypatch)
    return fake


@pytest.fixture
def world(reported_world, monkeypatch):
    """The same without the page, which takes a second to draw."""
    monkeypatch.setattr("detdistill.study.compare.write_report", lambda *given: None)
    return reported_world
