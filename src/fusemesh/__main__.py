"""``python -m fusemesh``, and ``torchrun --nproc-per-node 4 -m fusemesh train ...``."""

import sys

from fusemesh.cli import main

if __name__ == "__main__":
    sys.exit(main())
