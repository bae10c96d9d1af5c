"""Yours: functions and estimator classes that training and serving share. Empty at first.

Import them from your training code too, so that both compute a feature in the same way.
"""
