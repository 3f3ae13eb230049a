"""What every notebook's process needs, imported once in the process that they are forked from (see `batch.run_all`)."""

import papermill  # noqa: F401

from moelab.notebook import watch  # noqa: F401
from moelab.report.site import notebook

notebook.load()
