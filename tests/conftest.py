"""What all suites share."""

from __future__ import annotations

import hypothesis

# A shared two-core machine stalls now and then; the limit that counts is the one that pytest sets for each
# test.
hypothesis.settings.register_profile("project", deadline=None, print_blob=True)
hypothesis.settings.load_profile("project")
