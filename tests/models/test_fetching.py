"""Files of models from folders and the hub: words for all that can be missing, and links into the hub's blobs."""

from __future__ import annotations

import errno
from types import SimpleNamespace

import pytest
from huggingface_hub import errors

from dreamlora.errors import UserError
from dreamlora.models import fetching


def hub_error(kind: type[Exception], status: int) -> Exception:
    return kind("said no", response=SimpleNamespace(headers={}, request=None, status_code=status))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            lambda: hub_error(errors.GatedRepoError, 403),
            "is gated: accept its terms at https://huggingface.co/owner/name",
        ),
        (
            lambda: hub_error(errors.RepositoryNotFoundError, 404),
            "no folder owner/name and no such public hub repository",
        ),
        (lambda: hub_error(errors.RevisionNotFoundError, 404), "no revision 'v9'"),
        (lambda: hub_error(errors.RemoteEntryNotFoundError, 404), r"has no model_index\.json"),
        (lambda: errors.LocalEntryNotFoundError("x"), "the hub cannot be reached"),
        (lambda: errors.HFValidationError("x"), "it is not a hub name"),
        (lambda: hub_error(errors.HfHubHTTPError, 500), "did not deliver"),
        (lambda: ConnectionError("no route"), "did not deliver.*no route"),
    ],
)
def test_hub_errors(monkeypatch, error, words):
    def fail(*_args, **_options):
        raise error()

    monkeypatch.setattr(fetching, "hf_hub_download", fail)
    with pytest.raises(UserError, match=words):
        fetching.find_file("owner/name", "model_index.json", "v9", None)


def test_a_full_disk_is_not_told_as_a_missing_model(monkeypatch):
    def fail(*_args, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fetching, "hf_hub_download", fail)
    with pytest.raises(OSError, match="No space left on device"):
        fetching.find_file("owner/name", "model_index.json", None, None)


def test_offline(tmp_path):
    """The tests run with HF_HUB_OFFLINE: the library's own error, not a made-up one."""
    with pytest.raises(UserError, match="the hub cannot be reached"):
        fetching.find_file("owner/name", "model_index.json", None, tmp_path)
