"""Attacks under the names, signatures and random draws of other libraries: change one import line, keep the results.

    import rvlm.compat.torchattacks as torchattacks            import rvlm.compat.foolbox as fb
    from rvlm.compat.autoattack import AutoAttack              from rvlm.compat.pyautoattack import AutoAttack

Every class translates to one call of `rvlm.attacks`, so the contract holds here too: the model is left as it was and
the result is detached. Which class becomes what, what is equal to the bit, and which quirks are kept or not stands in
docs/compat.md. No other library is imported or needed.
"""
