"""``python -m ddsm_engine.doctor``."""

import sys

from ddsm_engine.doctor import main

sys.exit(main())
