"""From a fitted model and its training data to a version that is served, and the example's training.

from lifecycle.importing import Request, import_model

made = import_model(Request(Path("model.joblib"), Path("train.csv"), "species"))
made.version  # "v2"; raises LifecycleError with one line for a person
"""

from lifecycle.importing.importer import Imported, Request, import_model

__all__ = ["Imported", "Request", "import_model"]
