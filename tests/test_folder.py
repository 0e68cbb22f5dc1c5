"""Where the cache folder is worked in: file systems that machines share are known, and a local disk takes their place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from evalcache import folder as folders
from evalcache.errors import EvalCacheError, StoreError
from evalcache.folder import file_system, is_remote, is_shared, local_folder

MOUNTS = """/dev/sda1 / ext4 rw 0 0
server:/home /home nfs4 rw 0 0
/dev/sdb1 /home/local\\040disk xfs rw 0 0
remote /mnt/far fuse.sshfs rw 0 0
//nas/share /mnt/share cifs rw 0 0
"""


@pytest.mark.parametrize(
    "path, kind",
    [
        ("/var/cache", "ext4"),
        ("/home/me/.cache", "nfs4"),
        ("/home/local disk/cache", "xfs"),
        ("/homes", "ext4"),
        ("/mnt/far/x", "fuse.sshfs"),
        ("/mnt/share", "cifs"),
    ],
)
def test_network_mounts_are_known(tmp_path, path, kind):
    mounts = tmp_path / "mounts"
    mounts.write_text(MOUNTS)
    assert file_system(Path(path), mounts) == kind


@pytest.mark.parametrize("kind, name, far", [
    (0xEF53, "ext4", False), (0x01021994, "tmpfs", False), (0x6969, "nfs4", True), (0xFF534D42, "cifs", True),
    (0xFE534D42, "smb3", True), (0x0BD00BD0, "lustre", True), (0x47504653, "gpfs", True), (0x19830326, "beegfs", True),
    (0x00C36400, "ceph", True), (0x01021997, "9p", True), (0x65735546, "fuse.sshfs", True), (0x65735546, "fuse.s3fs", True),
    (0x65735546, "fuseblk", False), (0x65735546, "fuse.mergerfs", False), (None, "", False),
])  # fmt: skip
def test_file_systems_that_machines_share_are_known(monkeypatch, kind, name, far):
    # Stand-ins for what the kernel says: nobody has all of these mounted.
    monkeypatch.setattr(folders, "_statfs_type", lambda path: kind)
    monkeypatch.setattr(folders, "file_system", lambda path: name)
    assert is_remote(Path("/somewhere")) is far


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="file systems are told apart by what Linux says of them")
def test_what_the_kernel_says_is_read():
    assert folders._statfs_type(Path("/proc/self")) == 0x9FA0, "proc's own type, from linux/magic.h"
    assert folders._statfs_type(Path("/proc/not/there")) == 0x9FA0, "of what exists above it"
    assert folders._statfs_type(Path("relative/not/there")) == folders._statfs_type(Path.cwd())


def test_a_local_folder_is_its_own(tmp_path):
    assert local_folder(tmp_path / "cache") == tmp_path / "cache"
    assert not (tmp_path / "cache").exists()


def test_it_can_be_said_what_a_folder_is(tmp_path, monkeypatch):
    monkeypatch.setenv("EVALCACHE_LOCAL_DIR", str(tmp_path / "local"))
    monkeypatch.setenv("EVALCACHE_NETWORK", "1")
    here, there = local_folder(tmp_path / "a"), local_folder(tmp_path / "b")
    assert here.parent == there.parent == tmp_path / "local" / "shared" and here != there
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert local_folder(tmp_path / "link") == here, "one folder under two names"
    monkeypatch.setenv("EVALCACHE_NETWORK", "0")
    monkeypatch.setattr(folders, "_statfs_type", lambda path: 0x6969)
    assert not is_shared(tmp_path) and local_folder(tmp_path) == tmp_path
    monkeypatch.setenv("EVALCACHE_NETWORK", "yes")
    with pytest.raises(EvalCacheError, match="EVALCACHE_NETWORK"):
        local_folder(tmp_path)


def test_where_the_home_is_remote_as_well_it_is_a_folder_of_ones_own_beside_temporary_files(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "is_remote", lambda path: True)
    monkeypatch.setattr(folders.tempfile, "gettempdir", lambda: str(tmp_path))
    place = tmp_path / f"evalcache-{os.getuid()}"
    assert place in local_folder(Path("/far")).parents
    assert place.stat().st_mode & 0o777 == 0o700
    place.chmod(0o777)  # as somebody else may have made it
    with pytest.raises(StoreError, match="EVALCACHE_LOCAL_DIR"):
        local_folder(Path("/far"))
    place.rmdir()
    place.symlink_to(tmp_path)
    with pytest.raises(StoreError, match="EVALCACHE_LOCAL_DIR"):
        local_folder(Path("/far"))
