"""What all tests share: the way to `fakes`, and how hard hypothesis tries.

HYPOTHESIS_PROFILE=dev      the default: some seconds
HYPOTHESIS_PROFILE=ci       10,000 steps of the engine's property test
HYPOTHESIS_PROFILE=soak     a lot, for a night
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))

_COMMON = {
    "deadline": None,  # machines differ; pytest-timeout ends what hangs
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
    "print_blob": True,
    "report_multiple_bugs": False,
}
settings.register_profile("dev", max_examples=80, **_COMMON)
settings.register_profile("ci", max_examples=300, **_COMMON)
settings.register_profile("soak", max_examples=20_000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if "CI" in os.environ else "dev"))
