"""What the corpus's own models share with the service: becomes app/own/features.py before the import."""

from typing import Any

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin
from sklearn.linear_model import LogisticRegression


class Ratios(TransformerMixin, BaseEstimator):
    """Adds the quotient of two columns that are called by their names."""

    def __init__(self, above: str = "Horsepower", below: str = "Weight_in_lbs") -> None:
        self.above, self.below = above, below

    def fit(self, X: Any, y: Any = None) -> "Ratios":
        """Learns the columns' names."""
        self.feature_names_in_ = np.asarray(X.columns, object)
        self.n_features_in_ = X.shape[1]
        return self

    def transform(self, X: Any) -> Any:
        """[rows, columns] -> [rows, columns + 1]."""
        return np.column_stack([X.to_numpy(float), X[self.above].astype(float) / X[self.below].astype(float)])


class CalendarParts(TransformerMixin, BaseEstimator):
    """Dates written as text, to the month and the day of the year."""

    def fit(self, X: Any, y: Any = None) -> "CalendarParts":
        """Nothing to learn."""
        self.n_features_in_ = X.shape[1]
        return self

    def transform(self, X: Any) -> Any:
        """[rows, columns] of text -> [rows, 2 * columns]."""
        found = []
        for name in X.columns:
            dates = pd.to_datetime(X[name])
            found += [dates.dt.month.to_numpy(float), dates.dt.dayofyear.to_numpy(float)]
        return np.column_stack(found)


class Winsorizer(TransformerMixin, BaseEstimator):
    """Clips every column to quantiles of the training data; a missing value stays missing."""

    def __init__(self, share: float = 0.05) -> None:
        self.share = share

    def fit(self, X: Any, y: Any = None) -> "Winsorizer":
        """Learns the quantiles."""
        values = np.asarray(X, float)
        self.low_, self.high_ = np.nanquantile(values, [self.share, 1 - self.share], axis=0)
        self.n_features_in_ = values.shape[1]
        return self

    def transform(self, X: Any) -> Any:
        """[rows, columns] -> the same shape."""
        return np.clip(np.asarray(X, float), self.low_, self.high_)


class Sceptic(ClassifierMixin, BaseEstimator):
    """A logistic regression whose probabilities are drawn towards one half."""

    def __init__(self, doubt: float = 0.2) -> None:
        self.doubt = doubt

    def fit(self, X: Any, y: Any) -> "Sceptic":
        """Fits the regression."""
        self.inner_ = LogisticRegression(max_iter=1_000).fit(X, y)
        self.classes_, self.n_features_in_ = self.inner_.classes_, self.inner_.n_features_in_
        return self

    def predict_proba(self, X: Any) -> Any:
        """[rows, labels]."""
        return (1 - self.doubt) * self.inner_.predict_proba(X) + self.doubt / len(self.classes_)

    def predict(self, X: Any) -> Any:
        """The most probable label of each row."""
        return self.classes_[self.predict_proba(X).argmax(axis=1)]


def first_word(frame: Any) -> Any:
    """The first word of each text, in small letters; a missing one stays missing."""
    return frame.apply(lambda column: column.str.split().str[0].str.lower())


def power_to_weight(frame: Any) -> Any:
    """Two columns to their quotient and its logarithm."""
    values = np.asarray(frame, float)
    ratio = values[:, [0]] / values[:, [1]]
    return np.hstack([ratio, np.log(ratio)])
