"""What a cluster lacks is said before any actor starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from midlogit import InvalidRequest, MissingExtra, ModelUnavailable
from midlogit.errors import ServerUnavailable, UnsupportedVersion
from midlogit.ray.cluster import connected, require_nodes

STUB = """
from pathlib import Path
version = Path(__file__).with_name("version")
if not version.exists():
    raise ImportError("no midlogit here")
__version__ = version.read_text()
"""


@pytest.mark.parametrize(
    ("address", "said"),
    [("127.0.0.1:9", "refused"), ("nowhere", "Invalid address"), ("auto", "running Ray")],
)
def test_no_cluster(address: str, said: str) -> None:
    with pytest.raises(ServerUnavailable, match=said), connected(address):
        pass


def test_folders_and_gpus(tmp_path: Path) -> None:
    with connected("local"):
        require_nodes(0, [tmp_path], address="local")
        with pytest.raises(ModelUnavailable, match=r"Node 127\.0\.0\.1 .* does not see .*/gone\."):
            require_nodes(0, [tmp_path, tmp_path / "gone"], address="local")
        with pytest.raises(InvalidRequest, match="--gpus-per-replica"):
            require_nodes(1, [], address="local")


def test_nodes_without_midlogit_and_with_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The task that looks around runs where midlogit cannot be imported."""
    package = tmp_path / "midlogit"
    package.mkdir()
    (package / "__init__.py").write_text(STUB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # of the processes that Ray starts
    with connected("local"):
        with pytest.raises(MissingExtra, match=r"Node 127\.0\.0\.1 .* has no midlogit"):
            require_nodes(0, [], address="local")
        (package / "version").write_text("0.0.9")
        with pytest.raises(UnsupportedVersion, match=r"has midlogit 0\.0\.9, and this one is"):
            require_nodes(0, [], address="local")
    assert not ray.is_initialized()
