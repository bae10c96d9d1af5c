"""What the processes of one service share. `Fleet` itself is the case of a single process.

    gunicorn's master -> server.fleet.ForkingFleet -> FLEET -> fork -> create_app() in each worker
    no master (tests, tools) -----------------------> Fleet of its own -> create_app()

Nothing here asks whether there is a master: a single process gets the same answers from `Fleet`.
"""

from contextvars import ContextVar

from app import capabilities
from app.core.errors import ArtifactError
from app.core.runtimes import import_library
from app.core.store import Artifact, read_artifact, read_release
from app.monitoring.feedback import Given
from app.rollout.canary import Counts
from app.settings import Settings

# gunicorn calls create_app() without arguments, so this hands the master's fleet to the workers it forks.
FLEET: ContextVar["Fleet"] = ContextVar("FLEET")


class Fleet:
    """The processes that serve together: here only this one, which waits for no other."""

    def __init__(self, settings: Settings, workers: int = 1) -> None:
        self.settings, self.workers = settings, workers
        self.given = Given()  # labels that came back
        self.counts = Counts()  # requests of a canary and of the version beside it

    def served(self) -> tuple[Artifact, str]:
        """The verified artifact to serve; and why it is the fallback version, or an empty string."""
        return read_usable(self.settings)

    @property
    def all_loaded(self) -> bool:
        """Whether a request finds the model loaded in whichever worker it reaches."""
        return True

    @property
    def replaces(self) -> bool:
        """Whether a worker that starts now takes the place of one that has served."""
        return False

    def note_loaded(self) -> None:
        """This worker has loaded the model."""


def read_served(settings: Settings) -> Artifact:
    """The verified version that APP_MODEL_VERSION or else release.json names; raises ArtifactError."""
    version = settings.model_version
    with capabilities.local_folder(settings, version) as root:
        artifact = read_artifact(root, version or read_release(root).serving, settings.trusted_keys)
    if settings.env == "production" and (missing := artifact.manifest.unpinned):
        raise ArtifactError(f"{artifact.manifest.version}/manifest.json: production needs {missing}")
    return artifact


def read_usable(settings: Settings) -> tuple[Artifact, str]:
    """The served version; or that of APP_FALLBACK_VERSION, and what is wrong with the served version."""
    try:
        artifact = read_served(settings)
        import_library(artifact)  # its memory is then shared by all workers
    except ArtifactError as error:
        return read_fallback(settings, error), str(error)
    return artifact, ""


def read_fallback(settings: Settings, error: Exception) -> Artifact:
    """The version of APP_FALLBACK_VERSION, verified; raises `error` where none is set."""
    if settings.fallback_version is None:
        raise error
    return read_served(settings.model_copy(update={"model_version": settings.fallback_version}))
