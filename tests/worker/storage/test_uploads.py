import hashlib
import subprocess

import pytest

from cwpo_worker.errors import (
    DigestMismatchError,
    IdempotencyConflictError,
    StoreFullError,
    UnknownFileError,
)
from cwpo_worker.storage.store import BlobStore
from cwpo_worker.storage.uploads import FileCatalog


@pytest.fixture
def catalog(tmp_path):
    return FileCatalog(BlobStore(str(tmp_path)))


def receive(catalog, data=b"{}\n", *, owner=None, key=None, format="jsonl"):
    upload = catalog.receive(format, owner=owner, idempotency_key=key)
    upload.write(data)
    return upload.commit()


def test_a_file_is_what_was_uploaded(catalog):
    upload = catalog.receive("parquet", owner="ann", idempotency_key=None)
    upload.write(b"one")
    upload.write(b"two")
    file = upload.commit()
    assert (file.format, file.bytes) == ("parquet", 6)
    assert file.sha256 == hashlib.sha256(b"onetwo").hexdigest()
    assert catalog.get(file.id, owner="ann") == file
    with catalog.open(file.id) as stream:
        assert stream.read() == b"onetwo"


def test_an_upload_that_is_broken_off_is_no_file(catalog, tmp_path):
    upload = catalog.receive("jsonl", owner=None, idempotency_key=None)
    upload.write(b"half")
    upload.abort()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_other_bytes_than_were_sent_are_no_file(catalog, tmp_path):
    upload = catalog.receive("jsonl", owner=None, idempotency_key=None)
    upload.write(b"{}")
    with pytest.raises(DigestMismatchError, match="2 bytes that were received"):
        upload.commit(hashlib.sha256(b"{}\n").hexdigest())
    upload.abort()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_retry_is_the_same_file(catalog):
    first = receive(catalog, owner="ann", key="k")
    assert receive(catalog, owner="ann", key="k") == first
    assert receive(catalog, owner="bob", key="k").id != first.id
    assert receive(catalog, owner="ann", key="l").id != first.id
    assert receive(catalog, owner="ann").id != receive(catalog, owner="ann").id


@pytest.mark.parametrize("other", [{"data": b"other"}, {"format": "parquet"}])
def test_a_key_that_names_something_else_is_refused(catalog, other):
    first = receive(catalog, key="k")
    with pytest.raises(IdempotencyConflictError):
        receive(catalog, key="k", **other)
    with catalog.open(first.id) as stream:
        assert stream.read() == b"{}\n"


def test_owners_see_their_own_and_an_admin_all(catalog):
    file = receive(catalog, owner="ann")
    assert catalog.get(file.id, owner=None) == file
    with pytest.raises(UnknownFileError):
        catalog.get(file.id, owner="bob")


@pytest.mark.parametrize(
    "file_id", ["", "file-1", "../../etc/passwd", "job-" + "0" * 24, f"file-{'0' * 24}\n"]
)
def test_an_id_that_is_none_is_unknown(catalog, file_id):
    with pytest.raises(UnknownFileError):
        catalog.get(file_id, owner=None)
    with pytest.raises(UnknownFileError):
        catalog.open(file_id)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 MiB."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={64 << 20}", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a small file system here")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_uploads_leave_room_on_the_disk_for_records_and_results(small_disk):
    store = BlobStore(str(small_disk))
    catalog = FileCatalog(store)
    with pytest.raises(StoreFullError, match="enlarge"):
        catalog.receive("jsonl", owner=None, idempotency_key=None, size=62 << 20)
    upload = catalog.receive("jsonl", owner=None, idempotency_key=None)

    def fill():
        for _ in range(64):
            upload.write(bytes(1 << 20))

    with pytest.raises(StoreFullError, match="MB are reserved"):
        fill()
    store.put("record", b"still written")
    upload.abort()
    assert receive(catalog, b"{}\n" * 1000).bytes == 3000
