"""Where TRL is not installed, its tests are not collected."""

from __future__ import annotations

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("trl") else ["test_trl*.py", "test_distributed.py"]
