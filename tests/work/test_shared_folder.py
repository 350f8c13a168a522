"""Several commands on one folder share its slides, also when one of them is killed."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from road import RANDOM, embed_command, tile_command

from dasmil.bags import bag_path
from dasmil.slides.cohort import read_cohort
from dasmil.slides.tile_table import tiles_path
from dasmil.tables import read_csv

WITHOUT_HASTE = Path(__file__).with_name("without_haste.py")


VERBS = ["tile", pytest.param("embed", marks=pytest.mark.slow)]


class Command:
    """A command in a process of its own, that notes every slide it writes.

    Parameters
    ----------
    pause_s: before each slide is written.
    """

    def __init__(self, notes: Path, args: list[str], pause_s: float = 0.2, **environment: str):
        self.notes = notes
        self.process = subprocess.Popen(
            [sys.executable, WITHOUT_HASTE, notes, str(pause_s), *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )

    def written(self) -> list[str]:
        return self.notes.read_text().split() if self.notes.exists() else []

    def wait_until_written(self, number: int) -> None:
        for _ in range(2400):
            if len(self.written()) >= number or self.process.poll() is not None:
                return
            time.sleep(0.05)
        raise TimeoutError(self.notes)

    def end(self) -> str:
        """What it printed; it must have ended well."""
        output, _ = self.process.communicate(timeout=240)
        assert self.process.returncode == 0, output
        return output


def slide_ids(road) -> list[str]:
    return [row.slide_id for row in read_cohort(road.cohort)]


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_two_commands_share_a_cohort(road, tmp_path, verb) -> None:
    output = tmp_path / "output"
    args = (
        tile_command(road.cohort, output)
        if verb == "tile"
        else embed_command(road.tiles, output, RANDOM)
    )
    commands = [Command(tmp_path / f"notes{number}", args) for number in range(2)]
    for command in commands:
        command.end()
    written = [command.written() for command in commands]
    assert Counter(written[0] + written[1]) == Counter(slide_ids(road))  # none lost, none twice
    assert all(written), "one has done everything"
    _, rows = read_csv(output / "status.csv")
    assert {row["state"] for row in rows} == {"done"}


@pytest.mark.parametrize("verb", VERBS)
def test_a_killed_command_loses_nothing(road, tmp_path, verb) -> None:
    output, whole = tmp_path / "output", tmp_path / "whole"
    if verb == "tile":
        args, path, reference = tile_command(road.cohort, output), tiles_path, road.tiles
    else:
        args, path, reference = embed_command(road.tiles, output, RANDOM), bag_path, whole
        Command(tmp_path / "notes", embed_command(road.tiles, whole, RANDOM), 0.0).end()
    victim, heir = (Command(tmp_path / f"notes{number}", args) for number in range(2))
    victim.wait_until_written(2)
    victim.process.send_signal(signal.SIGKILL)
    victim.process.wait()
    heir.end()
    for slide_id in slide_ids(road):
        assert path(output, slide_id).read_bytes() == path(reference, slide_id).read_bytes()
    # twice only what the dead one held when it died, written but not yet told
    twice = Counter(victim.written() + heir.written()) - Counter(slide_ids(road))
    assert sum(twice.values()) <= 1
    _, rows = read_csv(output / "status.csv")
    assert {row["state"] for row in rows} == {"done"}
    assert sorted(p.name for p in (output / "work").iterdir()) == ["claims", "log.jsonl"]


@pytest.mark.slow
def test_sigterm_gives_the_slides_back_at_once(road, tmp_path) -> None:
    for verb, args in (
        ("tile", tile_command(road.cohort, tmp_path / "tiles")),
        ("embed", embed_command(road.tiles, tmp_path / "bags", RANDOM)),
    ):
        command = Command(tmp_path / verb, args)
        command.wait_until_written(2)
        command.process.terminate()
        command.process.communicate(timeout=60)
        assert command.process.returncode == 128 + signal.SIGTERM
        output = Path(args[args.index("--output") + 1])
        assert list((output / "work" / "claims").iterdir()) == []
        _, rows = read_csv(output / "status.csv")
        assert {row["state"] for row in rows} == {"done", "waiting"}


def two_nodes(road, tmp_path: Path, launcher: str) -> list[Command]:
    """``embed`` on two nodes with one process each, as a cluster starts it."""
    args = embed_command(road.tiles, tmp_path / "bags", RANDOM)
    args += ["--trainer.accelerator", "cpu", "--trainer.strategy", "ddp"]
    args += ["--trainer.num_nodes", "2", "--trainer.devices", "1"]
    port = str(20_000 + os.getpid() % 20_000)
    commands = []
    for rank in ("0", "1"):
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        if launcher == "slurm":
            environment = {
                "SLURM_JOB_ID": "1",
                "SLURM_JOB_NAME": "embed",
                "SLURM_NTASKS": "2",
                "SLURM_NTASKS_PER_NODE": "1",
                "SLURM_NNODES": "2",
                "SLURM_NODELIST": "127.0.0.1",
                "SLURM_PROCID": rank,
                "SLURM_NODEID": rank,
                "SLURM_LOCALID": "0",
            }
        else:
            environment = {
                "TORCHELASTIC_RUN_ID": "1",
                "WORLD_SIZE": "2",
                "LOCAL_WORLD_SIZE": "1",
                "RANK": rank,
                "GROUP_RANK": rank,
                "LOCAL_RANK": "0",
            }
        commands.append(Command(tmp_path / f"notes{rank}", args, **shared, **environment))
    return commands


@pytest.mark.parametrize("launcher", ["slurm", "torchrun"])
@pytest.mark.slow
def test_two_nodes_share_a_cohort(road, tmp_path, launcher) -> None:
    commands = two_nodes(road, tmp_path, launcher)
    printed = [command.end() for command in commands]
    assert "embed: 11 done, 0 failed" in printed[0] and "embed: 11" not in printed[1]
    written = [command.written() for command in commands]
    assert Counter(written[0] + written[1]) == Counter(slide_ids(road))
    assert all(written), "one node has done everything"
