"""``python -m fxcompress`` is the ``fxcompress`` command."""

import sys

from fxcompress.cli import main

sys.exit(main())
