"""Errors that end a script with one line for the user, and which exit code they end it with."""


class ReportedError(Exception):
    """An error whose message is one line that says what is wrong and what would be right.

    Attributes:
        exit_code: what the script ends with.
        reported_by: which process prints it: "rank 0" where all of them raise it, "local rank 0"
            where all of a node do, "every rank" where it is this process's own.
    """

    exit_code = 1
    reported_by = "rank 0"


class DataError(ReportedError):
    """A data set is missing, corrupt or could not be fetched."""

    reported_by = "local rank 0"


class ImageError(DataError):
    """An image that this process was to train or test on cannot be used."""

    reported_by = "every rank"


class FileError(ReportedError):
    """A file is not what it should be, or cannot be used now."""


class NetworkError(ReportedError):
    """A network cannot do what the flags ask for."""


class BatchTooSmallError(NetworkError, ValueError):
    """A batch norm cannot train on one value per channel."""


class PenaltyError(ReportedError):
    """A regularizer is not what one has to be, or returned something that is not a penalty."""


class NotFiniteError(ReportedError):
    """A loss, penalty or gradient became NaN or infinite; the message says which and when."""


class StepSizeError(ReportedError):
    """A learned step size of quantization is no longer positive; the message says which."""


class SetupError(ReportedError):
    """A flag asks for what this run cannot have: images, processes, a package or a cluster."""

    exit_code = 2


class PeerLostError(ReportedError):
    """Another process of the run has ended, or did not answer in time."""

    reported_by = "every rank"


class RanksDifferError(ReportedError):
    """What should be the same on every process of the run is not."""
