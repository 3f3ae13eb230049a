"""The results as static pages, for file:// and for `moelab browse`: `build(results)` writes them, and only what changed.

    results/index.html                                     the paper's claims, the gallery, all results
    results/compare.html                                   two results side by side
    results/assets/                                        the style and the script of all pages
    results/<experiment>/<scale>/<date>-<time>/index.html  one result
                                               notebook.html  its executed notebook
                                               data.js        what compare.html shows of it

The pages ask for nothing outside the folder, work without a script (filters and comparison need it), and are made from the files of a
publication (`moelab.report.publication`) and the descriptions in `moelab.experiments` alone.
"""

from moelab.report.site.notebook import convert
from moelab.report.site.pages import Built, build

__all__ = ["Built", "build", "convert"]
