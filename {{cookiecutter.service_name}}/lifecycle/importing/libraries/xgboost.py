"""XGBoost: teaches skl2onnx its estimators, with the converters of onnxmltools."""

import copy
from typing import Any


def convertible(estimator: Any) -> Any:
    """A copy whose boosters forgot their columns' names, because the converter wants f0, f1."""
    import xgboost
    from onnxmltools.convert.xgboost.operator_converters.XGBoost import convert_xgboost as convert
    from skl2onnx import update_registered_converter as register
    from skl2onnx.common import shape_calculator as shapes

    scores, values = (
        shapes.calculate_linear_classifier_output_shapes,
        shapes.calculate_linear_regressor_output_shapes,
    )
    options = {"zipmap": [True, False, "columns"], "nocl": [True, False]}
    register(xgboost.XGBClassifier, "ImportedXgbClassifier", scores, convert, options=options)
    register(xgboost.XGBRegressor, "ImportedXgbRegressor", values, convert)
    twin = copy.deepcopy(estimator)
    for step in (twin, *(one for _, one in getattr(twin, "steps", ()))):
        if hasattr(step, "get_booster"):
            step.get_booster().feature_names = step.get_booster().feature_types = None
    return twin
