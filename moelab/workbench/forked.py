"""What every notebook's process needs, imported once in the process that they are forked from (see `batch.run_all`)."""

import papermill  # noqa: F401

from moelab.workbench import watch  # noqa: F401
from moelab.workbench.site import notebook

notebook.load()
