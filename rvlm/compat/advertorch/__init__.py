"""advertorch (0.2.4) on rvlm's engine: `from rvlm.compat.advertorch.attacks import LinfPGDAttack`."""
