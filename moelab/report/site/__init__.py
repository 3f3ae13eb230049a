"""Show the results as static pages, opened as files or served by `moelab browse`.

`build(results)` writes the pages that are new or have changed. `update()` does it in the workspace, `.moelab/pages`,
for the user's own results beside the published ones, or in `results` where publishing is asked for:

    results/index.html                                     what was found: six questions, a line an experiment
    results/hero.svg, digest.csv                           its figure, and its table
    results/overview.html, claims.html                     all claims in one figure, and as a table
    results/figures.html                                   the figure of each experiment, all results
    results/about.html                                     run it again, cite, glossary
    results/explorer.html                                  latency, memory and cost of serving, simulated beforehand
    results/compare.html                                   two results side by side
    results/runs.html                                      the training runs in `runs/`, to download
    results/claims.csv                                     all claims with their verdicts
    results/assets/                                        the style and the scripts of all pages
    results/<experiment>/<scale>/<date>-<time>/index.html  one result
                                               notebook.html  its executed notebook

The pages load nothing from outside the folder and work without a script (filters, comparison and interactive charts
need it). They are made only from the files of the results (`moelab.report.publication`) and the descriptions in
`moelab.experiments`.
"""

from moelab.report.site.notebook import convert
from moelab.report.site.pages import Built, build
from moelab.report.site.workspace import update

__all__ = ["Built", "build", "convert", "update"]
