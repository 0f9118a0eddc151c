"""Record files outlive the process that wrote them, in whatever way it ended."""

import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cnpp_trt.benchmarks.consistency.shards import Shard, appending, read_records, remove_records
from cnpp_trt.benchmarks.records import PromptRecord
from cnpp_trt.errors import CnppError, UserError

WHOLE = Shard()
HEADER = {"steps": 20, "data": "abc", "sizes": (1, 2)}


def write(folder: Path, ids: range, shard: Shard = WHOLE, header: dict[str, Any] = HEADER) -> Path:
    with appending(folder, shard, header) as append:
        for i in ids:
            append({"id": str(i), "value": i / 3})
    return folder / shard.file


def test_a_shard_takes_every_nth():
    shards = [Shard.parse(f"{i}/3") for i in (1, 2, 3)]
    assert [[i for i in range(8) if shard.takes(i)] for shard in shards] == [[0, 3, 6], [1, 4, 7], [2, 5]]
    assert all(map(Shard.parse("1/1").takes, range(5)))


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "-1/2", "1/0", "a/b", "1/2/3", "1.0/2", "1/²"])
def test_what_is_no_shard_is_refused(text):
    with pytest.raises(UserError, match="cannot read --shard"):
        Shard.parse(text)


def test_files_are_resumed_and_merged(tmp_path):
    path = write(tmp_path, range(2))
    write(tmp_path, range(2, 4))
    assert len(path.read_text().splitlines()) == 5  # the header once
    write(tmp_path, range(3, 7), Shard(2, 3))
    write(tmp_path, range(7, 8), Shard(1, 3))
    found = read_records(tmp_path, HEADER)
    assert {id_: r["value"] for id_, r in found.items()} == {str(i): i / 3 for i in range(8)}
    remove_records(tmp_path)
    assert read_records(tmp_path, HEADER) == {}
    assert read_records(tmp_path / "nowhere", HEADER) == {}


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_last_line_is_done_again(tmp_path, cut):
    path = write(tmp_path, range(3))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert list(read_records(tmp_path, HEADER)) == ["0", "1"]
    write(tmp_path, range(2, 3))
    assert path.read_bytes() == whole


def test_a_torn_header_is_written_again(tmp_path):
    path = write(tmp_path, range(1))
    whole = path.read_bytes()
    path.write_bytes(whole[:10])
    assert read_records(tmp_path, {"steps": 4}) == {}
    write(tmp_path, range(1))
    assert path.read_bytes() == whole


def test_other_settings_are_refused(tmp_path):
    path = write(tmp_path, range(2), Shard(1, 2))
    with pytest.raises(UserError) as refusal:
        read_records(tmp_path, {**HEADER, "steps": 4, "scheduler": "ddim"})
    assert str(refusal.value) == (
        f"{path} was made with steps 20 instead of 4, scheduler None instead of 'ddim': "
        "choose another folder with --out, or start again with --fresh"
    )


@pytest.mark.parametrize(
    "damage", ["{", "[1]", "[]", "3", "[" * 99_999, '{"id": "1"}', '{"id": "1", "crc32": 5}', "\0\0"]
)
def test_a_damaged_line_is_named(tmp_path, damage):
    path = write(tmp_path, range(3))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], damage, lines[3]]) + "\n")
    with pytest.raises(UserError, match=rf"{path.name}, line 3 is damaged: delete the line"):
        read_records(tmp_path, HEADER)
    path.write_text("\n".join([*lines[:2], lines[3]]) + "\n")
    assert list(read_records(tmp_path, HEADER)) == ["0", "2"]


def test_a_record_with_its_checksum_and_another_shape_is_named(tmp_path):
    path = write(tmp_path, range(1))
    with appending(tmp_path, WHOLE, HEADER) as append:
        append({"id": "1", "seeds": [1], "scores": ["high"], "counts": {}, "pixels": ["0"]})
    path.write_bytes(b"".join(line + b"\n" for i, line in enumerate(path.read_bytes().splitlines()) if i != 1))
    with pytest.raises(UserError, match=r"line 2 is damaged \(Expected `float`, got `str` - at `\$.scores"):
        read_records(tmp_path, HEADER, PromptRecord)


def test_an_endless_file_of_records(tmp_path):
    (tmp_path / WHOLE.file).symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"cannot read .*: it is not a regular file"):
        read_records(tmp_path, HEADER)


def test_every_flipped_byte_is_noticed(tmp_path):
    path = write(tmp_path, range(2))
    whole = path.read_bytes()
    for place in range(len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match=r"line [123] is damaged: delete the (line|file)"):
            read_records(tmp_path, HEADER)
    path.write_bytes(whole[:-1] + b"x")  # the last line has no end any more
    assert list(read_records(tmp_path, HEADER)) == ["0"]


def test_two_processes_do_not_append_to_one_file(tmp_path):
    with appending(tmp_path, Shard(), HEADER) as append:
        with pytest.raises(UserError, match=r"another process appends to .*--shard 1/2"):
            write(tmp_path, range(1))
        write(tmp_path, range(5, 6), Shard(2, 2))
        append({"id": "1"})
    assert list(read_records(tmp_path, HEADER)) == ["1", "5"]


def test_a_full_disk_is_one_line_and_resumed(tmp_path):
    path = write(tmp_path, range(2))
    whole = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 7, hard))
    try:
        with pytest.raises(CnppError, match=r"File too large.*run again to go on") as failure:
            write(tmp_path, range(2, 3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not isinstance(failure.value, UserError)
    assert len(path.read_bytes()) == len(whole) + 7
    write(tmp_path, range(2, 3))
    assert path.read_bytes().startswith(whole)
    assert list(read_records(tmp_path, HEADER)) == ["0", "1", "2"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CnppError, match=r"cannot write .*mend that"):
        write(tmp_path / "file" / "folder", range(1))


def test_records_outlive_a_killed_process(tmp_path):
    code = (
        "import sys; from pathlib import Path; from cnpp_trt.benchmarks.consistency.shards import *\n"
        f"with appending(Path(sys.argv[1]), Shard(), {json.dumps({'steps': 1})}) as append:\n"
        "    for i in range(10**9): append({'id': str(i), 'long': 'x' * 3000})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    path = tmp_path / Shard().file
    try:
        deadline = time.monotonic() + 60
        while not (path.is_file() and path.stat().st_size > 100_000):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    found = read_records(tmp_path, {"steps": 1})
    assert len(found) > 30
    assert list(found) == [str(i) for i in range(len(found))]
    write(tmp_path, range(-1, 0), header={"steps": 1})  # its lock went with it
    assert len(read_records(tmp_path, {"steps": 1})) == len(found) + 1
