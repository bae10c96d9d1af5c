"""LightGBM: teaches skl2onnx its estimators, with the converters of onnxmltools."""

from typing import Any


def convertible(estimator: Any) -> Any:
    """The estimator itself, its converters registered."""
    import lightgbm
    from onnxmltools.convert.lightgbm.operator_converters.LightGbm import convert_lightgbm
    from skl2onnx import update_registered_converter
    from skl2onnx.common import shape_calculator as shapes

    update_registered_converter(
        lightgbm.LGBMClassifier,
        "ImportedLgbmClassifier",
        shapes.calculate_linear_classifier_output_shapes,
        convert_lightgbm,
        options={"zipmap": [True, False, "columns"], "nocl": [True, False]},
    )
    update_registered_converter(
        lightgbm.LGBMRegressor,
        "ImportedLgbmRegressor",
        shapes.calculate_linear_regressor_output_shapes,
        convert_lightgbm,
        options={"split": None},
    )
    return estimator
