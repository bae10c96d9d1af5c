"""LightGBM: teaches skl2onnx its estimators, with the converters of onnxmltools."""

from typing import Any


def convertible(estimator: Any) -> Any:
    """The estimator itself, its converters registered."""
    import lightgbm
    from onnxmltools.convert.lightgbm.operator_converters.LightGbm import convert_lightgbm as convert
    from skl2onnx import update_registered_converter as register
    from skl2onnx.common import shape_calculator as shapes

    scores, values = (
        shapes.calculate_linear_classifier_output_shapes,
        shapes.calculate_linear_regressor_output_shapes,
    )
    options = {"zipmap": [True, False, "columns"], "nocl": [True, False]}
    register(lightgbm.LGBMClassifier, "ImportedLgbmClassifier", scores, convert, options=options)
    register(lightgbm.LGBMRegressor, "ImportedLgbmRegressor", values, convert, options={"split": None})
    return estimator
