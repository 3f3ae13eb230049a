"""In which style is a figure drawn? One theme, colour-blind safe colours, the paper's values always drawn alike, dark variants."""
