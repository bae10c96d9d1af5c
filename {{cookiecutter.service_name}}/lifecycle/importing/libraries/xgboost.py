"""XGBoost: teaches skl2onnx its estimators, with the converters of onnxmltools."""

import copy
from typing import Any


def convertible(estimator: Any) -> Any:
    """A copy whose boosters forgot their columns' names, because the converter wants f0, f1."""
    import xgboost
    from onnxmltools.convert.xgboost.operator_converters.XGBoost import convert_xgboost
    from skl2onnx import update_registered_converter
    from skl2onnx.common import shape_calculator as shapes

    update_registered_converter(
        xgboost.XGBClassifier,
        "ImportedXgbClassifier",
        shapes.calculate_linear_classifier_output_shapes,
        convert_xgboost,
        options={"zipmap": [True, False, "columns"], "nocl": [True, False]},
    )
    update_registered_converter(
        xgboost.XGBRegressor,
        "ImportedXgbRegressor",
        shapes.calculate_linear_regressor_output_shapes,
        convert_xgboost,
    )
    twin = copy.deepcopy(estimator)
    for step in (twin, *(one for _, one in getattr(twin, "steps", ()))):
        if hasattr(step, "get_booster"):
            step.get_booster().feature_names = step.get_booster().feature_types = None
    return twin
