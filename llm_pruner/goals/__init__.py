"""How much to remove: an amount, or goals for size, speed, memory and the loss of quality.

Imports the ground, config, engines, storage, model, data, evaluation, search, report, checkpoint.
"""
