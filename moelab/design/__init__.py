"""Provide what experiments share: `Experiment`, scales and arms, token budgets, and how runs are compared.

experiment   `Experiment` and `Scale`: how runs follow from a scale, seeds, arms and overrides
parameters   a notebook's parameters: declared, given, and the runs that follow from them
settings     the scales and the settings of their trainings
comparison   pairs runs of one seed, gives differences their intervals and judges them against the paper
judging      the rule by which a claim of the paper gets its verdict; simulated: that of simulations; stated: what
             claims state in numbers
verdicts     the one table of verdicts: words, signs, colours, meanings
sequential   plans with several looks at the seeds
power        how many seeds a comparison needs
laws         the loss of a family of models over size and tokens, fitted and inverted
budgets      one training gives every budget of tokens; gap, data efficiency and effective size over tokens
rates        at `full`: each arm at its own peak rate and at one that all share
shares       at `full`: curves laid over the paper's at equal shares of the training
targets      a difference of two losses by kinds of tokens and by domain
conclusion   what a notebook says at its end

The experiments themselves are in `moelab.experiments`. This package may import everything below `moelab.experiments`.
"""
