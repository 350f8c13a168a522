"""``python -m dasmil VERB``."""

import sys

from dasmil.cli import main

if __name__ == "__main__":
    sys.exit(main())
