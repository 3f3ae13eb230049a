"""Draw the figure of docs/prediction.md: python docs/prediction_figure.py."""

from pathlib import Path

from moelab.design.expert_laws import fit
from moelab.experiments import outside
from moelab.plotting import figures
from moelab.plotting import outside as drawing

if __name__ == "__main__":
    figures.theme()
    runs = outside.first_twins(outside.MAIN[0])
    fitted = fit(runs, "effective")
    fig, (ax,) = figures.panels(height=3.4)
    opened = outside.measured("first")
    drawing.factors(outside.twin_factors(runs, fitted.law), outside.drawn(fitted), opened, ax)
    figures.title(fig, "Twins predict 2 to 16 experts, not 256 or 512")
    fig.savefig(Path(__file__).with_name("prediction.png"), dpi=200)
