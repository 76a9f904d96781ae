"""What the tests of rollouts share."""

import pytest

from rollouts.common import make_params


@pytest.fixture(scope="session")
def params():
    return make_params()
