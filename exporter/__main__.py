"""`python -m exporter` is `pm2-exporter`."""

import sys

from exporter.cli import main

sys.exit(main())
