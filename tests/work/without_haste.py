"""A command that pauses before each slide that it writes, and notes it.

``python without_haste.py NOTES PAUSE_S COMMAND...``: so that tests of several commands have time to
do something to them.
"""

import sys
import time
from pathlib import Path

NOTES, PAUSE_S, *ARGS = sys.argv[1:]


def noting(write):
    def write_and_note(path, value):
        time.sleep(float(PAUSE_S))
        write(path, value)
        with open(NOTES, "a") as file:
            file.write(f"{Path(path).stem}\n")

    return write_and_note


if ARGS[0] == "embed":
    from dasmil.embedding import writer

    writer.write_bag = noting(writer.write_bag)
else:  # in the processes that it starts too: they import this file again
    from dasmil.slides import tile_slide

    tile_slide.write_tiles = noting(tile_slide.write_tiles)

if __name__ == "__main__":
    from dasmil.cli import main

    sys.exit(main(ARGS))
