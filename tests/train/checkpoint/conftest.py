import pytest

from tests.train.checkpoint import runs


@pytest.fixture(scope="session")
def undisturbed(overrides, tmp_path_factory):
    """Two stages, twelve steps, nothing in the way."""
    folder = tmp_path_factory.mktemp("undisturbed")
    runs.finish(folder, 2, *overrides, "parallel.pp=2", module=runs.PATIENT)
    return folder
