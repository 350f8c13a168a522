"""Workers on one folder: claims are exclusive, and outlive nobody."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dasmil.errors import DiskFullError
from dasmil.work.board import STALE_AFTER_S, Board
from dasmil.work.worker import Worker

STRANGER = """
import sys, time
from pathlib import Path
from dasmil.work.worker import Worker
with Worker(Path(sys.argv[1])) as worker:
    assert worker.claim("a")
    print("claimed", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def stranger(tmp_path: Path):
    """Another process that has claimed slide a."""
    process = subprocess.Popen(
        [sys.executable, "-c", STRANGER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "claimed\n"
    yield process
    process.kill()
    process.wait()


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def move_to_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that whether its process runs cannot be asked, but by its heartbeat."""
    monkeypatch.setattr("dasmil.work.board.machine_name", lambda: "another")


def age(folder: Path, seconds: float) -> None:
    """Make the heartbeats of all workers there so old."""
    for path in (folder / "work").glob("*.jsonl"):
        then = path.stat().st_mtime - seconds
        os.utime(path, (then, then))


def comes(condition: Callable[[], bool]) -> bool:
    """Whether it comes true within five seconds."""
    end = time.monotonic() + 5
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def claims_in(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "work" / "claims").iterdir())


def test_a_claim_is_exclusive_until_given_back(tmp_path: Path) -> None:
    with Worker(tmp_path) as first, Worker(tmp_path) as second:
        assert first.claim("a") and not second.claim("a")
        assert second.claim("b") and not first.claim("b")
        assert second.held_by_others() == {"a": first.name}
        first.release("a")
        assert second.held_by_others() == {}
        assert second.claim("a")


def test_of_many_that_ask_at_once_one_gets_it(tmp_path: Path) -> None:
    workers = [Worker(tmp_path).__enter__() for _ in range(8)]
    for slide in range(20):
        barrier = threading.Barrier(len(workers))
        won = []

        def ask(worker, slide=slide, barrier=barrier, won=won) -> None:
            barrier.wait()
            if worker.claim(f"slide{slide}"):
                won.append(worker)

        threads = [threading.Thread(target=ask, args=(worker,)) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
    for worker in workers:
        worker.__exit__(None, None, None)


def test_slide_ids_with_dots_stay_different(tmp_path: Path) -> None:
    with Worker(tmp_path) as first, Worker(tmp_path) as second:
        assert first.claim("a.1") and second.claim("a") and second.claim("a.1.1")
        assert second.held_by_others() == {"a.1": first.name}


def test_a_living_worker_of_another_process_keeps_its_slide(stranger, tmp_path: Path) -> None:
    with Worker(tmp_path) as worker:
        assert not worker.claim("a")
        assert len(worker.others()) == 1


def test_a_killed_worker_of_this_machine_is_known_at_once(stranger, tmp_path: Path) -> None:
    with Worker(tmp_path) as worker:
        assert not worker.claim("a")
        kill(stranger)
        assert worker.held_by_others() == {} and worker.claim("a")
        assert worker.still_holds("a")


def test_a_killed_worker_of_another_machine_is_known_by_its_silence(
    stranger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill(stranger)
    move_to_another_machine(monkeypatch)
    with Worker(tmp_path) as worker:
        assert not worker.claim("a")  # it may live
        age(tmp_path, STALE_AFTER_S - 5)
        assert not worker.claim("a")
        age(tmp_path, 10)
        assert worker.claim("a")
        assert claims_in(tmp_path) == ["a.1", "a.2"]
        worker.settle("a", {"state": "done"})
        assert claims_in(tmp_path) == []


def test_only_one_takes_over(stranger, tmp_path: Path) -> None:
    with Worker(tmp_path) as first, Worker(tmp_path) as second:
        kill(stranger)
        assert [first.claim("a"), second.claim("a")] == [True, False]


def test_who_was_taken_for_dead_learns_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Worker(tmp_path) as sleeper:
        assert sleeper.claim("a")
        age(tmp_path, 1000)
        with Worker(tmp_path) as heir:
            assert heir.claim("a")
            assert heir.still_holds("a") and not sleeper.still_holds("a")
            sleeper.release("a")
            assert heir.still_holds("a")  # it gave back what was its own
            assert sleeper.claim("b") and not heir.claim("b")  # and is one of them again


def test_the_heartbeat_keeps_a_worker_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dasmil.work.worker.HEARTBEAT_S", 0.01)
    with Worker(tmp_path) as worker:
        age(tmp_path, 1000)
        before = worker.path.stat().st_mtime
        assert comes(lambda: worker.path.stat().st_mtime > before)


def test_a_status_that_cannot_be_written_does_not_end_its_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dasmil.work.worker.HEARTBEAT_S", 0.01)
    beats = []

    def write_status() -> None:
        beats.append(1)
        if len(beats) < 3:
            raise DiskFullError("full")

    with Worker(tmp_path, write_status=write_status):
        assert comes(lambda: len(beats) > 4)


def test_lines_of_all_workers_come_together_and_the_last_counts(tmp_path: Path) -> None:
    with Worker(tmp_path) as first:
        first.claim("a")
        first.settle("a", {"state": "failed", "message": "one"})
        with Worker(tmp_path) as second:
            assert not second.is_settled("a")  # before it began
            first.claim("b")
            first.settle("b", {"state": "done"})
            assert second.is_settled("b")
            second.claim("a")
            second.settle("a", {"state": "done"})
    board = Board(tmp_path)
    board.update()
    assert {slide_id: r["state"] for slide_id, r in board.records.items()} == {
        "a": "done",
        "b": "done",
    }


def test_a_clean_end_leaves_one_file(tmp_path: Path) -> None:
    for slide_id in "ab":
        with Worker(tmp_path) as worker:
            worker.claim(slide_id)
            worker.settle(slide_id, {"state": "done"})
            worker.claim("left")
    work = tmp_path / "work"
    assert sorted(p.name for p in work.iterdir()) == ["claims", "log.jsonl"]
    assert claims_in(tmp_path) == []
    lines = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    assert [line["slide_id"] for line in lines] == ["a", "b"]


def test_files_of_dead_workers_are_removed_only_when_nobody_works(stranger, tmp_path: Path) -> None:
    begun = tmp_path / "tiles" / ".s1.0123456789ab.tmp.safetensors"
    begun.parent.mkdir()
    begun.write_text("half")
    hidden = tmp_path / "tiles" / ".hidden"
    hidden.touch()
    with Worker(tmp_path):
        pass
    assert begun.exists() and claims_in(tmp_path) == ["a.1"]
    kill(stranger)
    with Worker(tmp_path):
        assert not begun.exists() and claims_in(tmp_path) == []
    assert hidden.exists()


def test_a_line_that_was_cut_off_costs_itself_only(stranger, tmp_path: Path) -> None:
    (path,) = (p for p in (tmp_path / "work").glob("*.jsonl") if p.name != "log.jsonl")
    board = Board(tmp_path)
    line = json.dumps({"slide_id": "b", "time": 1.0, "state": "done"})
    with open(path, "a") as file:
        file.write("\n" + line[:20])
    board.update()
    assert board.records == {}
    with open(path, "a") as file:  # the rest of the line comes later
        file.write(line[20:])
    board.update()
    assert board.records["b"]["state"] == "done"
    with open(path, "a") as file:  # this one was cut off for good, and another follows
        file.write("\n" + line[:20] + "\n" + line.replace('"b"', '"c"'))
    board.update()
    assert set(board.records) == {"b", "c"}
    board.update()
    assert set(board.records) == {"b", "c"}


def test_a_disk_without_links_still_grants_one_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with Worker(tmp_path) as first, Worker(tmp_path) as second:
        assert [first.claim("a"), second.claim("a"), second.claim("b")] == [True, False, True]
        assert second.held_by_others() == {"a": first.name}


def test_an_error_is_reported_although_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match="the first"), Worker(tmp_path) as worker:
        worker.claim("a")

        def full(handle: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        raise RuntimeError("the first")
    assert claims_in(tmp_path) == []


def test_a_note_settles_nothing(tmp_path: Path) -> None:
    with Worker(tmp_path) as worker:
        worker.note("a", {"state": "waiting"})
        worker.note("b", {"state": "not tiled"})
        assert worker.last_record("b")["state"] == "waiting"  # until the files are read
        assert not worker.is_settled("a") and not worker.is_settled("b")
        assert worker.last_record("b")["state"] == "not tiled"
        assert worker.claim("b")
        worker.settle("b", {"state": "done"})
        assert worker.is_settled("b")


def test_files_that_a_system_leaves_among_claims_disturb_nobody(tmp_path: Path) -> None:
    """As NFS does of one that is removed while somebody reads it, or macOS wherever it goes."""
    claims = tmp_path / "work" / "claims"
    claims.mkdir(parents=True)
    for name in (".nfs00000000000ab", ".DS_Store"):
        (claims / name).write_text("somebody")
    with Worker(tmp_path) as worker:
        assert worker.claim("a")
        assert worker.held_by_others() == {}
        worker.settle("a", {"state": "done"})
    with Worker(tmp_path) as worker:
        assert worker.claim("b")


def test_a_file_that_goes_while_it_is_read_is_one_that_is_not_there(
    stranger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Path.read_text

    def stale(path: Path, *args: str, **options: str) -> str:
        if path.name == "a.1":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return read(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", stale)
    with Worker(tmp_path) as worker:
        assert worker.held_by_others() == {}


def test_a_claim_without_hard_links_is_not_taken_before_it_is_signed(tmp_path: Path) -> None:
    with Worker(tmp_path) as first, Worker(tmp_path) as second:
        path = tmp_path / "work" / "claims" / "a.1"
        path.touch()  # as open(path, "x") leaves it for a moment
        threading.Timer(0.3, path.write_text, [first.name]).start()
        assert not second.claim("a")
        dead = tmp_path / "work" / "claims" / "b.1"
        dead.touch()
        os.utime(dead, (time.time() - 60, time.time() - 60))  # never signed
        assert second.claim("b")


def test_of_two_that_want_different_things_the_later_one_is_refused(tmp_path: Path) -> None:
    with Worker(tmp_path, wants={"x": "1"}) as first:
        assert first.refused_by("x") is None
        time.sleep(0.02)  # file systems tell times to some milliseconds
        with Worker(tmp_path, wants={"x": "2"}) as second, Worker(tmp_path, wants={"x": "1"}) as c:
            assert first.refused_by("x") is None
            assert second.refused_by("x") == first.board.describe(first.name)
            assert c.refused_by("y") is None
        assert Worker(tmp_path).board.wants(first.name) == {}  # its lines are not read yet
    with Worker(tmp_path, wants={"x": "2"}) as third:
        assert third.refused_by("x") is None  # the others have ended


def test_the_heartbeat_continues_while_a_large_table_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dasmil.work.worker.HEARTBEAT_S", 0.01)
    writes, go_on = threading.Event(), threading.Event()

    def write_status() -> None:
        writes.set()
        assert go_on.wait(20)

    with Worker(tmp_path, write_status=write_status) as worker:
        assert writes.wait(20)
        age(tmp_path, 1000)
        before = worker.path.stat().st_mtime
        beaten = comes(lambda: worker.path.stat().st_mtime > before)
        go_on.set()
    assert beaten


def test_faults_of_the_table_are_named_once_and_the_work_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dasmil.work.worker.HEARTBEAT_S", 0.01)
    beats = []

    def write_status() -> None:
        beats.append(1)
        if len(beats) < 4:
            raise ValueError("no table")

    with Worker(tmp_path, write_status=write_status):
        assert comes(lambda: len(beats) > 5)
    assert capsys.readouterr().err == "the status was not written: no table\n"


def test_a_fast_task_may_end_before_its_process_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken(source: Path, path: Path) -> None:
        raise FileExistsError(path)  # and gone again

    with Worker(tmp_path) as worker:
        monkeypatch.setattr("dasmil.work.worker.link_once", taken)
        assert not worker.claim("a")


def test_lines_that_are_no_records_are_skipped_and_said(tmp_path: Path) -> None:
    with Worker(tmp_path) as worker:
        worker.claim("a")
        worker.settle("a", {"state": "done", "tiles/x20": 3, "seconds": 1.0})
    log = tmp_path / "work" / "log.jsonl"
    sound = log.read_text().strip()
    record = json.loads(sound)
    odd = [
        *("[1]", '"text"', "5", "null", '[["a", 1]]', "not JSON", "[" * 100_000, "{}", "\udcff"),
        *(json.dumps({**record, name: value}) for name, value in ODD_VALUES),
        *(json.dumps({"worker": "w", **about}) for about in ODD_WORKERS),
    ]
    data = "\n".join([*odd[:5], sound, *odd[5:], ""]).encode(errors="surrogateescape")
    for name in ("log", "host-1-abc"):
        (tmp_path / "work" / f"{name}.jsonl").write_bytes(data)
    os.mkfifo(tmp_path / "work" / "fifo.jsonl")
    (tmp_path / "work" / "folder.jsonl").mkdir()
    (tmp_path / "work" / "claims" / "b.1").write_bytes(b"../../../etc/\xff\0")
    os.mkfifo(tmp_path / "work" / "claims" / "c.1")
    (tmp_path / "work" / "claims" / ("d." + "9" * 200)).write_text("x")
    board = Board(tmp_path)
    with pytest.warns(UserWarning, match=rf"log\.jsonl: {len(odd)} line.s. are skipped") as said:
        board.update()
    assert len(said) == 2
    assert set(board.records) == {"a"} and board.records["a"]["tiles/x20"] == 3
    assert board.held(time.time()) == {}
    with Worker(tmp_path) as worker:
        assert worker.claim("a") and worker.claim("b")


ODD_VALUES = [
    *(("state", 5), ("slide_id", None), ("time", "now"), ("seconds", "1"), ("tiles/x20", "many")),
    *(("message", ["a"]), ("slide_digest", {}), ("seconds", True)),
]
ODD_WORKERS: list[dict[str, object]] = [
    {},
    {"host": "h", "machine": "m", "pid": "1", "started": 1.0},
    {"host": "h", "machine": "m", "pid": -1, "started": 1.0},
    {"host": "h", "machine": "m", "pid": 1, "started": "then"},
    {"host": "h", "machine": "m", "pid": 1, "started": 1.0, "wants": [1]},
    {"host": "h", "machine": "m", "pid": 1, "started": 1.0, "stale_after_s": None},
]
