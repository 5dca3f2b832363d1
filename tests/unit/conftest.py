"""What several files of this folder are run with."""

import pytest


@pytest.fixture(params=[False, True], ids=["plain", "operators"])
def operators(request: pytest.FixtureRequest) -> bool:
    """Whether the test uses the compiled operators: every test that asks runs both ways."""
    from ubmd.operators import available

    if request.param and not available():
        pytest.skip("the compiled operators are not installed")
    return request.param
