"""Draw figures in one style: theme, colours safe for colour blindness, marks of the paper's values, dark variants.

May import: `moelab.statistics`, `moelab.files`.
"""
