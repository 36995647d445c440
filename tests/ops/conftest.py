"""All tests of this folder run on room that was not cleared."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _room(poisoned_room):
    pass
