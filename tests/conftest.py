"""How hypothesis searches: anew each time for a person, the same each time where a failure must be somebody's change."""

import os

from hypothesis import settings

settings.register_profile("same", derandomize=True, print_blob=True)
if os.environ.get("CI"):
    settings.load_profile("same")
