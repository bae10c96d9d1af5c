"""Tests of the template's machinery, run against any service: `make prove SERVICE=path`."""

from tests.service import where as where
