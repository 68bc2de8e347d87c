"""The hosts of all tests in this folder."""

import pytest

from tests.hosts.network import NoHosts, two_hosts


@pytest.fixture(scope="session")
def hosts(tmp_path_factory):
    try:
        with two_hosts(tmp_path_factory.mktemp("hosts")) as made:
            yield made
    except NoHosts as why:
        pytest.skip(str(why))
