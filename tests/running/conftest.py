"""What the tests of runs share."""

from pathlib import Path

import pytest
from evaluating import write_pretrained


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-trained checkpoint for linear evaluation."""
    path = tmp_path_factory.mktemp("pretrained") / "checkpoint_0000.pth.tar"
    write_pretrained(path)
    return path
