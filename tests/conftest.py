"""Before any test imports trackio: its files go to a temporary folder, never to the user's dashboard."""

import os
import tempfile

TRACKIO_FOLDER = tempfile.TemporaryDirectory(prefix="trackio-tests-", ignore_cleanup_errors=True)
os.environ["TRACKIO_DIR"] = TRACKIO_FOLDER.name
for remote in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_STORAGE_MODE", "TRACKIO_WEBHOOK_URL"):
    os.environ.pop(remote, None)
