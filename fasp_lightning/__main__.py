"""``python -m fasp_lightning`` is ``fasp``."""

import sys

from fasp_lightning.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
