"""What a sweep looks at without running dasmil: bags, configs, and a stand-in for its processes."""

from itertools import pairwise
from pathlib import Path

import pytest

from dasmil.experiments.sweep.runs import SweepRow, plan
from dasmil.files import write_text

# In place of Python, called as `python -m dasmil VERB ...`: notes what it is given and how many of
# it there are, does what $BEFORE says, and writes what the verb would.
SCRIPT = r"""#!/bin/sh
echo "$*" | sed 's/^-m dasmil //' >> "$CALLS"
echo "gpu=$CUDA_VISIBLE_DEVICES threads=$OMP_NUM_THREADS"
verb=$3; all="$*"
while [ $# -gt 0 ]; do
    case $1 in
        --output) output=$2;;
        --resume) output=$2;;
    esac
    shift
done
eval "$BEFORE"
case $verb in
    tile|embed) mkdir -p "$output"; printf 'slide_id,state\na,done\nb,done\nc,empty\n' \
        > "$output/status.csv";;
    fit) mkdir -p "$output"; printf 'epoch,train/loss\n0,2.5\n1,1.25\n' > "$output/history.csv";;
    test) mkdir -p "$output"; echo "$METRICS" > "$output/test_metrics.json";;
esac
"""


class StandIn:
    """The verbs, each with its arguments, in the order in which they began."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.calls_file = folder / "calls.txt"
        self.monkeypatch = monkeypatch
        script = folder / "python"
        script.write_text(SCRIPT)
        script.chmod(0o755)
        monkeypatch.setattr("dasmil.experiments.sweep.processes.sys.executable", str(script))
        monkeypatch.setenv("CALLS", str(self.calls_file))
        monkeypatch.setenv("METRICS", '{"test/auroc": null, "test/accuracy": 0.5}')
        self.before("true")

    def before(self, shell: str) -> None:
        """What each process does first; $verb, $all and $output are its arguments."""
        self.monkeypatch.setenv("BEFORE", shell)

    def new_calls(self) -> list[str]:
        """Since they were asked for last."""
        calls = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.unlink(missing_ok=True)
        return calls


def make_bags(folder: Path) -> Path:
    """As much of a folder of bags as a sweep itself looks at."""
    write_text(folder / "cohort.csv", "slide_id,path\n")
    write_text(folder / "extractors.json", "{}")
    return folder


def plan_one(tmp_path, *configs, truth=None, truth_classes=(), options=None):
    row = SweepRow("row", tuple(map(str, configs)), set=options or {})
    bags = {None: tmp_path / "bags"}
    [[run]] = plan([row], ["configs/mil.yaml"], [0], tmp_path / "out", bags, truth, truth_classes)
    return run


def option(call: str, name: str) -> list[str]:
    """The values that a command gives an option."""
    words = call.split()
    return [value for word, value in pairwise(words) if word == name]
