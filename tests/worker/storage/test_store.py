import os
import resource
import subprocess
import sys
import textwrap
import time

import pytest

from cwpo_worker.errors import BlobNotFoundError, StoreError
from cwpo_worker.storage.store import PARTIAL_FOLDER, BlobStore


@pytest.fixture(params=["local", "file", "memory", "s3"])
def store(request, tmp_path):
    if request.param == "s3":
        return BlobStore(f"{request.getfixturevalue('s3')}/some/prefix")
    urls = {
        "local": str(tmp_path / "store"),
        "file": f"file://{tmp_path}/store",
        "memory": f"memory://{tmp_path.name}",
    }
    return BlobStore(urls[request.param])


def put(store, key, data):
    with store.create(key) as blob:
        blob.write(data)
    return blob.published


def test_a_blob_is_there_when_the_block_has_ended_well(store):
    with store.create("a/b/c.txt") as blob:
        blob.write(b"hel")
        blob.write(b"lo")
        assert not store.exists("a/b/c.txt")
        assert blob.tell() == 5
    assert blob.published is True
    assert store.read("a/b/c.txt") == b"hello"
    assert store.stored("a/b/c.txt").size == 5
    with store.open("a/b/c.txt") as stream:
        stream.seek(3)
        assert stream.read() == b"lo"


def test_a_block_that_fails_leaves_nothing(store, tmp_path):
    with pytest.raises(ZeroDivisionError), store.create("a") as blob:
        blob.write(b"x" * (1_000_000 // (blob.write(b"x") - 1)))
    assert not store.exists("a")
    partial = tmp_path / "store" / PARTIAL_FOLDER
    assert not partial.exists() or list(partial.iterdir()) == []


def test_the_first_blob_of_a_name_stays(store):
    assert put(store, "k", b"first") is True
    assert put(store, "k", b"second") is False
    assert store.read("k") == b"first"


def test_of_two_writers_at_once_one_publishes(store):
    with store.create("k") as one:
        one.write(b"one")
        with store.create("k") as two:
            two.write(b"two")
    assert (one.published, two.published) == (False, True)
    assert store.read("k") == b"two"


def test_put_replaces(store):
    store.put("k", b"first")
    store.put("k", b"second")
    assert store.read("k") == b"second"


def test_listing_names_what_lies_directly_in_a_folder(store):
    for key in ("jobs/b/x", "jobs/a/y", "jobs/a/z"):
        put(store, key, b"")
    assert store.list("jobs") == ["jobs/a", "jobs/b"]
    assert store.list("jobs/a/") == ["jobs/a/y", "jobs/a/z"]
    assert store.list("nothing") == []


def test_deleting_is_done_once_or_not_at_all(store):
    put(store, "k", b"")
    store.delete("k")
    store.delete("k")
    assert not store.exists("k")


def test_a_folder_is_deleted_with_all_that_is_in_it_and_nothing_beside(store):
    for key in ("jobs/a/x", "jobs/a/deep/y", "jobs/ab/z"):
        put(store, key, b"")
    store.delete_folder("jobs/a")
    store.delete_folder("jobs/a")
    assert store.list("jobs") == ["jobs/ab"]
    assert store.list("jobs/ab") == ["jobs/ab/z"]


def test_a_folder_on_this_machine_has_no_urls(tmp_path):
    store = BlobStore(str(tmp_path))
    put(store, "k", b"")
    assert store.signed_url("k", 60) is None


def test_what_is_not_there_is_said(store):
    for ask in (store.open, store.read, store.stored):
        with pytest.raises(BlobNotFoundError, match="no absent/blob"):
            ask("absent/blob")


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/passwd", "", "a//b", ".hidden", "a\n"])
def test_no_key_leads_out_of_the_store(store, key):
    with pytest.raises(StoreError, match="not a valid name"):
        put(store, key, b"")


def test_check_says_what_is_wrong_with_the_place(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match=r"cannot write check .*: Not a directory"):
        BlobStore(str(tmp_path / "file")).check()
    with pytest.raises(StoreError, match="nosuchscheme"):
        BlobStore("nosuchscheme://x")
    BlobStore(str(tmp_path / "fine")).check()


def test_what_killed_writers_left_is_swept_after_a_day(tmp_path):
    store = BlobStore(str(tmp_path))
    fresh, stale = store.draft("fresh"), store.draft("stale")
    yesterday = time.time() - 25 * 3600
    os.utime(stale._partial, (yesterday, yesterday))
    store.sweep()
    assert [fresh._partial] == [str(path) for path in (tmp_path / PARTIAL_FOLDER).iterdir()]


FILL = textwrap.dedent(
    """
    import resource, signal, sys
    import pyarrow as pa
    from cwpo.datasets.weighted import ParquetWriter
    from cwpo_worker.errors import StoreError
    from cwpo_worker.storage.store import BlobStore

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    store = BlobStore(sys.argv[1])
    try:
        with store.create("results.parquet") as sink:
            writer = ParquetWriter(sink)
            for i in range(300):
                writer.write_table(pa.table({"x": [f"{i} {j} {i * j}" for j in range(1000)]}))
            writer.close()
    except StoreError as error:
        print(error)
    """
)


def test_a_full_store_is_one_clear_line_and_leaves_nothing_half_written(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FILL, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        f"cannot write results.parquet in the store {tmp_path}: File too large"
    ]
    assert list((tmp_path / PARTIAL_FOLDER).iterdir()) == []
    assert not (tmp_path / "results.parquet").exists()
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
